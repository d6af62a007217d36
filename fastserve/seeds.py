"""Seeds of several answers to one prompt."""

from __future__ import annotations

from .types import MAX_SEED


def derived_seed(seed: int, index: int) -> int:
    """The seed of answer `index`: the request's own for the first, well-mixed others (SplitMix64) after it."""
    if index == 0:
        return seed
    mixed = (seed + index * 0x9E3779B97F4A7C15) & MAX_SEED
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MAX_SEED
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MAX_SEED
    return mixed ^ (mixed >> 31)
