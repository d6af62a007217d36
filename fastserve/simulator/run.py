"""A workload on the real engine, in virtual time."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, NamedTuple

from ..config import SchedulerConfig
from ..cost import Cost, Link
from ..engine import Engine, IterationRecord
from ..types import OFFLOAD, UPLOAD, InvalidRequest, Job, SamplingParams
from ..workloads.content import Answer, ContentPrompt, continues
from ..workloads.job import SimJob
from .executor import EOS, SimExecutor, VirtualClock

# Prompts without content are ranges, which hold no tokens, of a vocabulary in which every length is to be had.
_VOCABULARY: Final = 2**31 - 1
_FIRST_TOKEN: Final = 2  # 0 and 1 are what jobs sample

_PROGRESS_EVERY: Final = 1024  # iterations

# Every step runs an iteration or sees a copy finish, which takes time, or closes slots. This many that do not move the
# clock mean that nothing ever will.
_FUTILE_STEPS: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationTotals:
    """What a simulation did. Seconds are virtual, but for the last."""

    jobs: int  # that ended
    iterations: int
    seconds: float  # from 0, when a trace starts, to the end of the last iteration
    busy_seconds: float  # with an iteration on the device
    stall_seconds: float  # with a job alive and no iteration on the device
    rows: int
    prefill_tokens: int  # in rows that began in a prompt, recomputation included
    decode_tokens: int
    prompt_tokens: int  # of the jobs that ended
    cached_tokens: int  # of those, found in the cache
    recomputed_tokens: int
    preemptions: int
    offload_copies: int
    offloaded_blocks: int
    offload_seconds: float  # on the stream that does it
    upload_copies: int
    uploaded_blocks: int
    upload_seconds: float
    wall_seconds: float  # what the simulation took


def simulate(
    jobs: Iterable[SimJob],
    config: SchedulerConfig,
    cost: Cost,
    *,
    link: Link | None = None,
    pipeline_stages: int = 1,
    on_finish: Callable[[Job], None],
    on_call: Callable[[SimJob, Job], None] | None = None,
    on_iteration: Callable[[IterationRecord], None] | None = None,
    program_ids: bool = True,
    max_iterations: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> SimulationTotals:
    """Run the jobs, which come in order of arrival, until the last has ended or for `max_iterations`.

    Jobs are taken from the iterable as time reaches them and forgotten when they end, so memory is that of the live
    ones. Job number n, from 0, has `index` n and `job_id` str(n), and goes to `on_finish` with its metrics as soon as
    it has ended: by end-of-sequence after its output_tokens, or by length where max_tokens or the context ends it there
    or before. `on_call` hears of the same, with what the workload said of it. `progress` hears the virtual time every
    thousand iterations or so.

    What comes `then`, comes when its time has come after the job's end. Where its prompt continues the job's, it holds
    the tokens that the job put out. `program_ids`: whether the engine is told which calls are of one program.

    A pipeline of p stages has p plans in flight, whatever `config` says. Raises InvalidRequest for a job out of order
    and for one that the engine refuses; its number is the error's `request`.
    """
    if config.num_host_blocks and link is None:
        raise InvalidRequest("link", f"is needed to move KV blocks to the {config.num_host_blocks} of host memory")
    if pipeline_stages > 1:
        config = replace(config, max_in_flight=pipeline_stages, pipeline_parallel_size=pipeline_stages)
    started = time.perf_counter()
    run = _Run(config, cost, link, pipeline_stages, on_finish, on_call, on_iteration, program_ids)
    run.to_the_end(iter(jobs), math.inf if max_iterations is None else max_iterations, progress)
    return run.totals(time.perf_counter() - started)


class _Coming(NamedTuple):
    """A job that is to be added."""

    arrival: float
    number: int  # among those of the same time
    given: SimJob
    answers: tuple[Answer, ...] = ()  # in its prompt


class _Run:
    def __init__(
        self,
        config: SchedulerConfig,
        cost: Cost,
        link: Link | None,
        stages: int,
        on_finish: Callable[[Job], None],
        on_call: Callable[[SimJob, Job], None] | None,
        on_iteration: Callable[[IterationRecord], None] | None,
        program_ids: bool,
    ) -> None:
        self._clock = VirtualClock()
        self._executor = SimExecutor(cost, self._clock, link=link, stages=stages)
        self._engine = Engine(config, self._executor, cost, link=link, clock=self._clock, on_iteration=on_iteration)
        # With room for another plan in flight, an arrival need not wait for a result.
        self._interruptible = config.max_in_flight > 1
        self._on_finish = on_finish
        self._on_call = on_call
        self._program_ids = program_ids
        self._live: dict[int, _Coming] = {}  # by seed
        self._following: list[_Coming] = []  # heap of jobs that come after others
        self._taken = 0  # jobs taken from the workload
        self._added = 0  # and those that came after them, all that the engine has got
        self._latest_arrival = 0.0
        self._ended = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._preemptions = 0
        self._recomputed = 0

    def to_the_end(
        self, jobs: Iterator[SimJob], max_iterations: float, progress: Callable[[float], None] | None
    ) -> None:
        clock, executor, engine = self._clock, self._executor, self._engine
        self._take(jobs)
        report_at = _PROGRESS_EVERY
        futile_steps = 0
        following = self._following
        while executor.iterations < max_iterations:
            while following and following[0].arrival <= clock.now:
                coming = heapq.heappop(following)
                self._add(coming)
                if coming.number < 0:
                    self._take(jobs)
            if not engine.has_work:
                if not following:
                    return
                executor.skip_to(following[0].arrival)
                continue
            before = clock.now
            updates = engine.step(following[0].arrival - before if self._interruptible and following else None)
            for job, _ in updates:
                if job.finish_reason is not None:
                    self._finish(job)
            futile_steps = 0 if clock.now > before else futile_steps + 1
            if futile_steps == _FUTILE_STEPS:
                raise RuntimeError(f"at {before} s the scheduler runs none of the {len(engine.jobs)} live jobs")
            if progress is not None and executor.iterations >= report_at:
                report_at = executor.iterations + _PROGRESS_EVERY
                progress(clock.now)

    def totals(self, wall_seconds: float) -> SimulationTotals:
        executor, live = self._executor, [job.metrics for job in self._engine.jobs]
        offload, upload = executor.copies[OFFLOAD], executor.copies[UPLOAD]
        return SimulationTotals(
            jobs=self._ended,
            iterations=executor.iterations,
            seconds=self._clock.now,
            busy_seconds=executor.busy_seconds,
            stall_seconds=executor.idle_seconds,
            rows=executor.rows,
            prefill_tokens=executor.prefill_tokens,
            decode_tokens=executor.decode_tokens,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            recomputed_tokens=self._recomputed + sum(metrics.recomputed_tokens for metrics in live),
            preemptions=self._preemptions + sum(metrics.preemptions for metrics in live),
            offload_copies=offload.copies,
            offloaded_blocks=offload.blocks,
            offload_seconds=offload.seconds,
            upload_copies=upload.copies,
            uploaded_blocks=upload.blocks,
            upload_seconds=upload.seconds,
            wall_seconds=wall_seconds,
        )

    def _take(self, jobs: Iterator[SimJob]) -> None:
        """Put the next job of the workload, if there is one and it is in order, with those that are to come."""
        job = next(jobs, None)
        if job is None:
            return
        if not self._latest_arrival <= job.arrival < math.inf:
            after = f"{self._latest_arrival}, when the job before it does," if self._taken else "0"
            raise InvalidRequest("arrival", f"must not come before {after} got {job.arrival!r}", self._taken)
        self._latest_arrival = job.arrival
        self._taken += 1
        heapq.heappush(self._following, _Coming(job.arrival, -1, job))

    def _add(self, coming: _Coming) -> None:
        given, number = coming.given, self._added
        if given.output_tokens < 1:
            raise InvalidRequest("output_tokens", f"must be at least 1, got {given.output_tokens}", number)
        prompt: Sequence[int] = range(_FIRST_TOKEN, _FIRST_TOKEN + given.prompt_tokens)
        if given.content is not None:
            prompt = ContentPrompt(given, _FIRST_TOKEN, _VOCABULARY, coming.answers)
        try:
            job = self._engine.add_job(
                str(number),
                prompt,
                _params(given.max_tokens),
                seed=number,
                vocab_size=_VOCABULARY,
                eos_token_ids=(EOS,),
                priority=given.priority,
                tenant=given.user or "",
                program=given.program if self._program_ids else None,
                arrival=coming.arrival,
                known_output=given.output_tokens,
            )
        except InvalidRequest as error:
            raise InvalidRequest(error.field, str(error).removeprefix(f"{error.field}: "), number) from None
        self._added += 1
        if given.then is not None or self._on_call is not None:
            self._live[number] = coming
        # Where the limit comes no later than the end, the limit ends the job, and a policy that learns is told so.
        self._executor.expect(number, given.output_tokens if given.output_tokens < job.max_output else None)

    def _finish(self, job: Job) -> None:
        self._executor.forget(job.seed)
        self._ended += 1
        self._prompt_tokens += len(job.prompt)
        self._cached_tokens += job.metrics.cached_tokens
        self._preemptions += job.metrics.preemptions
        self._recomputed += job.metrics.recomputed_tokens
        self._on_finish(job)
        coming = self._live.pop(job.seed, None)
        if coming is None:
            return
        if self._on_call is not None:
            self._on_call(coming.given, job)
        if (following := coming.given.then) is not None:
            answers: tuple[Answer, ...] = ()
            if continues(coming.given, following):
                answers = (*coming.answers, Answer(len(job.prompt), len(job.output), job.output[-1]))
            arrival = self._clock.now + coming.given.think_time
            heapq.heappush(self._following, _Coming(arrival, job.seed, following, answers))


@lru_cache(maxsize=4096)
def _params(max_tokens: int | None) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens)
