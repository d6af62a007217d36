"""Between float32, float16 and bfloat16, on bits: NumPy has no bfloat16."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FloatType = Literal["f32", "f16", "bf16"]
Bits = npt.NDArray[Any]  # uint32 of float32; uint16 of float16 and bfloat16

BITS: dict[FloatType, type[np.uint16] | type[np.uint32]] = {"f32": np.uint32, "f16": np.uint16, "bf16": np.uint16}
ITEM_SIZES: dict[FloatType, int] = {"f32": 4, "f16": 2, "bf16": 2}


def cast(bits: Bits, source: FloatType, target: FloatType) -> Bits:
    """The nearest numbers of another type, ties to even. Raises OverflowError where float16 would make infinity."""
    if source == target:
        return bits
    if source == "f32":
        wide = bits.view(np.float32)
    elif source == "f16":
        wide = bits.view(np.float16).astype(np.float32)
    else:
        wide = (bits.astype(np.uint32) << 16).view(np.float32)
    if target == "f32":
        return wide.view(np.uint32)
    if target == "f16":
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float16)
        if np.any(np.isinf(narrow) & np.isfinite(wide)):
            raise OverflowError("numbers beyond float16's range of 65504")
        return narrow.view(np.uint16)
    whole = wide.view(np.uint32)
    rounded = (whole + (((whole >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    # Rounding could carry the bits of a NaN over into infinity.
    return np.where(np.isnan(wide), (whole >> 16) | np.uint32(0x40), rounded).astype(np.uint16)
