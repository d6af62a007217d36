"""What all engines of a server did, one after the other and beside each other: a counter that fell would look like a
new server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, Final

import msgspec

from ..ipc import LevelStatus, Status

COUNTERS: Final = (
    "iterations",
    "prefill_tokens",
    "decode_tokens",
    "preemptions",
    "recomputed_tokens",
    "offloaded_bytes",
    "uploaded_bytes",
    "copy_seconds",
    "hidden_copy_seconds",
    "busy_seconds",
    "prefix_queries",
    "prefix_hits",
    "evicted_blocks",
)


_SUMS: Final = (
    "live", "running", "device_blocks", "device_blocks_used", "device_blocks_cached", "host_blocks", "host_blocks_used",
    "host_blocks_cached", "programs",
)  # fmt: skip


class Totals:
    """Sums of COUNTERS, those of Status that count from an engine's start.

    What an engine did after its last Status, a quarter of a second at most, is lost with it.
    """

    def __init__(self) -> None:
        self._before: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self._latest: Status | None = None

    def said(self, status: Status) -> None:
        self._latest = status

    def lost(self) -> None:
        """The engine is gone, if there was one; the next counts from 0."""
        self._before, self._latest = self.values(), None

    def values(self) -> dict[str, float]:
        """By name."""
        latest = self._latest
        if latest is None:
            return dict(self._before)
        return {name: before + getattr(latest, name) for name, before in self._before.items()}


def together(statuses: Sequence[Status], counters: Mapping[str, float]) -> Status | None:
    """Engines that are up, beside each other, as if they were one that has counted `counters`; None where none is.

    It is done when the last of them is, and its levels have the quanta that the first engine's have. Of tenants each
    Status tells once, to who adds them up (tenants.py).
    """
    if not statuses:
        return None
    told: dict[str, Any] = {name: sum(getattr(status, name) for status in statuses) for name in _SUMS}
    return msgspec.structs.replace(
        statuses[0],
        time=max(status.time for status in statuses),
        levels=[_one_level([level for level in row if level]) for row in zip_longest(*(s.levels for s in statuses))],
        backlog=max(status.backlog for status in statuses),
        tenants=[],
        **told,
        **counters,
    )


def _one_level(levels: Sequence[LevelStatus]) -> LevelStatus:
    waiting, running = sum(level.waiting for level in levels), sum(level.running for level in levels)
    return LevelStatus(levels[0].quantum, waiting, running, max(level.oldest_wait for level in levels))
