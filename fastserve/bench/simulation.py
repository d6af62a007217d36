"""One simulated run and what it comes to: a workload at a rate under a policy, on a modelled deployment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

import numpy as np

from ..config import MAX_BLOCKS, SchedulerConfig
from ..cost import Cost, Link
from ..engine import IterationRecord
from ..simulator import simulate
from ..types import InvalidRequest, Job
from ..workloads.job import SimJob
from ..workloads.programs import calls_of, chained
from ..workloads.reuse import Reuse
from .runs import Span, job_spans
from .shares import Shares
from .stats import Stream

# Jobs that measure the capacity: enough for a heavy tail, and no more than memory holds all at once.
CAPACITY_JOBS = 20_000


class Workload(Protocol):
    """Synthetic, ProgramLoad or Recorded."""

    @property
    def name(self) -> str: ...

    @property
    def longest(self) -> int: ...

    def jobs(self, seed: int, count: int, rate: Any) -> Iterator[SimJob]: ...


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs of an experiment have in common. `config.policy` is replaced by each run's."""

    workload: Workload
    jobs: int
    config: SchedulerConfig
    cost: Cost
    link: Link | None = None
    pipeline_stages: int = 1
    block_bytes: int | None = None  # of one KV block on all devices together; None: unknown
    warmup_jobs: int = 0  # that many to arrive first are left out of the statistics
    program_ids: bool = True  # whether the engine is told which calls are of one program

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_jobs < self.jobs:
            raise InvalidRequest(
                "warmup_jobs", f"must leave some of the {self.jobs} jobs; between 0 and {self.jobs - 1}"
            )


@dataclass(frozen=True, slots=True)
class Point:
    """Where one run lies in the experiment."""

    policy: str
    rate: float | None  # jobs a second; None: a trace's own
    seed: int
    load: float | None = None  # rate ÷ capacity, where that was measured


@dataclass(frozen=True, slots=True)
class TimelineJob:
    """When one job was there and when it ran, in seconds."""

    job: int
    arrival: float
    finish: float
    spans: list[Span]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A run in numbers; the keys are those of the JSON. Seconds throughout.

    Latencies are those of `jobs` jobs, warm-up left out; everything from `preemptions` on counts the whole run.
    """

    policy: str
    workload: str
    rate: float | None
    load: float | None
    seed: int
    jobs: int
    mean_jct: float
    p50_jct: float
    p95_jct: float
    p99_jct: float
    max_jct: float
    mean_ttft: float
    p50_ttft: float
    p95_ttft: float
    p99_ttft: float
    mean_normalized_latency: float
    p50_normalized_latency: float
    p95_normalized_latency: float
    p99_normalized_latency: float
    mean_tpot: float | None  # None: no job has two tokens
    preemptions: int
    swapped_bytes: int | None  # both ways; None where a block's size is unknown
    swapped_blocks: int
    swap_seconds: float  # on the streams
    stall_seconds: float  # with a job alive and no iteration on the device
    recomputed_tokens: int
    iterations: int
    seconds: float  # from the first arrival to the last token
    busy_seconds: float
    mean_batch: float  # rows an iteration
    jobs_per_second: float
    output_tokens_per_second: float
    hit_rate: float | None = None  # tokens of prompts found in the cache; None: no prompt has content
    hit_rate_bound: float | None = None  # that a cache would find which forgot nothing
    programs: int | None = None  # None: no job is a call of one
    mean_program_completion: float | None = None  # from the arrival of the first call to the end of the last
    p95_program_completion: float | None = None
    users: dict[str, dict[str, float]] | None = None  # jobs, mean_jct and p95_jct of each, where jobs have users
    timeline: list[TimelineJob] | None = None

    @property
    def steady(self) -> bool:
        """Whether it is a sample of a steady state: not where work came as fast as it can be done, or faster."""
        return self.load is None or self.load < 1

    def as_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["finite_trace"] = not self.steady
        if self.timeline is None:
            del values["timeline"]
        else:
            values["timeline"] = [asdict(job) for job in self.timeline]
        return values


def run(
    setting: Setting, point: Point, *, timeline: bool = False, on_finished: Callable[[int], None] | None = None
) -> RunSummary:
    """Simulate one point. `on_finished` hears the number of jobs that have ended, whenever one has.

    Raises InvalidRequest for an option out of range, and for a job that exceeds the context or the KV blocks.
    """
    config = replace(setting.config, policy=point.policy)
    latencies, shares = _Latencies(setting.warmup_jobs), Shares(setting.warmup_jobs)
    reuse = Reuse(config.block_size)
    records: list[IterationRecord] = []
    ends: list[tuple[Job, float]] = []

    def on_finish(job: Job) -> None:
        latencies.add(job)
        if timeline:
            ends.append((job, job.metrics.finish or 0.0))
        if on_finished is not None:
            on_finished(latencies.finished)

    def watched() -> Iterator[SimJob]:
        for job in _fitting(setting.workload.jobs(point.seed, setting.jobs, point.rate), config):
            reuse.add(job)
            yield job

    totals = simulate(
        watched(),
        config,
        setting.cost,
        link=setting.link,
        pipeline_stages=setting.pipeline_stages,
        on_finish=on_finish,
        on_call=shares.add,
        program_ids=setting.program_ids,
        on_iteration=records.append if timeline else None,
    )
    if not latencies.counted:
        raise InvalidRequest("warmup_jobs", f"must be below {latencies.finished}, the number of jobs that came")
    swapped = totals.offloaded_blocks + totals.uploaded_blocks
    size = 0 if not swapped else setting.block_bytes
    return RunSummary(
        policy=point.policy,
        workload=setting.workload.name,
        rate=point.rate,
        load=point.load,
        seed=point.seed,
        **latencies.summary(),
        **shares.summary(),
        hit_rate=totals.cached_tokens / totals.prompt_tokens if reuse.has_content else None,
        hit_rate_bound=reuse.rate if reuse.has_content else None,
        preemptions=totals.preemptions,
        swapped_bytes=None if size is None else swapped * size,
        swapped_blocks=swapped,
        swap_seconds=totals.offload_seconds + totals.upload_seconds,
        stall_seconds=totals.stall_seconds,
        recomputed_tokens=totals.recomputed_tokens,
        iterations=totals.iterations,
        seconds=totals.seconds,
        busy_seconds=totals.busy_seconds,
        mean_batch=totals.rows / totals.iterations,
        jobs_per_second=latencies.finished / totals.seconds,
        output_tokens_per_second=latencies.output_tokens / totals.seconds,
        timeline=_timeline(ends, records) if timeline else None,
    )


def capacity(setting: Setting, seed: int, on_finished: Callable[[int], None] | None = None) -> float:
    """Jobs a second that fcfs gets done while there is more to do than fits in a batch.

    The jobs of this seed, at most CAPACITY_JOBS, all arrive at 0. The measurement ends when the last of them starts, so
    that the emptying batch of the end does not count; a job under way then counts for the part of its time that it has
    run. Where all start at once, there is no such moment, and it is the jobs over the whole time.

    Of programs, there are as many at once as fill two batches: when one ends, the next begins. Nobody thinks, and the
    measurement ends when the last job starts that had to wait.
    """
    config = replace(setting.config, policy="fcfs")
    spans: list[tuple[float, float, float]] = []

    def on_finish(job: Job) -> None:
        spans.append((job.arrival, job.metrics.first_scheduled or 0.0, job.metrics.finish or 0.0))
        if on_finished is not None:
            on_finished(len(spans))

    jobs = setting.workload.jobs(seed, min(setting.jobs, CAPACITY_JOBS), rate_for_lengths(setting.workload))
    simulate(
        _fitting(_at_once(jobs, 2 * config.max_num_seqs), config),
        config,
        setting.cost,
        link=setting.link,
        pipeline_stages=setting.pipeline_stages,
        on_finish=on_finish,
        program_ids=setting.program_ids,
    )
    arrivals, starts, finishes = np.array(spans).T
    until = float(starts[starts > arrivals].max(initial=0.0))
    if until <= 0:
        return len(spans) / float(finishes.max())
    done = np.clip((until - starts) / (finishes - starts), 0.0, 1.0)
    return float(done.sum()) / until


def _at_once(jobs: Iterable[SimJob], lanes: int) -> Iterator[SimJob]:
    """All jobs at 0; programs one after the other in that many lanes, which begin at 0."""
    programs: list[list[SimJob]] = []
    for job in jobs:
        if job.then is None:
            yield replace(job, arrival=0.0)
        else:
            programs.append([replace(call, arrival=0.0, think_time=0.0) for call in calls_of(job)])
    for lane in range(min(lanes, len(programs))):
        yield chained([call for program in programs[lane::lanes] for call in program])


def rate_for_lengths(workload: Workload) -> float | None:
    """A rate to ask a workload for its jobs with where only their lengths matter."""
    from ..workloads.recorded import Recorded

    return None if isinstance(workload, Recorded) else 1.0


def _fitting(jobs: Iterable[SimJob], config: SchedulerConfig) -> Iterator[SimJob]:
    """The same jobs. Raises InvalidRequest at one that the context or the KV blocks may turn out too small for."""
    held = config.num_blocks * config.block_size
    number = 0
    for job in jobs:
        for call in calls_of(job):
            number += 1
            tokens = call.prompt_tokens + call.output_tokens
            if tokens > config.max_model_len:
                raise InvalidRequest("max_model_len", f"must be at least {tokens}, the length of job {number}")
            # An output may become as long as its user allows, whatever length it turns out to have.
            if call.max_tokens is not None:
                tokens = min(call.prompt_tokens + call.max_tokens, config.max_model_len)
            if tokens - 1 > held:  # the last token's KV is never held
                raise _too_large(number, call, tokens, config)
        yield job


def _too_large(number: int, job: SimJob, tokens: int, config: SchedulerConfig) -> InvalidRequest:
    """That job `number`, of up to `tokens`, may need more blocks than there are."""
    blocks = -(-(tokens - 1) // config.block_size)
    whose = f"job {number} of {tokens} tokens needs"
    if job.max_tokens is not None:
        limits = f"max_tokens {job.max_tokens}, in a context of {config.max_model_len}"
        whose = f"job {number} may need: a prompt of {job.prompt_tokens} tokens and {limits}"
    if blocks > MAX_BLOCKS:
        least = f"{-(-(tokens - 1) // MAX_BLOCKS)}, with at most {MAX_BLOCKS} KV blocks"
        return InvalidRequest("block_size", f"must be at least {least}, which {whose}")
    return InvalidRequest("kv_blocks", f"must be at least {blocks}, which {whose}")


class _Latencies:
    """JCT, TTFT, TPOT and normalized latency of the jobs that finish, the first to arrive left out."""

    def __init__(self, warmup_jobs: int) -> None:
        self.finished = 0
        self.output_tokens = 0
        self._warmup_jobs = warmup_jobs
        self._jct, self._ttft, self._tpot, self._normalized = Stream(), Stream(), Stream(), Stream()

    @property
    def counted(self) -> int:
        return len(self._jct)

    def add(self, job: Job) -> None:
        tokens, jct, ttft = len(job.output), job.metrics.jct, job.metrics.ttft
        self.finished += 1
        self.output_tokens += tokens
        if job.index < self._warmup_jobs or jct is None or ttft is None:
            return
        self._jct.add(jct)
        self._ttft.add(ttft)
        self._normalized.add(jct / tokens)
        if tokens > 1:
            self._tpot.add((jct - ttft) / (tokens - 1))

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = {"jobs": self.counted}
        for name, stream in (("jct", self._jct), ("ttft", self._ttft), ("normalized_latency", self._normalized)):
            summary[f"mean_{name}"] = stream.mean
            p50, p95, p99 = stream.percentiles(50, 95, 99)
            summary |= {f"p50_{name}": p50, f"p95_{name}": p95, f"p99_{name}": p99}
        return summary | {"max_jct": self._jct.maximum, "mean_tpot": self._tpot.mean if len(self._tpot) else None}


def _timeline(ends: list[tuple[Job, float]], records: list[IterationRecord]) -> list[TimelineJob]:
    spans = job_spans(records, gap=1e-9)
    jobs = [TimelineJob(job.index, job.arrival, finish, spans.get(job.job_id, [])) for job, finish in ends]
    return sorted(jobs, key=lambda job: job.job)
