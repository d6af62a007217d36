"""From a Hugging Face `config.json` to a ModelSpec, one function a family.

Defaults are those `transformers` applies when a key is absent. A setting that would change the result and is not
implemented is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from .rope import rope_frequencies
from .settings import Settings
from .spec import ModelError, ModelSpec

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def read_spec(config: Settings, generation: Settings) -> ModelSpec:
    """The spec of a model. `generation` (generation_config.json, may be empty) adds end-of-sequence tokens.

    Raises ModelError, naming the file and the key, for what is missing, malformed or not supported.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise ModelError(f"{config.where}: model_type {family!r} is not supported; supported: {', '.join(_FAMILIES)}")
    if config.get("quantization_config") is not None:
        raise ModelError(
            f"{config.where}: 'quantization_config' is not supported; supported: float32, float16, bfloat16 weights, "
            "or a GGUF file in Q8_0, Q4_0 or Q4_1"
        )
    bos = config.token_ids("bos_token_id")
    eos = dict.fromkeys((*config.token_ids("eos_token_id"), *generation.token_ids("eos_token_id")))
    return _FAMILIES[family](
        config,
        dict(
            family=family,
            vocab_size=config.integer("vocab_size"),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=tuple(eos),
        ),
    )


def _activation(config: Settings, key: str, default: str) -> Activation:
    return _ACTIVATIONS[config.choice(key, default, _ACTIVATIONS)]


def _rope(config: Settings, head_dim: int, *, theta_key: str = "rope_theta", partial: float = 1.0) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_scaling` beside `rope_theta` before it."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        raise ModelError(f"{config.where}: 'rope_parameters' must be one flat object; per-layer ones are not supported")
    nested = Settings(f"{config.where}: rope_parameters", parameters)
    theta = nested.number("rope_theta", config.number(theta_key, 10000.0))
    fraction = nested.number("partial_rotary_factor", config.number("partial_rotary_factor", partial))
    if fraction > 1 or (fraction < 1 and config.get("model_type") != "gpt_neox"):
        raise ModelError(f"{config.where}: 'partial_rotary_factor' {fraction} is not supported for this model_type")
    dim = int(head_dim * fraction)
    if dim < 1 or dim + dim % 2 > head_dim:
        raise ModelError(f"{config.where}: {dim} rotated dimensions do not fit a head of {head_dim} in pairs")
    max_position = config.integer("max_position_embeddings")
    original = config.get("original_max_position_embeddings")
    if original is not None:
        parameters = {**parameters, "original_max_position_embeddings": original}
    inv_freq, scale = rope_frequencies(config.where, parameters, theta, dim, max_position)
    return dict(rope_inv_freq=tuple(float(value) for value in inv_freq), rope_scale=scale)


def _context(config: Settings, window: int | None) -> int:
    """Longest context. Within one sliding window attention is the full one, so there results stay exact."""
    longest = config.integer("max_position_embeddings")
    return longest if window is None else min(longest, window)


def _gpt2(config: Settings, common: dict[str, Any]) -> ModelSpec:
    config.only(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    hidden = config.integer("n_embd")
    heads, kv_heads, head_dim = config.heads("n_head", None, None, hidden)
    return ModelSpec(
        **common,
        hidden_size=hidden,
        num_layers=config.integer("n_layer"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("n_inner", 4 * hidden),
        max_position=config.integer("n_positions", 1024),
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        activation=_activation(config, "activation_function", "gelu_new"),
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=config.flag("tie_word_embeddings", True),
    )


def _opt(config: Settings, common: dict[str, Any]) -> ModelSpec:
    hidden = config.integer("hidden_size")
    config.only(
        do_layer_norm_before=True, word_embed_proj_dim=hidden, _remove_final_layer_norm=False,
        layer_norm_elementwise_affine=True,
    )  # fmt: skip
    heads, kv_heads, head_dim = config.heads("num_attention_heads", None, None, hidden)
    bias = config.flag("enable_bias", True)
    return ModelSpec(
        **common,
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("ffn_dim"),
        max_position=config.integer("max_position_embeddings"),
        position_offset=2,
        norm="layer",
        norm_eps=1e-5,  # nn.LayerNorm's default; the config has no key for it
        activation=_activation(config, "activation_function", "relu"),
        gated_mlp=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied_embeddings=config.flag("tie_word_embeddings", True),
    )


def _llama_like(
    config: Settings,
    common: dict[str, Any],
    *,
    window: int | None = None,
    default_head_dim: int = 0,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
) -> ModelSpec:
    hidden = config.integer("hidden_size")
    heads, kv_heads, head_dim = config.heads(
        "num_attention_heads", "num_key_value_heads", "head_dim", hidden, default_head_dim
    )
    return ModelSpec(
        **common,
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        max_position=_context(config, window),
        norm="rms",
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=_activation(config, "hidden_act", "silu"),
        gated_mlp=True,
        qk_norm=common["family"] == "qwen3",
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        tied_embeddings=config.flag("tie_word_embeddings", False),
        **_rope(config, head_dim),
    )


def _llama(config: Settings, common: dict[str, Any]) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    return _llama_like(config, common, qkv_bias=bias, out_bias=bias, mlp_bias=config.flag("mlp_bias", False))


def _mistral(config: Settings, common: dict[str, Any]) -> ModelSpec:
    null = "sliding_window" in config.values and config.get("sliding_window") is None
    return _llama_like(config, common, window=None if null else config.integer("sliding_window", 4096))


def _qwen_window(config: Settings) -> int | None:
    """The sliding window of the layers that have one; None where every layer sees everything."""
    if not config.flag("use_sliding_window", False):
        return None
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list):
        slides = "sliding_attention" in layer_types
    else:
        slides = config.integer("num_hidden_layers") > config.integer("max_window_layers", 28, low=0)
    return config.integer("sliding_window", 4096) if slides else None


def _qwen2(config: Settings, common: dict[str, Any]) -> ModelSpec:
    return _llama_like(config, common, window=_qwen_window(config), qkv_bias=True)


def _qwen3(config: Settings, common: dict[str, Any]) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    window = _qwen_window(config)
    return _llama_like(config, common, window=window, default_head_dim=128, qkv_bias=bias, out_bias=bias)


def _gpt_neox(config: Settings, common: dict[str, Any]) -> ModelSpec:
    hidden = config.integer("hidden_size")
    heads, kv_heads, head_dim = config.heads("num_attention_heads", None, None, hidden)
    bias = config.flag("attention_bias", True)
    partial = config.number("rotary_pct", 0.25)
    return ModelSpec(
        **common,
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        max_position=config.integer("max_position_embeddings"),
        norm="layer",
        norm_eps=config.number("layer_norm_eps", 1e-5),
        activation=_activation(config, "hidden_act", "gelu"),
        gated_mlp=False,
        parallel_residual=config.flag("use_parallel_residual", True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        tied_embeddings=config.flag("tie_word_embeddings", False),
        **_rope(config, head_dim, theta_key="rotary_emb_base", partial=partial),
    )


_FAMILIES: dict[str, Callable[[Settings, dict[str, Any]], ModelSpec]] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gpt_neox": _gpt_neox,
}
