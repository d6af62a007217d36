"""A model directory in Hugging Face layout: config.json, safetensors, and a tokenizer where there is one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .hf_config import read_spec
from .safetensors import Entry, read_entries
from .settings import Settings
from .spec import ModelError, ModelSpec, TokenizerData, WeightTensor
from .weights import Recipe, Weights

# Checkpoints carry the wrapper's name before each tensor or not, depending on the class that saved them.
_PREFIXES = ("transformer.", "gpt_neox.", "model.decoder.", "decoder.", "model.")
# Buffers that older versions saved beside the weights: causal masks and rotary frequencies.
_BUFFER = re.compile(r"(?:^|\.)(?:attn\.(?:bias|masked_bias)|attention\.(?:bias|masked_bias)|rotary_emb\.inv_freq)$")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

_LLAMA = {
    "embed_tokens": "token_embedding",
    "norm": "final_norm",
    "lm_head": "lm_head",
    "layers.*.input_layernorm": "attn_norm",
    "layers.*.self_attn.q_proj": "q",
    "layers.*.self_attn.k_proj": "k",
    "layers.*.self_attn.v_proj": "v",
    "layers.*.self_attn.q_norm": "q_norm",
    "layers.*.self_attn.k_norm": "k_norm",
    "layers.*.self_attn.o_proj": "o",
    "layers.*.post_attention_layernorm": "mlp_norm",
    "layers.*.mlp.gate_proj": "gate",
    "layers.*.mlp.up_proj": "up",
    "layers.*.mlp.down_proj": "down",
}
_NAMES: dict[str, dict[str, str]] = {
    "gpt2": {
        "wte": "token_embedding",
        "wpe": "position_embedding",
        "ln_f": "final_norm",
        "lm_head": "lm_head",
        "h.*.ln_1": "attn_norm",
        "h.*.attn.c_attn": "qkv",
        "h.*.attn.c_proj": "o",
        "h.*.ln_2": "mlp_norm",
        "h.*.mlp.c_fc": "up",
        "h.*.mlp.c_proj": "down",
    },
    "opt": {
        "embed_tokens": "token_embedding",
        "embed_positions": "position_embedding",
        "final_layer_norm": "final_norm",
        "lm_head": "lm_head",
        "layers.*.self_attn_layer_norm": "attn_norm",
        "layers.*.self_attn.q_proj": "q",
        "layers.*.self_attn.k_proj": "k",
        "layers.*.self_attn.v_proj": "v",
        "layers.*.self_attn.out_proj": "o",
        "layers.*.final_layer_norm": "mlp_norm",
        "layers.*.fc1": "up",
        "layers.*.fc2": "down",
    },
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt_neox": {
        "embed_in": "token_embedding",
        "final_layer_norm": "final_norm",
        "embed_out": "lm_head",
        "lm_head": "lm_head",
        "layers.*.input_layernorm": "attn_norm",
        "layers.*.attention.query_key_value": "qkv",
        "layers.*.attention.dense": "o",
        "layers.*.post_attention_layernorm": "mlp_norm",
        "layers.*.mlp.dense_h_to_4h": "up",
        "layers.*.mlp.dense_4h_to_h": "down",
    },
}
_CONV1D = {"qkv", "o", "up", "down"}  # GPT-2 keeps these matrices as [inputs, outputs]


class HuggingFaceModel:
    """A directory as a ModelSource. Raises ModelError for one that is incomplete or not supported."""

    def __init__(self, directory: Path, name: str | None = None) -> None:
        self.name = name or directory.resolve().name
        self._directory = directory
        config = directory / "config.json"
        self.spec: ModelSpec = read_spec(
            Settings(str(config), _read_json(config)),
            Settings(str(directory / "generation_config.json"), _read_json(directory / "generation_config.json", {})),
        )
        stored, recipes = [], {}
        for entry in _entries(directory):
            name, recipe = _recipe(self.spec, entry.name)
            if recipe is not None:
                stored.append(entry.stored(name))
                recipes[name] = recipe
        self._weights = Weights(self.spec, stored, recipes, (), str(directory))

    @property
    def weights_dtype(self) -> str:
        return self._weights.dtype

    @property
    def dtypes(self) -> Mapping[str, str]:
        return self._weights.dtypes

    @property
    def num_parameters(self) -> int:
        return self._weights.num_parameters

    def tensors(self) -> Iterator[WeightTensor]:
        return iter(self._weights)

    def tokenizer_data(self) -> TokenizerData | None:
        config_path = self._directory / "tokenizer_config.json"
        config = _read_json(config_path, {})
        special_tokens = {
            key: text
            for key, value in {**_read_json(self._directory / "special_tokens_map.json", {}), **config}.items()
            if key in _SPECIAL_TOKENS
            and isinstance(text := value.get("content") if isinstance(value, dict) else value, str)
        }
        tokenizer = self._directory / "tokenizer.json"
        if tokenizer.is_file():
            return TokenizerData(
                json=_read_text(tokenizer),
                chat_template=_chat_template(self._directory, config),
                special_tokens=special_tokens,
            )
        return _gpt2_tokenizer(self._directory, config, special_tokens)


def _recipe(spec: ModelSpec, stored: str) -> tuple[str, Recipe | None]:
    """The name of a stored tensor without its wrapper, and its recipe; None for one that holds no weight.

    A tensor nobody knows gets a recipe without outputs that exist, which Weights then refuses by its name.
    """
    if _BUFFER.search(stored):
        return stored, None
    name = next((stored.removeprefix(prefix) for prefix in _PREFIXES if stored.startswith(prefix)), stored)
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(r"(\w+\.)(\d+)(\..+)", stem)
    pattern, layer = (f"{match[1]}*{match[3]}", match[2]) if match else (stem, None)
    canonical = _NAMES[spec.family].get(pattern)
    if canonical is None or kind not in ("weight", "bias"):
        return stored, Recipe((stored,))
    if canonical == "lm_head" and spec.tied_embeddings:
        return stored, None  # a second copy of the embedding
    at = "" if layer is None else f"layers.{int(layer)}."
    if canonical != "qkv":
        transposed = spec.family == "gpt2" and canonical in _CONV1D
        return name, Recipe((f"{at}{canonical}.{kind}",), transposed=transposed)
    outputs = tuple(f"{at}{part}.{kind}" for part in "qkv")
    return name, Recipe(outputs, transposed=True) if spec.family == "gpt2" else Recipe(outputs, "heads")


def _entries(directory: Path) -> Iterator[Entry]:
    """The tensors of every weight file, file by file."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and name == Path(name).name for name in weight_map.values()
        ):
            raise ModelError(f"{index}: 'weight_map' must map tensor names to file names in the same directory")
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        found = ", ".join(sorted(path.name for path in directory.glob("*.bin"))[:3])
        convert = f" ({found} found: convert it to safetensors with transformers' save_pretrained)" if found else ""
        raise ModelError(f"{directory}: no model.safetensors or model.safetensors.index.json{convert}")
    for file in files:
        yield from read_entries(file)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error


def _read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object; `missing` when there is no such file and that is fine."""
    if missing is not None and not path.is_file():
        return missing
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """transformers 5 writes chat_template.jinja; before, a text or a list of named ones in the tokenizer's config."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _gpt2_tokenizer(directory: Path, config: Mapping[str, Any], special: dict[str, str]) -> TokenizerData | None:
    """vocab.json and merges.txt, the older form of GPT-2's byte-level BPE (OPT comes with these alone)."""
    vocab_file, merges_file = directory / "vocab.json", directory / "merges.txt"
    if not (vocab_file.is_file() and merges_file.is_file()):
        return None
    vocab = _read_json(vocab_file)
    if sorted(vocab.values(), key=str) != sorted(range(len(vocab)), key=str):
        raise ModelError(f"{vocab_file}: must map {len(vocab)} tokens to the ids 0 to {len(vocab) - 1}")
    tokens = sorted(vocab, key=vocab.__getitem__)
    lines = _read_text(merges_file).splitlines()
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special.values() else 1 for token in tokens],
        "tokenizer.ggml.merges": [line for line in lines if line and not line.startswith("#version")],
    }
    if special.get("bos_token") in vocab:
        keys["tokenizer.ggml.bos_token_id"] = vocab[special["bos_token"]]
    return TokenizerData(
        gguf=keys,
        chat_template=_chat_template(directory, config),
        special_tokens=special,
        add_bos_token=config.get("add_bos_token") is True,
    )
