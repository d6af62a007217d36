"""The engine: jobs in, one iteration a step, tokens out."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import index

from .config import SchedulerConfig, check_integer
from .cost import Cost, Link
from .integrity import check_integrity
from .planning import Iteration
from .scheduler import Scheduler
from .types import (
    MAX_SEED,
    Executor,
    FinishReason,
    InvalidRequest,
    Job,
    JobMetrics,
    JobUpdate,
    LazyTokens,
    SamplingParams,
    StepResult,
)

__all__ = ["Engine", "Executor", "IterationRecord"]


@dataclass(frozen=True, slots=True)
class IterationRecord:
    """What one iteration was, for timelines and statistics. Times are seconds on the engine's clock."""

    plan_id: int
    submitted: float
    completed: float
    seconds: float  # on the device
    job_ids: tuple[str, ...]
    levels: tuple[int, ...]  # of those jobs when it was planned; 0 for policies without levels
    prefill_tokens: int
    decode_tokens: int
    waiting: int  # live jobs that were not in it
    free_blocks: int
    copied_blocks: int = 0  # KV blocks in the copies it started
    copies: tuple[int, ...] = ()  # copies it acknowledged
    copy_seconds: tuple[float, ...] = ()  # what each took on its stream


class Engine:
    """Runs jobs on an executor, one iteration at a time. Not thread-safe: one thread makes every call.

    Raises InvalidRequest when the configuration names an unknown policy.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        executor: Executor,
        cost: Cost,
        *,
        link: Link | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_iteration: Callable[[IterationRecord], None] | None = None,
    ) -> None:
        self.config = config
        self.scheduler = Scheduler(config, cost, link)
        self.scheduler.record_levels = on_iteration is not None
        self._executor = executor
        self._clock = clock
        self._on_iteration = on_iteration
        self._jobs_added = 0

    def add_job(
        self,
        job_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        seed: int,
        vocab_size: int,
        eos_token_ids: Collection[int] = (),
        priority: int = 0,
        tenant: str = "",
        program: str | None = None,
        cache_salt: str = "",
        arrival: float | None = None,
        known_output: int | None = None,
        output: Sequence[int] = (),
        waiting_since: float | None = None,
        inherited: float = 0.0,
        cached_tokens: int = 0,
    ) -> Job:
        """Queue one prompt for one output (`params.n` is the caller's business). `arrival` is on the engine's clock.

        `tenant` is whose job it is, `program` what it is a call of, and KV is shared between jobs of one tenant and one
        `cache_salt`.
        `known_output`, how many tokens it will put out unless a limit ends it before, is for policies that are oracles.
        `output` is what an engine that is lost had put out already: the job goes on behind it, with the tokens that
        the other engine would have sampled next. Updates, logprobs and metrics are of what comes from here on.
        `waiting_since`: when that engine had put out the last of it (None: now), for policies that let nobody starve.
        `cached_tokens`: of the prompt, what it had found in its cache, which is never charged.
        `inherited`: modelled seconds that earlier calls of the program were served, in other engines, too.

        Raises InvalidRequest, before anything changes, for an empty prompt or one that fills the context, a token id
        outside the vocabulary, an id in use, min_tokens where every token is a stop token, an output that is complete,
        cached tokens of a job without output or as many as its prompt has, and a job that can never fit in the KV pool.
        """
        tokens = _checked_tokens("prompt", prompt, vocab_size)
        if not tokens:
            raise InvalidRequest("prompt", "must hold at least one token")
        if len(tokens) >= self.config.max_model_len:
            raise InvalidRequest(
                "prompt",
                f"has {len(tokens)} tokens; with room for one of output, the context of {self.config.max_model_len} "
                f"tokens allows {self.config.max_model_len - 1}",
            )
        if not 0 <= seed <= MAX_SEED:
            raise InvalidRequest("seed", f"must be between 0 and {MAX_SEED}, got {seed}")
        _checked_tokens("logit_bias", params.logit_bias, vocab_size)
        stops = _checked_tokens("stop_token_ids", params.stop_token_ids, vocab_size)
        stop_tokens = frozenset(stops if params.ignore_eos else [*stops, *eos_token_ids])
        if params.min_tokens > 0 and sum(token < vocab_size for token in stop_tokens) == vocab_size:
            raise InvalidRequest(
                "min_tokens",
                f"must be 0 when every one of the {vocab_size} tokens stops the output; got {params.min_tokens}",
            )
        now = self._clock()
        max_output = self._max_output(len(tokens), params.max_tokens)
        so_far = _unfinished(_checked_tokens("output", output, vocab_size), max_output, stop_tokens, params.min_tokens)
        check_integer("cached_tokens", cached_tokens, 0, len(tokens) - 1 if so_far else 0)
        job = Job(
            job_id=job_id,
            prompt=tokens,
            params=params,
            seed=seed,
            arrival=now if arrival is None else arrival,
            max_output=max_output,
            stop_tokens=stop_tokens,
            index=self._jobs_added,
            priority=priority,
            tenant=tenant,
            program=program,
            cache_salt=cache_salt,
            known_output=None if known_output is None else min(known_output, max_output),
            output=so_far,
            waiting_since=waiting_since,
            inherited=inherited,
        )
        job.metrics = JobMetrics(job.arrival, cached_tokens=cached_tokens)
        self.scheduler.add(job, now)
        self._jobs_added += 1
        return job

    def abort(self, job_id: str, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a job in whatever state it is; False when it is unknown or has finished. It gets no further update."""
        aborted = self.scheduler.abort(job_id, self._clock(), reason)
        self._settle()
        return aborted

    def step(self, timeout: float | None = None) -> list[JobUpdate]:
        """Keep the executor supplied, wait for one result and apply it.

        Returns the jobs that got a token, and those that failed, without one. Returns nothing when there is nothing to
        do, when `timeout` seconds (None: no limit) passed without a result, and after an iteration in which no job
        reached its next token. Lets through what the executor raises; the engine is of no use after that.
        """
        in_flight = self.scheduler.in_flight
        while len(in_flight) < self.config.max_in_flight and (plan := self.scheduler.schedule(self._clock())):
            self._executor.submit(plan)
        if not in_flight or (result := self._executor.poll(timeout)) is None:
            return []
        iteration, now = in_flight[0], self._clock()
        updates = self.scheduler.complete(result, now)
        if self._on_iteration is not None:
            self._on_iteration(_record(iteration, result, now))
        self._settle()
        return updates

    @property
    def has_work(self) -> bool:
        """Whether a step would do something. False: every job has ended, and the executor holds nothing of any."""
        return bool(self.scheduler.jobs or self.scheduler.in_flight)

    @property
    def jobs(self) -> Collection[Job]:
        """The live jobs, in order of arrival."""
        return self.scheduler.jobs.values()

    def check_integrity(self) -> None:
        """Raise RuntimeError when a block, a slot or a job is lost, doubled or leaked. For tests; O(everything)."""
        check_integrity(self.scheduler)

    def _settle(self) -> None:
        """When the last job has left, have its slot closed, and wait for KV that is still moving."""
        while not self.has_work and (plan := self.scheduler.schedule(self._clock())) is not None:
            self._executor.submit(plan)
            while (result := self._executor.poll(None)) is None:
                pass
            self.scheduler.complete(result, self._clock())

    def _max_output(self, prompt_tokens: int, max_tokens: int | None) -> int:
        room = self.config.max_model_len - prompt_tokens
        if max_tokens is not None:
            return min(max_tokens, room)
        # Until the context is full: the context that this KV pool can hold. An explicit max_tokens is never cut to it.
        pool = self.config.num_blocks * self.config.block_size
        return max(1, min(room, pool - prompt_tokens + 1))


def _checked_tokens(name: str, tokens: Collection[int], vocab_size: int) -> Sequence[int]:
    """As plain integers. Raises InvalidRequest for what is not a token id of the vocabulary."""
    if isinstance(tokens, range):  # as simulators give prompts of which only the length matters
        if tokens and not 0 <= min(tokens[0], tokens[-1]) <= max(tokens[0], tokens[-1]) < vocab_size:
            raise InvalidRequest(name, f"holds token ids outside the vocabulary, which ends at {vocab_size - 1}")
        return tokens
    if isinstance(tokens, LazyTokens):  # nor are these written down
        if tokens.bound > vocab_size:
            raise InvalidRequest(name, f"may hold {tokens.bound - 1}, and the vocabulary ends at {vocab_size - 1}")
        return tokens
    try:
        ids = [index(token) for token in tokens]
    except TypeError as error:
        raise InvalidRequest(name, f"must hold token ids, which are integers: {error}") from None
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise InvalidRequest(name, f"holds the token id {wrong}, and the vocabulary ends at {vocab_size - 1}")
    return ids


def _unfinished(output: Sequence[int], max_output: int, stop_tokens: Collection[int], min_tokens: int) -> list[int]:
    """A list of its own. Raises InvalidRequest for an output to which nothing can be added."""
    if len(output) >= max_output:
        raise InvalidRequest("output", f"is complete: it has {len(output)} tokens, and the job ends at {max_output}")
    stop = next((token for token in output[min_tokens:] if token in stop_tokens), None)
    if stop is not None:
        raise InvalidRequest("output", f"is complete: it holds {stop}, which ends it")
    return list(output)


def _record(iteration: Iteration, result: StepResult, now: float) -> IterationRecord:
    prefill = sum(row.tokens for row in iteration.prefills if row.start < len(row.job.prompt))
    rest = sum(row.tokens for row in iteration.prefills) - prefill
    return IterationRecord(
        plan_id=iteration.plan_id,
        submitted=iteration.scheduled,
        completed=now,
        seconds=result.seconds,
        job_ids=tuple(job.job_id for job in iteration.jobs),
        levels=iteration.levels,
        prefill_tokens=prefill,
        decode_tokens=len(iteration.decodes) + rest,
        waiting=iteration.waiting,
        free_blocks=iteration.free_blocks,
        copied_blocks=iteration.copied_blocks,
        copies=tuple(result.copies.tolist()),
        copy_seconds=tuple(result.copy_seconds.tolist()),
    )
