"""FasterTransformer's `config.ini`: read to a ModelSpec, written from one.

Keys, defaults and their meaning are those of FasterTransformer's ParallelGptTritonModel. Settings that change the
result and are not implemented are refused by name; keys it does not know itself are ignored, as it ignores them.
"""

from __future__ import annotations

import configparser
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .floats import FloatType
from .ft_layout import CONFIG, SECTION
from .settings import Settings
from .spec import ModelError, ModelSpec
from .text import read_text

DATA_TYPES: dict[str, FloatType] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_ACTIVATIONS: dict[str, Literal["gelu_tanh", "relu", "silu"]] = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu"}
_FAMILIES = {"gpt": "gpt2", "opt-pre": "opt"}  # by model_variant
_VARIANT = {
    "has_positional_encoding": True,
    "has_pre_decoder_layernorm": False,
    "has_post_decoder_layernorm": True,
    "use_attention_linear_bias": False,
    "has_adapters": False,
}
_NO_TOKEN = "-1"
_END_TOKENS = "end_ids"  # ours: where there are several; FasterTransformer knows the first


@dataclass(frozen=True)
class FtConfig:
    """What `config.ini` says."""

    spec: ModelSpec  # as if the embedding were tied: whether it is, only the files tell
    data_type: FloatType
    ranks: int | None  # of the tensor-parallel group; OPT's converter does not tell


def read_config(directory: Path) -> FtConfig:
    """Raises ModelError, naming the file and the key, for what is missing, malformed or not supported."""
    path = directory / CONFIG
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=(";", "#"), default_section="")
    try:
        parser.read_string(read_text(path))
    except configparser.Error as error:
        raise ModelError(f"{path}: not an INI file: {' '.join(str(error).split())}") from error
    for section in parser.sections():
        if section != SECTION:
            known = "prompt learning" if section.startswith("task_") else "experts" if section == "structure" else ""
            hint = f" ({known}, which is not supported)" if known else ""
            raise ModelError(f"{path}: unknown section [{section}]{hint}; a GPT checkpoint has [{SECTION}] alone")
    if not parser.has_section(SECTION):
        raise ModelError(f"{path}: section [{SECTION}] is missing")
    settings = Settings(str(path), {key: _typed(key, text) for key, text in parser[SECTION].items()})
    return FtConfig(
        spec=_spec(settings),
        data_type=DATA_TYPES[settings.choice("weight_data_type", "fp32", DATA_TYPES)],
        ranks=None if settings.get("tensor_para_size") is None else settings.integer("tensor_para_size"),
    )


def config_text(spec: ModelSpec, data_type: str, ranks: int) -> str:
    """A `config.ini` for a model whose activation is one of FasterTransformer's. See `activation_type`."""
    variant = next(variant for variant, family in _FAMILIES.items() if family == spec.family)
    values = {
        "model_name": variant.partition("-")[0],
        "model_variant": variant,
        "head_num": spec.num_heads,
        "size_per_head": spec.head_dim,
        "inter_size": spec.intermediate_size,
        "max_pos_seq_len": spec.max_position,
        "num_layer": spec.num_layers,
        "vocab_size": spec.vocab_size,
        "layernorm_eps": spec.norm_eps,
        "layernorm_type": "pre_layernorm",
        "activation_type": activation_type(spec),
        "has_post_decoder_layernorm": 1,
        "start_id": _NO_TOKEN if spec.bos_token_id is None else spec.bos_token_id,
        "end_id": next(iter(spec.eos_token_ids), _NO_TOKEN),
        **({_END_TOKENS: ", ".join(map(str, spec.eos_token_ids))} if len(spec.eos_token_ids) > 1 else {}),
        "weight_data_type": data_type,
        "tensor_para_size": ranks,
    }
    return "\n".join([f"[{SECTION}]", *(f"{key} = {value}" for key, value in values.items()), ""])


def activation_type(spec: ModelSpec) -> str | None:
    """FasterTransformer's name of a model's activation; None where it has none, as of the exact GELU."""
    return next((name.title() for name, own in _ACTIVATIONS.items() if own == spec.activation), None)


def _typed(key: str, text: str) -> Any:
    """A value as Settings expects it. Converters write what Python prints, so what was absent there is None."""
    if text in ("", "None") or (text == _NO_TOKEN and key in ("start_id", "end_id")):
        return None
    if key in _VARIANT:
        return configparser.ConfigParser.BOOLEAN_STATES.get(text.lower(), text)
    if key == _END_TOKENS:
        return [_number(word.strip()) for word in text.split(",")]
    return _number(text)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _spec(settings: Settings) -> ModelSpec:
    variant = None if settings.get("model_variant") is None else settings.choice("model_variant", "", _FAMILIES)
    settings.only(**_VARIANT, layernorm_type="pre_layernorm", num_tasks=0, prompt_learning_type=0)
    default = "Relu" if variant == "opt-pre" else "Gelu"
    activation = settings.choice("activation_type", default, [*map(str.title, _ACTIVATIONS), *_ACTIVATIONS])
    if variant is None:
        variant = "opt-pre" if activation.lower() == "relu" else "gpt"
    hidden = settings.integer("head_num") * settings.integer("size_per_head")
    heads, kv_heads, head_dim = settings.heads("head_num", None, "size_per_head", hidden)
    start = settings.token_ids("start_id")
    return ModelSpec(
        family=_FAMILIES[variant],
        vocab_size=settings.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=settings.integer("num_layer"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=settings.integer("inter_size"),
        max_position=settings.integer("max_pos_seq_len"),
        norm="layer",
        norm_eps=settings.number("layernorm_eps", 1e-6),
        activation=_ACTIVATIONS[activation.lower()],
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=True,
        bos_token_id=start[0] if start else None,
        eos_token_ids=settings.token_ids("end_id", _END_TOKENS),
    )
