"""GGUF's groups of 32 numbers in plain NumPy, for machines without the `gguf` library, which test_groups.py compares
with. A group is a float16 scale, q4_1's float16 minimum, then bytes, or nibbles: the low ones are its first half."""

from __future__ import annotations

import numpy as np

GROUP = 32
BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20}


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """Bytes [rows, …] of float32 [rows, columns]; which of the numbers near a value stands for it is our choice."""
    groups = values.reshape(-1, GROUP)
    low = groups.min(1, keepdims=True)
    if kind == "q4_1":
        scale, start = (groups.max(1, keepdims=True) - low) / np.float32(15), low
    else:
        scale, start = np.abs(groups).max(1, keepdims=True) / np.float32(127 if kind == "q8_0" else 7), np.float32(0)
    levels = np.rint((groups - start) / np.where(scale == 0, 1, scale)).astype(np.int8)
    head = [_half(scale)] + ([_half(low)] if kind == "q4_1" else [])
    if kind == "q8_0":
        codes = levels.view(np.uint8)
    else:
        nibbles = (levels + (8 if kind == "q4_0" else 0)).astype(np.uint8)
        codes = nibbles[:, : GROUP // 2] | nibbles[:, GROUP // 2 :] << 4
    return np.concatenate([*head, codes], axis=1).reshape(len(values), -1)


def decode(data: np.ndarray, kind: str) -> np.ndarray:
    """float32 [rows, columns]."""
    groups = np.ascontiguousarray(data).reshape(-1, BYTES[kind])
    scale = groups[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == "q8_0":
        numbers = scale * groups[:, 2:].copy().view(np.int8)
    else:
        codes = groups[:, -GROUP // 2 :]
        levels = np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32)
        minimum = groups[:, 2:4].copy().view(np.float16).astype(np.float32) if kind == "q4_1" else None
        numbers = scale * (levels - 8) if minimum is None else scale * levels + minimum
    return numbers.astype(np.float32).reshape(len(data), -1)


def _half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).view(np.uint8)
