"""The jobs that decode in every iteration until something happens, as parallel arrays.

A batch changes little from one iteration to the next: thousands of times a second every row moves on by one token, and
now and then a job joins or leaves. So the rows live in arrays, in the layout in which a plan wants them, and what an
iteration does to all of them is a handful of array operations instead of a loop over jobs.
"""

from __future__ import annotations

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
        self.version = -1  # of the decision that made the batch
        self.stop_tokens: frozenset[int] = frozenset()  # tokens that end one job or another, those that left included
        self._cost = cost
        self._logprobs = 0  # jobs that ask for some
        self._rows = np.ones((limit, 4), np.int32)  # slot, position, 1, 1: as in BatchPlan.rows
        self._capacity = np.zeros(limit, np.int32)  # positions for which the job has blocks
        self._left = np.zeros(limit, np.int32)  # tokens it may still sample
        self._service = np.zeros(limit)  # seconds not reported to the policy
        self._horizon = np.zeros(limit)  # seconds at which it must be
        self._expired = np.zeros(0, np.intp)  # rows that are about to get another horizon

    @property
    def logprobs(self) -> bool:
        """Whether a job asks for some."""
        return self._logprobs > 0

    def __len__(self) -> int:
        return len(self.jobs)

    def extend(self, jobs: list[Job], capacities: list[int], horizons: list[float]) -> None:
        """Jobs with one token to compute join. They have blocks for `capacities` positions; see Policy.horizon."""
        if not jobs:
            return
        first = len(self.jobs)
        self.jobs += jobs
        rows = slice(first, len(self.jobs))
        stop_tokens = self.stop_tokens
        for row, job in enumerate(jobs, first):
            job.batch, job.row = self, row
            if not job.stop_tokens <= stop_tokens:
                stop_tokens |= job.stop_tokens
            self._logprobs += job.params.logprobs is not None
        if len(stop_tokens) > _MANY_STOP_TOKENS and stop_tokens is not self.stop_tokens:
            stop_tokens = frozenset().union(*(job.stop_tokens for job in self.jobs))
        self.stop_tokens = stop_tokens
        self._rows[rows, 0] = [-1 if job.slot is None else job.slot for job in jobs]
        self._rows[rows, 1] = [job.computed for job in jobs]
        self._capacity[rows] = capacities
        self._left[rows] = [job.max_output - len(job.output) - job.pending for job in jobs]
        self._service[rows] = 0.0
        self._horizon[rows] = horizons
        self._horizon[rows] *= _ALL

    def remove(self, leavers: list[Job]) -> list[float]:
        """Jobs leave; returns the seconds of each one's service that nobody has been told of.

        The last row takes the place of each in turn.
        """
        if not leavers:
            return []
        jobs = self.jobs
        left = [job.row for job in leavers]
        origin = list(range(len(jobs)))
        positions = self.positions(left)
        services: list[float] = self._service[left].tolist()
        for job, position in zip(leavers, positions, strict=True):
            last = jobs.pop()
            moved_from = origin.pop()
            if last is not job:
                jobs[job.row], origin[job.row] = last, moved_from
                last.row = job.row
            job.batch, job.row = None, -1
            _reached(job, position)
            self._logprobs -= job.params.logprobs is not None
        into = [row for row in left if row < len(origin) and origin[row] != row]
        if into:
            to, moved = np.array(into), np.array([origin[row] for row in into])
            for column in (self._rows, self._capacity, self._left, self._service, self._horizon):
                column[to] = column[moved]
        return services

    def sync(self, job: Job) -> None:
        """Bring `computed` and `served` of the job up to date; they are not while it decodes."""
        _reached(job, self.position(job.row))

    def growing(self) -> list[int]:
        """Places of the jobs that need another block for their next token."""
        count = len(self.jobs)
        return (self._rows[:count, 1] >= self._capacity[:count]).nonzero()[0].tolist()

    def blocks(self, block_size: int) -> int:
        """How many blocks the jobs hold."""
        return int(self._capacity[: len(self.jobs)].sum()) // block_size

    def grew(self, rows: list[int], positions: int) -> None:
        """Each of the rows got a block, of that many positions."""
        self._capacity[rows] += positions

    def position(self, row: int) -> int:
        return int(self._rows[row, 1])

    def positions(self, rows: list[int]) -> list[int]:
        positions: list[int] = self._rows[rows, 1].tolist()
        return positions

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

    def expired(self) -> tuple[list[Job], list[float]]:
        """The jobs whose service must be reported, up to date, and how much it is; it counts as reported from here on.

        `renew` follows, with their new horizons.
        """
        count = len(self.jobs)
        self._expired = (self._service[:count] >= self._horizon[:count]).nonzero()[0]
        if not len(self._expired):
            return [], []
        jobs = [self.jobs[row] for row in self._expired.tolist()]
        for job, position in zip(jobs, self._rows[self._expired, 1].tolist(), strict=True):
            _reached(job, position)
        services: list[float] = self._service[self._expired].tolist()
        self._service[self._expired] = 0.0
        return jobs, services

    def renew(self, horizons: list[float]) -> None:
        """New horizons for those that `expired` named; nobody has joined or left since."""
        self._horizon[self._expired] = horizons
        self._horizon[self._expired] *= _ALL

    def unreported(self, job: Job) -> float:
        """Seconds of its service that nobody has been told of."""
        return float(self._service[job.row])


def _reached(job: Job, position: int) -> None:
    job.computed = position
    if position > job.served:
        job.served = position
