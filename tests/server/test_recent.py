"""Figures of the last minutes, on a clock that the test holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from statuses import status
from toy import Clock

from fastserve.server.recent import Recent
from fastserve.server.regret import WINDOW
from fastserve.types import JobMetrics


class Job:
    def __init__(self, jct: float, *, ttft: float = 0.5, tokens: int = 5, reason: str = "length") -> None:
        self.metrics = JobMetrics(0.0, first_token=ttft, finish=jct)
        self.output = [1] * tokens
        self.finish_reason = reason


def recent_with(clock: Clock, *jobs: Any) -> Recent:
    recent = Recent(clock)
    for job in jobs:
        recent.ended(job)
    return recent


def test_percentiles_are_numpys() -> None:
    times = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0]
    finished = recent_with(Clock(), *map(Job, times)).finished()
    assert (finished["count"], finished["seconds"]) == (7, WINDOW)
    for share in (50, 95, 99):
        assert finished["jct"][f"p{share}"] == pytest.approx(np.percentile(times, share))
        assert finished["ttft"][f"p{share}"] == 0.5
        assert finished["tpot"][f"p{share}"] == pytest.approx(np.percentile([(t - 0.5) / 4 for t in times], share))


def test_who_did_not_end_by_itself_says_nothing() -> None:
    gone = Job(1.0)
    gone.metrics = None  # type: ignore[assignment]
    finished = recent_with(Clock(), Job(1.0, reason="abort"), Job(1.0, reason="error"), gone).finished()
    assert finished["count"] == 0 and finished["jct"] == {"p50": None, "p95": None, "p99": None}


def test_one_token_has_no_time_per_token() -> None:
    finished = recent_with(Clock(), Job(2.0, tokens=1)).finished()
    assert finished["jct"]["p99"] == 2.0 and finished["tpot"]["p99"] is None


def test_jobs_are_forgotten_when_the_window_is_over() -> None:
    clock = Clock()
    recent = recent_with(clock, Job(1.0))
    clock.now = 200.0
    recent.ended(Job(3.0))  # type: ignore[arg-type]
    assert recent.finished()["jct"]["p50"] == 2.0
    clock.now = WINDOW + 0.5
    assert recent.finished()["jct"]["p50"] == 3.0
    clock.now = WINDOW + 200.5
    assert recent.finished()["count"] == 0


def test_throughput_is_that_of_the_last_seconds() -> None:
    recent = Recent(Clock())
    none = {"prefill": 0.0, "decode": 0.0}
    assert recent.throughput(None) == none
    assert recent.throughput(status(time=0.0, prefill_tokens=0, decode_tokens=0)) == none
    assert recent.throughput(status(time=1.0, prefill_tokens=10, decode_tokens=40)) == {"prefill": 10.0, "decode": 40.0}
    later = status(time=4.0, prefill_tokens=10, decode_tokens=100)
    assert recent.throughput(later) == recent.throughput(later) == {"prefill": 0.0, "decode": 20.0}
    # Another engine counts from 0: no rate is negative.
    assert recent.throughput(status(time=5.0, prefill_tokens=3, decode_tokens=2)) == none
    assert recent.throughput(status(time=6.0, prefill_tokens=3, decode_tokens=8)) == {"prefill": 0.0, "decode": 6.0}
