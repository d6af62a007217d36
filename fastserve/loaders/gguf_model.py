"""A model in a GGUF file: architecture keys to ModelSpec, tensor names to canonical ones."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from .gguf import GgufFile
from .rope import rope_frequencies
from .settings import Settings
from .spec import ModelError, ModelSpec, TokenizerData
from .weights import Order, Recipe, StoredModel, Weights

_TOP = {
    "token_embd": "token_embedding",
    "position_embd": "position_embedding",
    "output_norm": "final_norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "attn_norm",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "attn_output": "o",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
_ROPE_FACTORS = "rope_freqs.weight"
_SPECIAL_TOKENS = ("bos", "eos", "unknown", "padding")


class GgufModel(StoredModel):
    """A GGUF file as a ModelSource. Raises ModelError for a file or architecture that cannot be served."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._file = GgufFile(path)
        architecture = self._file.keys.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
            raise ModelError(
                f"{path}: architecture {architecture!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
            )
        spec = _ARCHITECTURES[architecture](self._file)
        recipes = _recipes(spec, interleaved_rope=architecture == "llama")
        weights = Weights(spec, self._file.tensors.values(), recipes, (_ROPE_FACTORS,), str(path))
        super().__init__(name or path.name, spec, weights)

    def tokenizer_data(self) -> TokenizerData | None:
        keys = {key: value for key, value in self._file.keys.items() if key.startswith("tokenizer.")}
        tokens = keys.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            return None
        special = {}
        for kind in _SPECIAL_TOKENS:
            token = keys.get(f"tokenizer.ggml.{kind}_token_id")
            if isinstance(token, int) and 0 <= token < len(tokens):
                special[{"unknown": "unk", "padding": "pad"}.get(kind, kind) + "_token"] = tokens[token]
        template = keys.get("tokenizer.chat_template")
        # llama.cpp's default where the file is silent: SentencePiece models begin with it, byte-level ones do not.
        add_bos = keys.get("tokenizer.ggml.add_bos_token", keys.get("tokenizer.ggml.model") == "llama")
        return TokenizerData(
            gguf=keys,
            chat_template=template if isinstance(template, str) else None,
            special_tokens=special,
            add_bos_token=add_bos is True,
        )


def _recipes(spec: ModelSpec, *, interleaved_rope: bool) -> dict[str, Recipe]:
    recipes = {
        f"{stored}.{kind}": Recipe((f"{name}.{kind}",)) for stored, name in _TOP.items() for kind in ("weight", "bias")
    }
    for layer in range(spec.num_layers):
        for kind in ("weight", "bias"):
            for stored, name in _BLOCK.items():
                order: Order = "interleaved" if interleaved_rope and name in ("q", "k") else "concat"
                recipes[f"blk.{layer}.{stored}.{kind}"] = Recipe((f"layers.{layer}.{name}.{kind}",), order)
            if spec.family in ("gpt2", "gpt_neox"):  # q, k and v are one tensor, the heads of each together
                for part in "qkv":
                    del recipes[f"blk.{layer}.attn_{part}.{kind}"]
                outputs = tuple(f"layers.{layer}.{part}.{kind}" for part in "qkv")
                recipes[f"blk.{layer}.attn_qkv.{kind}"] = Recipe(outputs)
    return recipes


def _common(file: GgufFile, settings: Settings) -> dict[str, Any]:
    """What every architecture says in the same words."""
    hidden = settings.integer("embedding_length")
    layers = settings.integer("block_count")
    if layers > len(file.tensors):
        raise settings.refuse("block_count", f"at most the number of tensors ({len(file.tensors)})")
    heads, kv_heads, head_dim = settings.heads(
        "attention.head_count", "attention.head_count_kv", "attention.key_length", hidden
    )
    settings.only(**{"attention.value_length": head_dim, "expert_count": 0, "tensor_data_layout": "reference"})
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{settings.where}: tensor 'token_embd.weight' is missing")
    max_position = settings.integer("context_length")
    if settings.get("attention.sliding_window") is not None:  # within one window, attention is the full one
        max_position = min(max_position, settings.integer("attention.sliding_window"))
    tokens = Settings(settings.where, settings.values, "tokenizer.ggml.")
    bos = tokens.token_ids("bos_token_id")
    return dict(
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=settings.integer("feed_forward_length"),
        max_position=max_position,
        tied_embeddings="output.weight" not in file.tensors,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tokens.token_ids("eos_token_id", "eot_token_id", "eom_token_id"),
    )


def _rope(file: GgufFile, settings: Settings, head_dim: int, *, partial: bool = False) -> dict[str, Any]:
    dim = settings.integer("rope.dimension_count", head_dim)
    if dim > head_dim or (dim < head_dim and not partial) or dim % 2:
        raise settings.refuse("rope.dimension_count", f"the {head_dim} dimensions of a head")
    # GGUF spells the parameters of a scaling differently; those it can express beyond ours are refused.
    settings.only(
        **{"rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0}
    )
    kind = settings.choice("rope.scaling.type", "none", ("none", "linear", "yarn"))
    parameters = {
        "rope_type": {"none": "default"}.get(kind, kind),
        "factor": settings.get("rope.scaling.factor"),
        "original_max_position_embeddings": settings.get("rope.scaling.original_context_length"),
        "beta_fast": settings.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": settings.get("rope.scaling.yarn_beta_slow"),
    }
    inv_freq, scale = rope_frequencies(
        settings.where, parameters, settings.number("rope.freq_base", 10000.0), dim, settings.integer("context_length")
    )
    factors = file.tensors.get(_ROPE_FACTORS)  # Llama 3.1's scaling, computed by the converter
    if factors is not None:
        if factors.shape != inv_freq.shape or factors.dtype != "f32":
            raise ModelError(
                f"{settings.where}: tensor {_ROPE_FACTORS!r} is {factors.dtype} {list(factors.shape)}, "
                f"not f32 {list(inv_freq.shape)}"
            )
        divisors = factors.file.view(factors.offset, factors.nbytes).copy().view(np.float32)
        if not np.all(np.isfinite(divisors) & (divisors > 0)):
            raise ModelError(f"{settings.where}: tensor {_ROPE_FACTORS!r} must hold numbers above 0")
        inv_freq = inv_freq / divisors
    return dict(rope_inv_freq=tuple(float(value) for value in inv_freq), rope_scale=scale)


def _has(tensors: Collection[str], name: str) -> bool:
    return f"blk.0.{name}.bias" in tensors


def _llama_like(family: str) -> Callable[[GgufFile], ModelSpec]:
    def read(file: GgufFile) -> ModelSpec:
        architecture = file.keys["general.architecture"]
        settings = Settings(str(file.path), file.keys, f"{architecture}.")
        common = _common(file, settings)
        return ModelSpec(
            family=family,
            norm="rms",
            norm_eps=settings.number("attention.layer_norm_rms_epsilon"),
            activation="silu",
            gated_mlp=True,
            qk_norm=family == "qwen3",
            qkv_bias=_has(file.tensors, "attn_q"),
            out_bias=_has(file.tensors, "attn_output"),
            mlp_bias=_has(file.tensors, "ffn_up"),
            **common,
            **_rope(file, settings, common["head_dim"]),
        )

    return read


def _gpt2(file: GgufFile) -> ModelSpec:
    settings = Settings(str(file.path), file.keys, "gpt2.")
    return ModelSpec(
        family="gpt2",
        norm="layer",
        norm_eps=settings.number("attention.layer_norm_epsilon"),
        activation="gelu_tanh",
        gated_mlp=False,
        qkv_bias=_has(file.tensors, "attn_qkv"),
        out_bias=_has(file.tensors, "attn_output"),
        mlp_bias=_has(file.tensors, "ffn_up"),
        **_common(file, settings),
    )


def _gpt_neox(file: GgufFile) -> ModelSpec:
    settings = Settings(str(file.path), file.keys, "gptneox.")
    common = _common(file, settings)
    return ModelSpec(
        family="gpt_neox",
        norm="layer",
        norm_eps=settings.number("attention.layer_norm_epsilon"),
        activation="gelu",
        gated_mlp=False,
        parallel_residual=settings.flag("use_parallel_residual", True),
        qkv_bias=_has(file.tensors, "attn_qkv"),
        out_bias=_has(file.tensors, "attn_output"),
        mlp_bias=_has(file.tensors, "ffn_up"),
        **common,
        **_rope(file, settings, common["head_dim"], partial=True),
    )


_ARCHITECTURES: dict[str, Callable[[GgufFile], ModelSpec]] = {
    "llama": _llama_like("llama"),  # SmolLM2 and Mistral too
    "qwen2": _llama_like("qwen2"),
    "qwen3": _llama_like("qwen3"),
    "gpt2": _gpt2,
    "gptneox": _gpt_neox,
}
