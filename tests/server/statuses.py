"""What an engine may say of itself."""

from __future__ import annotations

from typing import Any

from fastserve.ipc import LevelStatus, Status

LEVELS = [LevelStatus(0.5, 3, 1, 1.25), LevelStatus(1.0, 0, 1, 0.0), LevelStatus(None, 2, 0, 60.5)]


def status(**more: Any) -> Status:
    """Seven live jobs, two of them running, on three levels; counters that are all different."""
    told: dict[str, Any] = dict(
        time=100.0, live=7, running=2, levels=LEVELS, backlog=12.5,
        device_blocks=100, device_blocks_used=25, host_blocks=40, host_blocks_used=8,
        iterations=11, prefill_tokens=12, decode_tokens=13, preemptions=14, recomputed_tokens=15,
        offloaded_bytes=16, uploaded_bytes=17, copy_seconds=1.5, hidden_copy_seconds=1.25, busy_seconds=9.5,
        prefix_queries=18, prefix_hits=10, evicted_blocks=19, device_blocks_cached=30, host_blocks_cached=5, programs=3,
    )  # fmt: skip
    return Status(**{**told, **more})
