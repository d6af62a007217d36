"""Who runs next: turns the policy's order into plans, and results into tokens.

    add ──▶ policy ──iter_best──▶ batches ──▶ schedule ──BatchPlan──▶ executor ──StepResult──▶ complete ──▶ updates
                                     │           │                                               │
                                     ▼ move      ▼ open, extend             release, acknowledge ▼
                                     ─────────────────────── Residency ───────────────────────────

Rows (`max_num_seqs`), tokens (`max_num_batched_tokens`) and blocks are three separate limits of an iteration. A job
left out of an iteration keeps its blocks and its slot until a job of higher priority needs them; swapping.py says what
happens then.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from .batches import Batches
from .charges import Charges
from .chunking import Chunks
from .config import SchedulerConfig
from .cost import Cost, Link, stage_cost
from .decode_rows import DecodeRows
from .planning import Iteration, PlanBuilder, Row
from .policies import create_policy
from .programs import Programs
from .residency import Residency
from .types import (
    BatchPlan,
    FinishReason,
    Int32Array,
    InvalidRequest,
    Job,
    JobUpdate,
    StepResult,
    TokenLogprobs,
)

_NO_ROWS: Int32Array = np.zeros((0, 4), np.int32)


class Scheduler:
    """Owns the live jobs, their blocks and their slots. Every method is valid in every state."""

    def __init__(self, config: SchedulerConfig, cost: Cost, link: Link | None = None) -> None:
        """`cost`: seconds through all stages of the pipeline. `link`: a first guess of how fast KV moves.

        Raises InvalidRequest for an unknown policy.
        """
        self.config = config
        self.cost = cost = stage_cost(cost, config.pipeline_parallel_size)
        self.programs = Programs()
        self.policy = create_policy(config, cost, self.programs)
        self.residency = Residency(config, self.policy, cost, link)
        self.blocks = self.residency.blocks
        self._charges = Charges(self.policy, self.programs, cost)
        self.jobs: dict[str, Job] = {}
        self.in_flight: deque[Iteration] = deque()
        self.record_levels = False  # whether iterations shall tell their jobs' levels
        self.recomputed_tokens = 0  # of all jobs there were
        self.batches = Batches(config, self.policy, cost, self.residency, self._charges, self.jobs)
        self._swapping = self.batches.swapping
        self._last_completed = -math.inf
        self._next_plan = 1

    def add(self, job: Job, now: float) -> None:
        """Take in a job. Raises InvalidRequest when its id is in use or when it can never fit in the KV pool."""
        if job.job_id in self.jobs:
            raise InvalidRequest("job_id", f"{job.job_id!r} is in use by a job that has not finished")
        # The last token sampled is never fed back, so its KV is never held.
        needed = self.blocks.blocks_for(len(job.prompt) + job.max_output - 1)
        if needed > self.blocks.num_blocks:
            alone = self.blocks.blocks_for(len(job.prompt))
            raise InvalidRequest(
                "prompt" if alone > self.blocks.num_blocks else "max_tokens",
                f"a prompt of {len(job.prompt)} tokens and up to {job.max_output} of output need {needed} KV blocks of "
                f"{self.blocks.block_size} tokens, and there are {self.blocks.num_blocks}; shorten the prompt, lower "
                "max_tokens or raise kv_cache_memory",
            )
        self.residency.prefixes.arrived(job)
        if job.output:
            self._charges.resumed(job)
        else:
            self._charges.arrived(job)
        if job.waiting_since is None:
            job.waiting_since = now if job.output else job.arrival
        job.inherited = max(job.inherited, self.programs.served(job))
        self.policy.add(job, now)
        self.programs.arrived(job, now)
        if self.policy.settles():
            for batch in self.batches:
                self.batches.changed(self._charges.tell_decodes(batch, now, everyone=True))
        self.jobs[job.job_id] = job
        self.batches.changed()

    def abort(self, job_id: str, now: float, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a job at once; False when there is no such job. A plan in flight runs on and its result is dropped."""
        job = self.jobs.get(job_id)
        if job is None:
            return False
        self._end(job, reason, now)
        return True

    def progress(self, job: Job) -> tuple[int, float]:
        """Tokens of the job whose KV is computed or being computed, and the modelled seconds of its service so far."""
        computed = job.batch.position(job.row) if isinstance(job.batch, DecodeRows) else job.computed
        return computed, self._charges.attained(job)

    # --- what to run -------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> BatchPlan | None:
        """The next iteration, or None when there is nothing to do before a plan in flight has returned.

        A plan without rows waits for KV that is moving; when the last job has left, one closes the slots that are still
        open, and the executor is as it was at the start.
        """
        for job in self.residency.prefixes.take_found():
            self._charges.arrived(job)
            self.policy.refresh(job, now)
            self.batches.changed()
        batch = self.batches.turn(self._next_plan)
        growing = self.batches.fill(batch, now, alone=not self.in_flight)
        idle = self.batches.idle(batch)
        if idle and (self.in_flight or not (self.residency.untold or self.residency.moving)):
            return None
        return self._plan(batch, growing, idle, now)

    def _plan(self, batch: DecodeRows, growing: list[int], idle: bool, now: float) -> BatchPlan:
        """One iteration of the batch, or, if `idle`, one without rows."""
        plan = PlanBuilder()
        decodes: list[Job] = []
        exhausted: list[Job] = []
        prefills: list[Row] = []
        rows, taken, logprobs = _NO_ROWS, 0, batch.logprobs
        if not idle:
            taken = sum(self._grow(plan, batch, row) for row in growing)
            decodes = batch.jobs.copy()
            for job in decodes:
                job.in_flight += 1
                job.pending += 1
                if job.waiting_since is not None:
                    self._runs(job, now)
            rows = batch.advance()
            exhausted = batch.exhausted()
            for job in exhausted:
                self.batches.leave(job)
            budget = self.config.max_num_batched_tokens - len(decodes)
            chunks = Chunks(self.cost, self.config.stall_limit, rows, self.config.max_num_seqs, batch.spare)
            quick = batch.at_once
            if quick is None and len(self.jobs) <= self.config.max_num_seqs:
                quick = set(batch.prefills)
            for job in batch.prefills:
                tokens = min(job.known - job.computed, budget)
                at_once, beyond = quick is not None and job in quick, job in batch.beyond
                if not (tokens := chunks.cut(job.computed, tokens, job.known, at_once=at_once, beyond=beyond)):
                    break
                if not self.residency.has_room(job):
                    self.batches.changed()  # others have taken its room
                    break
                taken += self._prefill(plan, job, tokens, prefills, now)
                budget -= tokens
            for job in batch.prefills[len(prefills) :]:  # there is no time for them: they wait, and it counts
                self.batches.pause(job, now)
            if prefills or (batch.prefills and len(self.batches) > 1):
                # They have other rows next time, or another batch takes what they would start with.
                self.batches.changed()
        self._swapping.took(taken)
        closed, copies = self.residency.tell(plan)
        iteration = Iteration(
            plan_id=self._next_plan,
            scheduled=now,
            decodes=decodes,
            prefills=prefills,
            exhausted=exhausted,
            stop_tokens=batch.stop_tokens,
            logprobs=logprobs,
            waiting=len(self.jobs) - len(decodes) - len(prefills),
            free_blocks=self.blocks.free_blocks,
            copied_blocks=len(copies),
        )
        if self.record_levels:
            iteration.levels = tuple(map(self.policy.level, iteration.jobs))
        self.in_flight.append(iteration)
        self._next_plan += 1
        return plan.build(iteration.plan_id, rows, closed, copies)

    def _runs(self, job: Job, now: float) -> None:
        assert job.waiting_since is not None
        job.waited += max(0.0, now - job.waiting_since)
        job.waiting_since = None
        if job.metrics.first_scheduled is None:
            job.metrics.first_scheduled = now
        self.residency.runs(job)

    def _grow(self, plan: PlanBuilder, batch: DecodeRows, row: int) -> int:
        job, position = batch.jobs[row], batch.position(row)
        assert job.slot is not None
        plan.grow(job.slot, self.blocks.grow(job.index, position + 1))
        batch.grew(row, position + self.blocks.block_size)
        return 1

    def _prefill(self, plan: PlanBuilder, job: Job, tokens: int, rows: list[Row], now: float) -> int:
        """A row for so many of the job's tokens; returns how many blocks that took."""
        if job.waiting_since is not None:
            self._runs(job, now)
        taken = self.residency.open(job, plan) if job.slot is None else self.residency.extend(job)
        assert job.slot is not None
        row = Row(job, job.computed, tokens, job.computed + tokens == job.known)
        rows.append(row)
        plan.row(job, job.slot, row.start, tokens, int(row.samples))
        job.computed = end = row.start + tokens
        job.pending += row.samples
        job.primed = row.samples
        job.in_flight += 1
        self.residency.prefixes.computed(job)
        again = self._charges.prefill(job, row.start, end)
        job.metrics.recomputed_tokens += again
        self.recomputed_tokens += again
        return taken

    # --- what came of it ---------------------------------------------------------------------------------------------

    def complete(self, result: StepResult, now: float) -> list[JobUpdate]:
        """Apply the result of the oldest plan in flight; returns the jobs that got a token, and that failed without.

        Raises RuntimeError when it is not that plan's.
        """
        iteration = self.in_flight[0] if self.in_flight else None
        samples = iteration.samples if iteration else 0
        if iteration is None or result.plan_id != iteration.plan_id or len(result.tokens) != samples:
            raise RuntimeError(f"result of plan {result.plan_id} with {len(result.tokens)} tokens matches no plan")
        self.in_flight.popleft()
        if len(self.batches) > 1:
            self.batches.changed()  # its jobs may now join another batch
        for copy, taken in zip(result.copies.tolist(), result.copy_seconds.tolist(), strict=True):
            self.residency.acknowledge(copy, taken, now)
            self.batches.changed()
        # Plans overlap when several are in flight; no second is counted twice.
        seconds = now - max(iteration.scheduled, self._last_completed)
        self._last_completed = now
        if samples:
            self._swapping.iteration_seconds = seconds
        updates: list[JobUpdate] = []
        stops, plain = iteration.stop_tokens, not (result.errors or iteration.logprobs)
        sample = 0
        for job, token in zip(iteration.decodes, result.tokens.tolist(), strict=False):
            job.in_flight -= 1
            job.pending -= 1
            if job.finish_reason is not None:
                if not job.in_flight:
                    self._release(job, now)
            else:
                job.metrics.decode_seconds += seconds
                if plain and token not in stops:
                    job.output.append(token)
                    updates.append((job, token))
                else:
                    updates.append((job, self._append(job, result, sample, now)))
            sample += 1
        for job in iteration.exhausted:
            if job.finish_reason is None and len(job.output) == job.max_output:
                self._end(job, FinishReason.LENGTH, now)
        for row in iteration.prefills:
            job = row.job
            job.in_flight -= 1
            job.pending -= row.samples
            if job.finish_reason is not None:
                if not job.in_flight:
                    self._release(job, now)
            else:
                if row.start < len(job.prompt):
                    job.metrics.prefill_seconds += seconds
                else:
                    job.metrics.decode_seconds += seconds
                if row.samples:
                    updates.append((job, self._append(job, result, sample, now)))
            sample += row.samples
        return updates

    def _append(self, job: Job, result: StepResult, sample: int, now: float) -> int | None:
        """Add a sampled token to the job's output, and finish the job if it was the last; returns the token."""
        if sample in result.errors:
            job.error = result.errors[sample]
            self._end(job, FinishReason.ERROR, now)
            return None
        token = int(result.tokens[sample])
        job.output.append(token)
        if job.params.logprobs is not None:
            job.logprobs.append(_logprobs(result, sample, job.params.logprobs))
        if len(job.output) == 1:
            job.metrics.first_token = now
        if token in job.stop_tokens and len(job.output) > job.params.min_tokens:
            self._end(job, FinishReason.STOP, now)
        elif len(job.output) >= job.max_output:
            self._end(job, FinishReason.LENGTH, now)
        return token

    def _end(self, job: Job, reason: FinishReason, now: float) -> None:
        """Finish a live job; its blocks and slot go back when no plan in flight works on it."""
        self.batches.leave(job)
        self._charges.tell(job, now)
        job.finish_reason = reason
        job.metrics.finish = now
        job.metrics.service_seconds = job.attained
        if reason not in (FinishReason.ABORT, FinishReason.ERROR):
            self.policy.on_finish(job, len(job.output), now)
        self.policy.remove(job)
        self.programs.ended(job, now)
        del self.jobs[job.job_id]
        self.batches.changed()
        if not job.in_flight:
            self._release(job, now)

    def _release(self, job: Job, now: float) -> None:
        """Its KV is cache from here on: for its program's next call, if that is likely to come soon."""
        self.residency.release(job, now, self.programs.keep_until(job, now))
        self.residency.prefixes.ended(job)
        self.batches.changed()  # others may find room


def _logprobs(result: StepResult, sample: int, alternatives: int) -> TokenLogprobs:
    tokens = result.top_tokens[sample, :alternatives].tolist()
    values = result.top_logprobs[sample, :alternatives].tolist()
    top = [(token, value) for token, value in zip(tokens, values, strict=True) if token >= 0]
    return TokenLogprobs(int(result.tokens[sample]), float(result.logprobs[sample]), top)
