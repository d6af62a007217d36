"""How much longer an iteration may take for rows beyond their tenants' shares, beside rows of those within theirs."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

import numpy as np

from .cost import Cost
from .decode_rows import DecodeRows
from .types import Job

# As a part of what it takes without them.
_LENGTHENING: Final = 1 / 8


class Shelter:
    """Tells which of the rows beyond have time in one iteration, and how much of it is left for their prefills.

    Where rows are nearly free, as where reading the weights takes nearly all of an iteration, all of them have.
    """

    def __init__(self, cost: Cost, batch: DecodeRows) -> None:
        self.prefills: set[Job] = set()  # of those that have time, and ...
        self.spare = math.inf  # ... the seconds that there are for all of these
        self.full = False  # whether somebody has none
        self._cost = cost
        self._batch = batch

    def fitting(self, rows: Sequence[Job], jobs: Iterable[Job], most: int) -> list[Job]:
        """Those of up to `most` jobs beyond their shares, the best first, that have time beside `rows`.

        The last of them may be a prefill for a part of which there is some.
        """
        within = [self._row(job) for job in rows if job.primed]
        if not within:  # no gaps between tokens to keep short, but somebody waits for the first
            within = [self._row(job) for job in rows]
        beyond = list(islice(jobs, most))
        starts, tokens = np.array([*within, *map(self._row, beyond)], np.int32).T
        first = len(within)

        def seconds(count: int) -> float:
            return self._cost.plan_seconds(starts[: first + count], tokens[: first + count])

        limit = (1 + _LENGTHENING) * seconds(0)
        fits = len(beyond)
        if seconds(fits) > limit:
            fits = bisect_right(range(1, fits), limit, key=seconds)
            self.full = True
            if not beyond[fits].primed:
                tokens[first + fits] = 1
                fits += seconds(fits + 1) <= limit
        fitting = beyond[:fits]
        self.prefills = {job for job in fitting if not job.primed}
        if self.prefills:
            decodes = [*range(first), *(first + i for i, job in enumerate(fitting) if job.primed)]
            self.spare = limit - self._cost.plan_seconds(starts[decodes], tokens[decodes])
        return fitting

    def _row(self, job: Job) -> tuple[int, int]:
        """Where it starts, and its tokens."""
        if job.batch is self._batch:
            return self._batch.position(job.row), 1
        return job.computed, job.known - job.computed
