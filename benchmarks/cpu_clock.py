"""Counting processor seconds instead of those on the wall, for measuring on a machine that others use.

With one thread of the runtime (`--threads 1`), the processor seconds of this process are what the wall would show if
nobody else were there, but that Python's share is added to the runtime's instead of running beside it: a few percent
too much. A throttled link waits on the wall, so its copies look short by this clock.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

from fastserve import llm, serving
from fastserve.types import BatchPlan, Executor, StepResult


def use_cpu_clock() -> None:
    """From here on, every LLM of this process lives in processor seconds."""
    serving.time = SimpleNamespace(monotonic=time.process_time)  # type: ignore[assignment]
    llm.time = SimpleNamespace(sleep=_spin)  # type: ignore[assignment]


def _spin(seconds: float) -> None:
    """While nothing else in this process runs, its clock stands still; so idle time has to be worked off."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class CpuTimed:
    """An Executor around another, one plan at a time, whose results tell processor seconds."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._start = 0.0

    def submit(self, plan: BatchPlan) -> None:
        self._start = time.process_time()
        self._executor.submit(plan)

    def poll(self, timeout: float | None) -> StepResult | None:
        result = self._executor.poll(timeout)
        if result is not None:
            result.seconds = time.process_time() - self._start
        return result
