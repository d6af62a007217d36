"""What is sent when: jobs of a trace or drawn at random, and their arrivals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np

from ...types import InvalidRequest
from ...workloads import Recorded, SimJob, calls_of, parse_arrivals, parse_load
from ...workloads.arrivals import Arrivals, Gamma, Poisson
from ...workloads.checks import check_count, check_real
from ...workloads.synthetic import MAX_RATE, MIN_RATE

ARRIVALS: Final = ("poisson", "gamma", "trace", "all-at-once")
DEFAULT_JOBS: Final = 100
DEFAULT_RATE: Final = 1.0  # jobs a second
MAX_JOBS: Final = 1_000_000
MAX_TOKENS: Final = 2**20  # of a prompt: it is made and sent


@dataclass(frozen=True, slots=True)
class Plan:
    """A load, at any rate: jobs are the same at all of them, and only come closer together.

    `arrival` is one of ARRIVALS, or gamma:CV or burst:SIZE as `fastserve simulate` has them.
    """

    trace: Path | None = None
    workload: str | None = None  # sharegpt, where there is no trace either
    num_jobs: int | None = None
    arrival: str | None = None  # the trace's where there is one, else poisson
    cv: float | None = None  # of gamma
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trace is not None and self.workload is not None:
            raise InvalidRequest("workload", "cannot be given with --trace, which has its own lengths")
        if self.num_jobs is not None:
            check_count("num_jobs", "the number of jobs", self.num_jobs, 1, MAX_JOBS)
        check_count("seed", "a seed", self.seed, 0, 2**63 - 1)
        if self.kind == "trace" and self.trace is None:
            raise InvalidRequest("arrival", "trace needs a file: --trace FILE")
        if self.cv is not None and self.kind != "gamma":
            raise InvalidRequest("cv", f"goes with --arrival gamma; the arrivals are {self.kind}")
        self._process()

    @property
    def kind(self) -> str:
        return self.arrival or ("poisson" if self.trace is None else "trace")

    @property
    def name(self) -> str:
        what = self.trace.name if self.trace is not None else self.workload or "sharegpt"
        process = self._process()
        return f"{what}, {self.kind if process is None else process.name}"

    @property
    def has_rate(self) -> bool:
        return self.kind != "all-at-once"

    def jobs(self, rate: float | None) -> list[SimJob]:
        """In order of arrival, at `rate` jobs a second; None: the trace's own, or DEFAULT_RATE.

        Of programs, the first calls: the others are behind them, and count.

        Raises InvalidRequest for a rate out of range, a trace that cannot be read or holds too few jobs.
        """
        if rate is not None:
            check_real("rate", "jobs a second", rate, MIN_RATE, MAX_RATE)
        process = self._process()
        if self.trace is None:
            count = self.num_jobs or DEFAULT_JOBS
            source = parse_load(self.workload or "sharegpt", process or Poisson())
            jobs = list(source.jobs(self.seed, count, rate or DEFAULT_RATE))
        else:
            jobs = self._recorded(self.trace, rate if self.kind == "trace" else None)
            if process is not None:
                jobs = _rescheduled(jobs, process, rate or DEFAULT_RATE, self.seed)
        if self.kind == "all-at-once":
            jobs = [replace(job, arrival=0.0) for job in jobs]
        longest = max(call.prompt_tokens for job in jobs for call in calls_of(job))
        if longest > MAX_TOKENS:
            raise InvalidRequest("trace", f"has a prompt of {longest} tokens; at most {MAX_TOKENS} can be sent")
        return jobs

    def _recorded(self, trace: Path, rate: float | None) -> list[SimJob]:
        jobs = list(islice(Recorded(trace).jobs(self.seed, self.num_jobs or MAX_JOBS, rate), self.num_jobs or MAX_JOBS))
        if not jobs:
            raise InvalidRequest("trace", f"{trace} holds no job with output")
        if self.num_jobs is not None and len(jobs) < self.num_jobs:
            raise InvalidRequest("num_jobs", f"must be at most {len(jobs)}, the number of jobs in {trace}")
        return jobs

    def _process(self) -> Arrivals | None:
        """None: the trace's times, or none. Raises InvalidRequest."""
        if self.kind in ("trace", "all-at-once"):
            return None
        try:
            return Gamma(1.0 if self.cv is None else self.cv) if self.kind == "gamma" else parse_arrivals(self.kind)
        except InvalidRequest as error:
            what = str(error).removeprefix(f"{error.field}: ")
            if self.kind == "gamma":
                raise InvalidRequest("cv", what) from None
            if ":" not in self.kind:
                what = f"must be one of {', '.join(ARRIVALS)}, gamma:CV, burst:SIZE; got {self.kind!r}"
            raise InvalidRequest("arrival", what) from None


def _rescheduled(jobs: list[SimJob], process: Arrivals, rate: float, seed: int) -> list[SimJob]:
    """The same jobs in the same order, with other times; the first arrives at 0."""
    gaps = process.gaps(np.random.default_rng(seed), 0, len(jobs) - 1)
    times = np.concatenate(([0.0], np.cumsum(gaps))) / rate
    return [replace(job, arrival=time) for job, time in zip(jobs, times.tolist(), strict=True)]
