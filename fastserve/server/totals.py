"""What all engines of a server did, one after the other: a counter that fell would look like a new server."""

from __future__ import annotations

from typing import Final

from ..ipc import Status

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
)


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
