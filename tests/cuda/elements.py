"""The device's element types as NumPy sees them: float32, or the bits of bfloat16 and float16 as uint16."""

from __future__ import annotations

import numpy as np


def encode(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 rounded to the type, to nearest, ties to even."""
    x = np.ascontiguousarray(x, np.float32)
    if dtype == "float32":
        return x
    if dtype == "float16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(x: np.ndarray, dtype: str) -> np.ndarray:
    """As float32, exactly."""
    if dtype == "float32":
        return x
    if dtype == "float16":
        return x.view(np.float16).astype(np.float32)
    return (x.astype(np.uint32) << 16).view(np.float32)


def half_unit(exact: np.ndarray, error: np.ndarray, dtype: str) -> np.ndarray:
    """What rounding to the type can add to numbers that are within `error` of `exact`."""
    if dtype == "float32":
        return np.zeros_like(exact)
    bits, smallest = (8, 2.0**-134) if dtype == "bfloat16" else (11, 2.0**-25)  # half of the least subnormal
    return np.maximum((np.abs(exact) + error) * 2.0**-bits, smallest)
