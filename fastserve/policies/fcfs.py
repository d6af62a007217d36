"""First come, first served: run to completion, batched by the iteration."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..types import Job
from .base import Policy
from .queue import JobQueue


class FirstComeFirstServed(Policy):
    """Jobs in order of arrival. A job is left out of an iteration only when those before it fill the batch.

    Nobody knows how long an output will be, so the work ahead of a job is the least it can be: one iteration of every
    job before it. It grows with every place in the queue, hence the latest arrival is the first to lose its blocks.
    """

    def __init__(self) -> None:
        self._queue = JobQueue()

    def add(self, job: Job, now: float) -> None:
        self._queue.append(job, job.next_seconds)

    def remove(self, job: Job) -> None:
        self._queue.remove(job)

    def on_service(self, job: Job, seconds: float, now: float) -> None:
        self._queue.set_seconds(job, job.next_seconds)

    def refresh(self, job: Job, now: float) -> None:
        self._queue.set_seconds(job, job.next_seconds)

    def horizon(self, job: Job) -> float:
        return math.inf

    def move(self, job: Job, tier: int | None) -> None:
        self._queue.move(job, tier)

    def iter_best(self, now: float) -> Iterator[Job]:
        return iter(self._queue)

    def iter_tier(self, tier: int, worst_first: bool = False) -> Iterator[Job]:
        return self._queue.tier(tier, worst_first)

    def rank(self, job: Job) -> tuple[int, int]:
        return 0, self._queue.ticket(job)

    def work_ahead(self, job: Job, now: float) -> float:
        return self._queue.ahead(job)

    def backlog(self, now: float) -> float:
        return self._queue.total()

    def __len__(self) -> int:
        return len(self._queue)
