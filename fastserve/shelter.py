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


class Shelter:
    """Leaves out of one batch what would make its iterations too long for those who ask for little.

    Where rows are nearly free, as where reading the weights takes nearly all of an iteration, nothing is left out; nor
    where nobody who asks for little is in the batch.
    """

    def __init__(self, cost: Cost, policy: Policy, batch: DecodeRows) -> None:
        self.prefills: set[Job] = set()  # of those beyond their shares that have time, and ...
        self.spare = math.inf  # ... the seconds that there are for all of these
        self.full = False  # whether somebody was left out
        self._cost = cost
        self._policy = policy
        self._batch = batch

    def best(self, jobs: Iterator[Job], taken: Callable[[], list[Job]], limit: int) -> Iterator[Job]:
        """Of the policy's order, those that there is time for. `taken`: those of them that have rows by now."""
        for job in jobs:
            if self._policy.beyond:
                rows, beyond = taken(), chain((job,), jobs)
                if self._has_sheltered(rows):
                    yield from self._fitting(rows, beyond, limit)
                else:
                    yield from beyond
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
        rows = taken()
        if not self._has_sheltered(rows):
            yield from others
        elif not self.full:
            has_row = set(rows)
            yield from self._fitting(rows, (job for job in others if job not in has_row), limit)

    def _has_sheltered(self, rows: Iterable[Job]) -> bool:
        return any(map(self._policy.is_sheltered, rows))

    def _fitting(self, rows: Sequence[Job], jobs: Iterable[Job], limit: int) -> list[Job]:
        """Those of the jobs that have time beside `rows`, the best first, up to `limit` rows in all.

        The last of them may be a prefill for a part of which there is some.
        """
        within = [self._row(job) for job in rows if job.primed]
        if not within:  # no gaps between tokens to keep short, but somebody waits for the first
            within = [self._row(job) for job in rows]
        beyond = list(islice(jobs, limit - len(rows)))
        starts, tokens = np.array([*within, *map(self._row, beyond)], np.int32).T
        first = len(within)

        def seconds(count: int) -> float:
            return self._cost.plan_seconds(starts[: first + count], tokens[: first + count])

        most = (1 + _LENGTHENING) * seconds(0)
        fits = len(beyond)
        if seconds(fits) > most:
            fits = bisect_right(range(1, fits), most, key=seconds)
            self.full = True
            if not beyond[fits].primed:
                tokens[first + fits] = 1
                fits += seconds(fits + 1) <= most
        fitting = beyond[:fits]
        prefills = [job for job in fitting if not job.primed]
        if prefills:
            self.prefills.update(prefills)
            decodes = [*range(first), *(first + i for i, job in enumerate(fitting) if job.primed)]
            self.spare = min(self.spare, most - self._cost.plan_seconds(starts[decodes], tokens[decodes]))
        return fitting

    def _row(self, job: Job) -> tuple[int, int]:
        """Where it starts, and its tokens."""
        if job.batch is self._batch:
            return self._batch.position(job.row), 1
        return job.computed, job.known - job.computed
