"""The jobs that decode in every iteration until something happens, as parallel arrays.

A batch changes little from one iteration to the next: thousands of times a second every row moves on by one token, and
now and then a job joins or leaves. So the rows live in arrays, in the layout in which a plan wants them, and what an
iteration does to all of them is a handful of array operations instead of a loop over jobs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set

import numpy as np

from .cost import Cost
from .types import Int32Array, Job

# Service is a sum of floats: what is left of a horizon after spending all of it may miss 0 by rounding.
_ALL = 1.0 - 1e-9

# Those of jobs that left are forgotten when there are more than this.
_MANY_STOP_TOKENS = 256


class DecodeRows:
    """Up to `limit` jobs. Job.row is a job's place; it changes when others leave."""

    def __init__(self, limit: int, cost: Cost) -> None:
        self.jobs: list[Job] = []
        self.prefills: list[Job] = []  # the other members of the batch: they have more than one token to compute
        self.at_once: set[Job] | None = None  # those of them that do not wait for others' gaps; None: see Chunks
        self.beyond: Set[Job] = frozenset()  # those that are beyond their tenants' shares, and ...
        self.spare = math.inf  # ... the seconds of an iteration that they may take together
        self.version = -1  # of the decision that made the batch
        self.stop_tokens: frozenset[int] = frozenset()  # tokens that end one job or another, those that left included
        self._cost = cost
        self._logprobs = 0  # jobs that ask for some
        self._rows = np.ones((limit, 4), np.int32)  # slot, position, 1, 1: as in BatchPlan.rows
        self._capacity = np.zeros(limit, np.int32)  # positions for which the job has blocks
        self._left = np.zeros(limit, np.int32)  # tokens it may still sample
        self._service = np.zeros(limit)  # seconds not reported to the policy
        self._horizon = np.zeros(limit)  # seconds at which it must be

    @property
    def logprobs(self) -> bool:
        """Whether a job asks for some."""
        return self._logprobs > 0

    def __len__(self) -> int:
        return len(self.jobs)

    def add(self, job: Job, capacity: int, horizon: float) -> None:
        """A job with one token to compute joins. `capacity`: positions it has blocks for; `horizon`: Policy.horizon."""
        row = job.row = len(self.jobs)
        job.batch = self
        if not job.stop_tokens <= self.stop_tokens:
            if len(self.stop_tokens) > _MANY_STOP_TOKENS:
                self.stop_tokens = frozenset().union(*(other.stop_tokens for other in self.jobs))
            self.stop_tokens |= job.stop_tokens
        self._logprobs += job.params.logprobs is not None
        self.jobs.append(job)
        self._rows[row, 0] = -1 if job.slot is None else job.slot
        self._rows[row, 1] = job.computed
        self._capacity[row] = capacity
        self._left[row] = job.max_output - len(job.output) - job.pending
        self._service[row] = 0.0
        self._horizon[row] = horizon * _ALL

    def remove(self, job: Job) -> float:
        """The job leaves; returns the seconds of its service that nobody has been told of."""
        row, last = job.row, len(self.jobs) - 1
        self.sync(job)
        service = float(self._service[row])
        if row != last:
            moved = self.jobs[row] = self.jobs[last]
            moved.row = row
            for column in (self._rows, self._capacity, self._left, self._service, self._horizon):
                column[row] = column[last]
        self.jobs.pop()
        self._logprobs -= job.params.logprobs is not None
        job.batch, job.row = None, -1
        return service

    def sync(self, job: Job) -> None:
        """Bring `computed` and `served` of the job up to date; they are not while it decodes."""
        job.computed = int(self._rows[job.row, 1])
        job.served = max(job.served, job.computed)

    def growing(self) -> list[int]:
        """Places of the jobs that need another block for their next token."""
        count = len(self.jobs)
        return (self._rows[:count, 1] >= self._capacity[:count]).nonzero()[0].tolist()

    def blocks(self, block_size: int) -> int:
        """How many blocks the jobs hold."""
        return int(self._capacity[: len(self.jobs)].sum()) // block_size

    def grew(self, row: int, capacity: int) -> None:
        self._capacity[row] = capacity

    def position(self, row: int) -> int:
        return int(self._rows[row, 1])

    def advance(self) -> Int32Array:
        """One token for everybody: the rows of the plan [count, 4]."""
        count = len(self.jobs)
        plan = self._rows[:count].copy()
        position = self._rows[:count, 1]
        position += 1
        self._service[:count] += self._cost.decode_each(position)
        self._left[:count] -= 1
        return plan

    def exhausted(self) -> list[Job]:
        """The jobs whose last possible token is now being sampled."""
        jobs = self.jobs
        return [jobs[row] for row in (self._left[: len(jobs)] <= 0).nonzero()[0].tolist()]

    def take_service(self, *, everyone: bool = False) -> list[tuple[Job, float]]:
        """The jobs whose service must be reported, or all, up to date, and the seconds of it.

        It counts as reported from here on.
        """
        count = len(self.jobs)
        rows = np.arange(count) if everyone else (self._service[:count] >= self._horizon[:count]).nonzero()[0]
        jobs = [self.jobs[row] for row in rows.tolist()]
        for job, position in zip(jobs, self._rows[rows, 1].tolist(), strict=True):
            job.computed = position
            job.served = max(job.served, position)
        services = self._service[rows].tolist()
        self._service[rows] = 0.0
        return list(zip(jobs, services, strict=True))

    def set_horizons(self, horizons: Sequence[tuple[Job, float]]) -> None:
        """When the service of these jobs must be reported (Policy.horizon)."""
        if horizons:
            self._horizon[[job.row for job, _ in horizons]] = np.array([horizon for _, horizon in horizons]) * _ALL

    def unreported(self, job: Job) -> float:
        """Seconds of its service that nobody has been told of."""
        return float(self._service[job.row])
