"""Rotary position embedding: every supported scaling, folded into the inverse frequencies.

Formulas are those of the methods' papers as `transformers` computes them, in float32 for the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..types import Float32Array
from .spec import ModelError

SUPPORTED = "default, linear, llama3, yarn"


def rope_frequencies(
    where: str, parameters: Mapping[str, Any], theta: float, dim: int, max_position: int
) -> tuple[Float32Array, float]:
    """Inverse frequencies [ceil(dim / 2)], radians a token, and the factor on cos and sin.

    `parameters` is the `rope_parameters` or `rope_scaling` object of a config; `dim` is the number of rotated
    dimensions of a head. Raises ModelError, naming `where`, for a scaling that is unknown, incomplete or not a number.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default")) or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ModelError(f"{where}: rope scaling {kind!r} is not supported; supported: {SUPPORTED}")
    if not theta > 1:
        raise ModelError(f"{where}: the base of rotary embedding must be above 1, got {theta}")
    with np.errstate(all="ignore"):  # what overflows is caught below
        inv_freq, scale = _scaled(where, parameters, kind, theta, dim, max_position)
    if not np.all(np.isfinite(inv_freq) & (inv_freq > 0)):
        raise ModelError(f"{where}: base {theta} and rope scaling {kind!r} give frequencies that float32 cannot hold")
    return inv_freq, scale


def _scaled(
    where: str, parameters: Mapping[str, Any], kind: str, theta: float, dim: int, max_position: int
) -> tuple[Float32Array, float]:
    def number(key: str, default: float | None = None) -> float:
        value = parameters.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ModelError(f"{where}: {key} of rope scaling {kind!r} must be a number above 0, got {value!r}")
        return float(value)

    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    inv_freq: Float32Array = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    if kind == "default":
        return inv_freq, 1.0
    if kind == "linear":
        return inv_freq / np.float32(number("factor")), 1.0
    original = number("original_max_position_embeddings", max_position)
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if not high > low:
            raise ModelError(f"{where}: high_freq_factor of rope scaling 'llama3' must be above low_freq_factor")
        return _llama3(inv_freq, number("factor"), low, high, original), 1.0
    factor = number("factor", max_position / original)
    scale = _yarn_scale(factor)
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        scale = _yarn_scale(factor, number("mscale")) / _yarn_scale(factor, number("mscale_all_dim"))
    scale = number("attention_factor", scale)
    low, high = (_yarn_dim(number(key, default), theta, dim, original) for key, default in _YARN_BETAS)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return _yarn(inv_freq, factor, max(low, 0.0), min(high, dim - 1.0)), scale


_YARN_BETAS = (("beta_fast", 32.0), ("beta_slow", 1.0))


def _llama3(inv_freq: Float32Array, factor: float, low: float, high: float, original: float) -> Float32Array:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1)."""
    turns = np.float32(original) / (np.float32(2 * math.pi) / inv_freq)  # rotations within the original context
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0).astype(np.float32)
    scaled: Float32Array = ((1 - blend) * inv_freq / np.float32(factor) + blend * inv_freq).astype(np.float32)
    return scaled


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_dim(rotations: float, theta: float, dim: int, original: float) -> float:
    """The dimension that turns `rotations` times within the original context."""
    return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def _yarn(inv_freq: Float32Array, factor: float, low: float, high: float) -> Float32Array:
    """Dimensions below `low` keep their frequency, those above `high` are divided by `factor` (YaRN, NTK by parts)."""
    width = high - low or 0.001
    keep = 1 - np.clip((np.arange(len(inv_freq), dtype=np.float32) - low) / width, 0.0, 1.0).astype(np.float32)
    scaled: Float32Array = (inv_freq / np.float32(factor) * (1 - keep) + inv_freq * keep).astype(np.float32)
    return scaled
