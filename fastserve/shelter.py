"""How much longer an iteration may take for rows beyond their tenants' shares, beside those of who asks for little."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Final

import numpy as np

from .cost import Cost
from .decode_rows import DecodeRows
from .policies import Policy
from .types import Job

# As a part of what it takes without them.
_LENGTHENING: Final = 1 / 8

# Times that others are looked for in the place of those that cannot have rows.
_ROUNDS: Final = 16


class Shelter:
    """Leaves out of one batch what would make its iterations too long for those who ask for little.

    Where rows are nearly free, as where reading the weights takes nearly all of an iteration, nothing is left out; nor
    where nobody who asks for little is in the batch. For where several tenants have jobs.
    """

    def __init__(self, cost: Cost, policy: Policy, batch: DecodeRows) -> None:
        self.prefills: set[Job] = set()  # of those beyond their shares that have time, and ...
        self.spare = math.inf  # ... the seconds that there are for all of these
        self.full = False  # whether somebody was left out
        self._cost = cost
        self._policy = policy
        self._batch = batch
        self._tried: set[Job] = set()  # those beyond their shares that had time, whether or not they could have rows

    def best(self, jobs: Iterator[Job], taken: Callable[[], list[Job]], limit: int) -> Iterator[Job]:
        """Of the policy's order, those that there is time for. `taken`: those of them that have rows by now."""
        for job in jobs:
            if self._policy.beyond:
                yield from self._beside(chain((job,), jobs), taken, limit)
                return
            yield job

    def here(self, jobs: Iterable[Job], taken: Callable[[], list[Job]], limit: int) -> Iterator[Job]:
        """Of jobs whose KV is on the device, those who ask for little first, and of the others those there is time for.

        The policy's order has not come to most of them, and nobody knows which are within their shares.
        """
        others: list[Job] = []
        for job in jobs:
            if self._policy.is_small(job):
                yield job
            else:
                others.append(job)
        has_row = set(taken())
        yield from self._beside((job for job in others if job not in has_row), taken, limit)

    def _beside(self, jobs: Iterator[Job], taken: Callable[[], list[Job]], limit: int) -> Iterator[Job]:
        """Of jobs beyond their shares, those that there is time for beside the others that have rows.

        The time of those that cannot have a row, as their KV is away, is for the next.
        """
        rows = taken()
        within = [job for job in rows if job not in self._tried]
        if not any(map(self._policy.is_sheltered, within)):
            yield from jobs
            return
        # Where nobody decodes there are no gaps between tokens to keep short, but somebody waits for the first.
        within = [job for job in within if job.primed] or within
        left: list[Job] = []
        for _ in range(_ROUNDS):
            left += islice(jobs, limit - len(rows) - len(left))
            if not left:
                break
            beyond = [job for job in rows if job in self._tried]
            fitting, left = self._fitting(within, beyond, left)
            if not fitting:
                break
            self._tried.update(fitting)
            yield from fitting
            rows = taken()
            if left and set(rows).issuperset(fitting):
                break
        self.full = bool(left)

    def _fitting(
        self, within: Sequence[Job], beyond: Sequence[Job], jobs: Sequence[Job]
    ) -> tuple[list[Job], list[Job]]:
        """Those of the jobs that have time beside others `within` their shares and `beyond`, and those that have not.

        The last that has may be a prefill for a part of which there is some.
        """
        starts, tokens = np.array([self._row(job) for job in chain(within, beyond, jobs)], np.int32).T
        first = len(within) + len(beyond)

        def seconds(count: int) -> float:
            return self._cost.plan_seconds(starts[: first + count], tokens[: first + count])

        most = (1 + _LENGTHENING) * self._cost.plan_seconds(starts[: len(within)], tokens[: len(within)])
        fits = len(jobs)
        if seconds(fits) > most:
            fits = bisect_right(range(1, fits), most, key=seconds)
            if not jobs[fits].primed:
                tokens[first + fits] = 1
                fits += seconds(fits + 1) <= most
        decode = [*([True] * len(within)), *(job.primed for job in chain(beyond, jobs[:fits]))]
        if not all(decode):
            self.prefills.update(job for job in jobs[:fits] if not job.primed)
            rows = np.flatnonzero(decode)
            self.spare = most - self._cost.plan_seconds(starts[rows], tokens[rows])
        return list(jobs[:fits]), list(jobs[fits:])

    def _row(self, job: Job) -> tuple[int, int]:
        """Where it starts, and its tokens."""
        if job.batch is self._batch:
            return self._batch.position(job.row), 1
        return job.computed, job.known - job.computed
