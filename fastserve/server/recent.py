"""What happened lately: percentiles of the jobs that ended, and tokens a second; for people who look at a server."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..ipc import Status
from .engine_api import OpenJob
from .regret import WINDOW

_MOST = 20_000  # ended jobs remembered at most
_RATE = 2.0  # seconds that a rate is taken over
_FIGURES = ("jct", "ttft", "tpot")


class Recent:
    """Fed with every job that ended and asked now and then. Belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ended: deque[tuple[float, tuple[float | None, ...]]] = deque(maxlen=_MOST)  # when, and its _FIGURES
        self._counts: deque[tuple[float, int, int]] = deque()  # when, and prompt and output tokens by then

    def ended(self, job: OpenJob) -> None:
        """One that stopped by itself; others say nothing about how fast jobs are."""
        if job.metrics is not None and job.finish_reason in ("stop", "length"):
            figures = job.metrics.as_dict(len(job.output))
            self._ended.append((self._clock(), tuple(figures[name] for name in _FIGURES)))

    def finished(self) -> dict[str, Any]:
        """How many ended in the window, and P50, P95 and P99 of their seconds."""
        horizon = self._clock() - WINDOW
        while self._ended and self._ended[0][0] < horizon:
            self._ended.popleft()
        found: dict[str, Any] = {"count": len(self._ended), "seconds": WINDOW}
        for place, name in enumerate(_FIGURES):
            values = sorted(value for _, figures in self._ended if (value := figures[place]) is not None)
            found[name] = {f"p{share}": _percentile(values, share / 100) for share in (50, 95, 99)}
        return found

    def throughput(self, status: Status | None) -> dict[str, float]:
        """Prompt and output tokens a second since an answer of about two seconds ago."""
        if status is None:
            self._counts.clear()
            return {"prefill": 0.0, "decode": 0.0}
        latest = (status.time, status.prefill_tokens, status.decode_tokens)
        if self._counts and latest[1:] < self._counts[-1][1:]:
            self._counts.clear()  # another engine, which counts from 0
        if not self._counts or latest[0] > self._counts[-1][0]:
            self._counts.append(latest)
        while len(self._counts) > 2 and self._counts[1][0] <= latest[0] - _RATE:
            self._counts.popleft()
        then, prefill, decode = self._counts[0]
        passed = latest[0] - then
        if passed <= 0.0:
            return {"prefill": 0.0, "decode": 0.0}
        return {"prefill": (latest[1] - prefill) / passed, "decode": (latest[2] - decode) / passed}


def _percentile(ordered: list[float], share: float) -> float | None:
    """Interpolated between neighbours, as NumPy's default."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
