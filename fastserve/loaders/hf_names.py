"""What `transformers` calls the tensors of each family, and how each becomes canonical ones."""

from __future__ import annotations

import re

from .spec import ModelSpec
from .weights import Recipe

# Checkpoints carry the wrapper's name before each tensor or not, depending on the class that saved them.
_PREFIXES = ("transformer.", "gpt_neox.", "model.decoder.", "decoder.", "model.")
# Buffers that older versions saved beside the weights: causal masks and rotary frequencies.
_BUFFER = re.compile(r"(?:^|\.)(?:attn\.(?:bias|masked_bias)|attention\.(?:bias|masked_bias)|rotary_emb\.inv_freq)$")

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


def recipe(spec: ModelSpec, stored: str) -> tuple[str, Recipe | None]:
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
