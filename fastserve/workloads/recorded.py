"""A trace file as a workload: as it happened, faster or slower, or only its lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from ..types import InvalidRequest
from .checks import check_real
from .job import SimJob
from .lengths import Empirical
from .programs import calls_of
from .synthetic import MAX_RATE, MIN_RATE
from .traces import TraceShape, nominal_rate, read_trace, shape_of


@dataclass(frozen=True)
class Recorded:
    """The first `limit` jobs of a trace, or all of them. The file is read anew, line by line, whenever it is asked."""

    path: Path
    limit: int | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def shape(self) -> TraceShape:
        """Raises InvalidRequest when there is no job."""
        shape = shape_of(islice(read_trace(self.path), self.limit))
        if not shape.jobs:
            raise InvalidRequest("trace", f"{self.path} holds no job with output")
        return shape

    @property
    def longest(self) -> int:
        """No job has more tokens than this, prompt and output together."""
        return self.shape.longest

    def jobs(self, seed: int, count: int, rate: float | None) -> Iterator[SimJob]:
        """The first `count` jobs, stretched in time so that all jobs of the trace come at `rate` a second.

        Where the trace says what rate its times stand for, that becomes `rate`. None: at the trace's own rate. There
        is nothing random, so the seed changes nothing. Raises InvalidRequest for a rate that is not above 0, or where
        all jobs arrive at once and there is nothing to stretch.
        """
        jobs = islice(read_trace(self.path), count if self.limit is None else min(count, self.limit))
        if rate is None:
            return jobs
        check_real("rate", "jobs a second", rate, MIN_RATE, MAX_RATE)
        own = nominal_rate(self.path) or self.shape.rate
        if own is None:
            raise InvalidRequest(
                "rate", f"{self.path} cannot be stretched to a rate or a load: all its jobs arrive at once"
            )
        stretch = own / rate
        return (replace(job, arrival=job.arrival * stretch) for job in jobs)

    def lengths(self) -> Empirical:
        """Its pairs of prompt and output tokens, to draw from."""
        jobs = islice(read_trace(self.path), self.limit)
        numbers = (n for job in jobs for call in calls_of(job) for n in (call.prompt_tokens, call.output_tokens))
        pairs = np.fromiter(numbers, np.int64).reshape(-1, 2)
        return Empirical(self.name, pairs[:, 0], pairs[:, 1])
