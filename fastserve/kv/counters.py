"""What the prefix cache has done since the engine's start, counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class CacheCounters:
    """Each only grows. `hits / queries` is the hit rate, in tokens."""

    queries: int = 0  # prompt tokens that were looked up, as jobs first ran
    hits: int = 0  # of them, those whose KV was found, in either tier
    evicted: int = 0  # blocks whose KV was given up for others, wherever it lay
