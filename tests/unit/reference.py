"""A slow, plain decoder in NumPy: what a ModelSpec and its canonical tensors mean, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from fastserve.loaders import ModelSource, ModelSpec, WeightTensor

Array = np.ndarray
_ERF = np.vectorize(math.erf, otypes=[float])
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + _ERF(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}
_PLAIN = {"f32": np.float32, "f16": np.float16}


def values(tensor: WeightTensor) -> Array:
    """The tensor as float32; where it is neither that nor float16, decoded by the `gguf` library."""
    if tensor.dtype in _PLAIN:
        return tensor.data.view(_PLAIN[tensor.dtype]).reshape(tensor.shape).astype(np.float32)
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[tensor.dtype.upper()]
    return gguf.quants.dequantize(tensor.data.reshape(tensor.shape[0], -1), kind).reshape(tensor.shape)


def weights(source: ModelSource) -> dict[str, Array]:
    return {tensor.name: values(tensor).astype(np.float64) for tensor in source.tensors()}


def logits(source: ModelSource, tokens: list[int]) -> Array:
    """[tokens, vocabulary]"""
    spec, w = source.spec, weights(source)
    x = w["token_embedding.weight"][tokens]
    if not spec.rope_inv_freq:
        x = x + w["position_embedding.weight"][spec.position_offset :][: len(tokens)]
    for layer in range(spec.num_layers):
        part = {name.removeprefix(f"layers.{layer}."): value for name, value in w.items()}
        attended = _attention(spec, part, _norm(spec, part, "attn_norm", x))
        between = x if spec.parallel_residual else x + attended
        after = _mlp(spec, part, _norm(spec, part, "mlp_norm", between))
        x = x + attended + after if spec.parallel_residual else between + after
    head = w["token_embedding.weight" if spec.tied_embeddings else "lm_head.weight"]
    return _norm(spec, w, "final_norm", x) @ head.T


def _linear(w: Mapping[str, Array], name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def _norm(spec: ModelSpec, w: Mapping[str, Array], name: str, x: Array) -> Array:
    if spec.norm == "layer" and name != "q_norm" and name != "k_norm":
        x = x - x.mean(-1, keepdims=True)
    scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps)
    return scaled * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)


def _rotate(spec: ModelSpec, x: Array) -> Array:
    """x: [tokens, heads, head_dim]; the first 2 * len(rope_inv_freq) dimensions turn, half-split."""
    half = len(spec.rope_inv_freq)
    angle = np.arange(len(x))[:, None, None] * np.array(spec.rope_inv_freq)
    cos, sin = np.cos(angle) * spec.rope_scale, np.sin(angle) * spec.rope_scale
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _attention(spec: ModelSpec, w: Mapping[str, Array], x: Array) -> Array:
    tokens = len(x)
    q = _linear(w, "q", x).reshape(tokens, spec.num_heads, spec.head_dim)
    k = _linear(w, "k", x).reshape(tokens, spec.num_kv_heads, spec.head_dim)
    v = _linear(w, "v", x).reshape(tokens, spec.num_kv_heads, spec.head_dim)
    if spec.qk_norm:
        q, k = _norm(spec, w, "q_norm", q), _norm(spec, w, "k_norm", k)
    if spec.rope_inv_freq:
        q, k = _rotate(spec, q), _rotate(spec, k)
    group = spec.num_heads // spec.num_kv_heads
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(spec.head_dim)
    scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores, -np.inf)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    return _linear(w, "o", np.einsum("hij,jhd->ihd", share, v).reshape(tokens, -1))


def _mlp(spec: ModelSpec, w: Mapping[str, Array], x: Array) -> Array:
    act = _ACTIVATIONS[spec.activation]
    inner = act(_linear(w, "gate", x)) * _linear(w, "up", x) if spec.gated_mlp else act(_linear(w, "up", x))
    return _linear(w, "down", inner)


def tolerance(expected: Array) -> float:
    """How far a float32 run of a two-layer model may be off: some tens of roundings of its largest logit."""
    return float(64 * np.finfo(np.float32).eps * np.abs(expected).max())
