"""A run recorded plan by plan, and run again on the virtual clock: what the simulator decides is what was decided.

    real run:  Engine(config, recorder, cost, link=link, clock=recorder.clock, on_iteration=recorder.on_iteration)
    replay:    replay(recorder.recording(), config, cost, link=link)

Only times are taken from the recording (when jobs entered, when plans were submitted and completed), what jobs came
with, such as the output of an engine that is lost, and what came back from the device: tokens, finished copies, failed
rows. Who runs when, and in which blocks, is decided anew.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np

from ..config import SchedulerConfig
from ..cost import Cost, Link
from ..engine import Engine, IterationRecord
from ..types import BatchPlan, Executor, FinishReason, Float32Array, Int32Array, Job, StepResult
from .executor import VirtualClock

_VOCABULARY = 2**31 - 1


def plan_digest(plan: BatchPlan) -> str:
    """32 hexadecimal digits, equal for plans that are equal in every array."""
    hashed = hashlib.blake2b(digest_size=16)
    for column in fields(plan):
        value = np.asarray(getattr(plan, column.name))
        hashed.update(f"{column.name} {value.dtype.str} {value.shape} ".encode())
        hashed.update(np.ascontiguousarray(value).data)
    return hashed.hexdigest()


class ReplayDiverged(RuntimeError):
    """The engine did something else than it had done when it was recorded."""


@dataclass(slots=True)
class _Outcome:
    """What an IterationRecord does not tell of a plan."""

    digest: str
    errors: dict[int, str] = field(default_factory=dict)
    copies: Int32Array = field(default_factory=lambda: np.zeros(0, np.int32))
    copy_seconds: Float32Array = field(default_factory=lambda: np.zeros(0, np.float32))


class Entry(NamedTuple):
    """A job enters the engine: perhaps in the middle of its output, when an engine that had it before is lost."""

    when: float
    job: Job  # has ended since
    output: tuple[int, ...]  # that it came with
    waiting_since: float | None
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Recording:
    """A run that has ended."""

    entries: list[Entry]  # in order
    iterations: list[IterationRecord]
    outcomes: dict[int, _Outcome]  # by plan, those included of which there is no IterationRecord


class Recorder:
    """An Executor around another, with a clock around another, that remembers what passes through. See the module."""

    def __init__(self, executor: Executor, clock: Callable[[], float] = time.monotonic) -> None:
        self._executor = executor
        self._clock = clock
        self._read = -math.inf
        self._entries: list[Entry] = []
        self._iterations: list[IterationRecord] = []
        self._outcomes: dict[int, _Outcome] = {}

    def clock(self) -> float:
        self._read = self._clock()
        return self._read

    def entered(self, job: Job) -> Job:
        """To be told right after each Engine.add_job what that returned."""
        self._entries.append(Entry(self._read, job, tuple(job.output), job.waiting_since, job.metrics.cached_tokens))
        return job

    def on_iteration(self, record: IterationRecord) -> None:
        self._iterations.append(record)

    def submit(self, plan: BatchPlan) -> None:
        self._outcomes[plan.plan_id] = _Outcome(plan_digest(plan))
        self._executor.submit(plan)

    def poll(self, timeout: float | None) -> StepResult | None:
        result = self._executor.poll(timeout)
        if result is not None:
            outcome = self._outcomes[result.plan_id]
            outcome.errors = result.errors
            outcome.copies, outcome.copy_seconds = result.copies.copy(), result.copy_seconds.copy()
        return result

    def recording(self) -> Recording:
        return Recording(list(self._entries), list(self._iterations), dict(self._outcomes))


def replay(recording: Recording, config: SchedulerConfig, cost: Cost, *, link: Link | None = None) -> list[Job]:
    """Run a recording again and return its jobs as they ended this time, in the order in which they entered.

    The configuration, cost and link must be those that the engine was given when it was recorded.
    Raises ReplayDiverged, naming the plan, at the first that is not the recorded one to the last bit.
    """
    clock = VirtualClock()
    executor = _RecordedExecutor(recording, clock)
    engine = Engine(config, executor, cost, link=link, clock=clock)
    executor.engine = engine
    jobs: list[Job] = []
    happenings = executor.happenings
    while happenings or engine.has_work:
        if happenings and executor.is_next(happenings[0].when):
            happening = happenings.popleft()
            clock.now = happening.when
            entry = happening.entry
            if happening.reason is None:
                jobs.append(_enter(engine, entry))
            else:
                engine.abort(entry.job.job_id, happening.reason)
            continue
        executor.set_clock_for_planning()
        plans, polls = executor.submitted, executor.polls
        engine.step()
        if executor.submitted == plans and executor.polls == polls:
            raise ReplayDiverged(f"nothing was planned at {clock.now} s, and plan {plans + 1} was recorded")
    if executor.submitted < len(recording.outcomes):
        raise ReplayDiverged(f"the replay ended after {executor.submitted} of {len(recording.outcomes)} plans")
    return jobs


def _enter(engine: Engine, entry: Entry) -> Job:
    job = entry.job
    return engine.add_job(
        job.job_id,
        job.prompt,
        job.params,
        seed=job.seed,
        vocab_size=_VOCABULARY,
        eos_token_ids=job.stop_tokens,
        priority=job.priority,
        tenant=job.tenant,
        program=job.program,
        cache_salt=job.cache_salt,
        arrival=job.arrival,
        known_output=job.known_output,
        output=entry.output,
        waiting_since=entry.waiting_since,
        inherited=job.inherited,
        cached_tokens=entry.cached_tokens,
    )


@dataclass(frozen=True, slots=True)
class _Happening:
    """A job enters, or is ended from outside for `reason`."""

    when: float
    entry: Entry
    reason: FinishReason | None = None


class _RecordedExecutor:
    """Gives back what was recorded, at the time at which it was, and refuses any other plan."""

    engine: Engine

    def __init__(self, recording: Recording, clock: VirtualClock) -> None:
        enters = [_Happening(entry.when, entry) for entry in recording.entries]
        ends = [
            _Happening(job.metrics.finish, entry, job.finish_reason)
            for entry in recording.entries
            if (job := entry.job).metrics.finish is not None
            and job.finish_reason is not None
            and not _ended_by_itself(job)
        ]
        self.happenings = deque(sorted(enters + ends, key=lambda happening: happening.when))
        self.submitted = 0
        self.polls = 0
        self._clock = clock
        self._outcomes = recording.outcomes
        self._records = {record.plan_id: record for record in recording.iterations}
        self._unsubmitted = deque(recording.iterations)
        self._recorded_jobs = {entry.job.job_id: entry.job for entry in recording.entries}
        self._in_flight: deque[tuple[BatchPlan, list[Job | None]]] = deque()
        self._slots: dict[int, Job] = {}  # recorded jobs by their slot

    # Where times are equal, a completion comes before what happens to jobs, and that before the next plan.

    def is_next(self, when: float) -> bool:
        """Whether something that happens to a job then comes before the next plan and the next result."""
        return when < self._next_completion() and (not self._unsubmitted or when <= self._unsubmitted[0].submitted)

    def set_clock_for_planning(self) -> None:
        """If the next thing recorded is a plan, it was made then; else the engine will find nothing to plan."""
        if self._unsubmitted:
            when = self._unsubmitted[0].submitted
            if when < self._next_completion() and not (self.happenings and self.is_next(self.happenings[0].when)):
                self._clock.now = when

    def submit(self, plan: BatchPlan) -> None:
        recorded = self._outcomes.get(plan.plan_id)
        record = self._records.get(plan.plan_id)
        punctual = record is None or record.submitted == self._clock.now
        if recorded is None or recorded.digest != plan_digest(plan) or not punctual:
            was = "" if record is None else f", made at {record.submitted} s for jobs {', '.join(record.job_ids)}"
            raise ReplayDiverged(f"plan {plan.plan_id} at {self._clock.now} s is not the one recorded{was}")
        self.submitted += 1
        opened = set(plan.opened[:, 0].tolist())
        if opened:
            for job in self.engine.jobs:
                if job.slot is not None and job.slot in opened:
                    self._slots[job.slot] = self._recorded_jobs[job.job_id]
        sampling = plan.rows[plan.rows[:, 3] > 0]
        self._in_flight.append((plan, [self._slots.get(slot) for slot in sampling[:, 0].tolist()]))
        if record is not None:
            self._unsubmitted.popleft()
            self.set_clock_for_planning()

    def poll(self, timeout: float | None) -> StepResult | None:
        self.polls += 1
        if self.happenings and self.is_next(self.happenings[0].when):
            return None
        plan, jobs = self._in_flight.popleft()
        record, outcome = self._records.get(plan.plan_id), self._outcomes[plan.plan_id]
        if record is not None:
            self._clock.now = record.completed
        sampling = plan.rows[plan.rows[:, 3] > 0]
        ends = (sampling[:, 1] + sampling[:, 2]).tolist()
        samples = len(ends)
        return StepResult(
            plan_id=plan.plan_id,
            tokens=np.array([_token(job, end) for job, end in zip(jobs, ends, strict=True)], np.int32),
            logprobs=np.full(samples, np.nan, np.float32),
            top_tokens=np.zeros((samples, 0), np.int32),
            top_logprobs=np.zeros((samples, 0), np.float32),
            seconds=0.0 if record is None else record.seconds,
            errors=outcome.errors,
            copies=outcome.copies,
            copy_seconds=outcome.copy_seconds,
        )

    def _next_completion(self) -> float:
        if not self._in_flight:
            return math.inf
        record = self._records.get(self._in_flight[0][0].plan_id)
        return self._clock.now if record is None else record.completed


def _token(job: Job | None, end: int) -> int:
    """What the job sampled after position end - 1; anything where it had ended already."""
    index = math.inf if job is None else end - len(job.prompt)
    return job.output[int(index)] if job is not None and index < len(job.output) else 0


def _ended_by_itself(job: Job) -> bool:
    """By a token, a limit or an error of its own; else somebody called Engine.abort."""
    if job.finish_reason is FinishReason.ERROR:
        return True
    stopped = bool(job.output) and job.output[-1] in job.stop_tokens and len(job.output) > job.params.min_tokens
    return stopped or len(job.output) >= job.max_output
