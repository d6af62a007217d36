"""What a run is to those behind its jobs: how long programs take, how long each user's jobs do, what a cache found."""

from __future__ import annotations

from typing import Any

from ..types import Job
from ..workloads.job import SimJob
from .stats import Stream


class Shares:
    """Hears of every call that ends, the first jobs to arrive left out, and all that come after them."""

    def __init__(self, warmup_jobs: int) -> None:
        self._warmup_jobs = warmup_jobs
        # By user and name, as two users' programs of one name are two: first arrival and last end.
        self._programs: dict[tuple[str, str], tuple[float, float]] = {}
        self._early: set[tuple[str, str]] = set()  # those that began in the warm-up
        self._users: dict[str, Stream] = {}

    def add(self, given: SimJob, job: Job) -> None:
        """A call has ended."""
        jct = job.metrics.jct
        if jct is None:
            return
        early = job.index < self._warmup_jobs
        if given.user is not None and not early:
            self._users.setdefault(given.user, Stream()).add(jct)
        if given.program is None:
            return
        program = given.user or "", given.program
        if early:
            self._early.add(program)
        if program not in self._early:
            end = job.arrival + jct
            first, last = self._programs.get(program, (job.arrival, end))
            self._programs[program] = min(first, job.arrival), max(last, end)
        else:
            self._programs.pop(program, None)

    def summary(self) -> dict[str, Any]:
        """Of programs and of users, each None where there are none."""
        completion = Stream()
        for first, last in self._programs.values():
            completion.add(last - first)
        counted = len(completion) > 0
        return {
            "programs": len(completion) or None,
            "mean_program_completion": completion.mean if counted else None,
            "p95_program_completion": completion.percentiles(95)[0] if counted else None,
            "users": {
                name: {"jobs": len(stream), "mean_jct": stream.mean, "p95_jct": stream.percentiles(95)[0]}
                for name, stream in sorted(self._users.items(), key=lambda item: (len(item[0]), item[0]))
            }
            or None,
        }
