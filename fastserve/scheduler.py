"""Who runs next: turns the policy's order into plans, and results into tokens.

    add ──▶ policy ──iter_best──▶ schedule ──BatchPlan──▶ executor ──StepResult──▶ complete ──▶ updates
                                     │ ▲
                          grow, move ▼ │ release, acknowledge
                                   Residency

Rows (`max_num_seqs`), tokens (`max_num_batched_tokens`) and blocks are three separate limits of an iteration. A job
left out of an iteration keeps its blocks and its slot until a job of higher priority needs them; residency.py says what
happens then. A batch stays as it is until something happens: a job arrives, ends, changes its place in the policy's
order, finishes a prefill, or KV has moved. Only then is it chosen anew.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

import numpy as np

from .chunking import Chunks
from .config import SchedulerConfig
from .cost import Cost, Link
from .decode_rows import DecodeRows
from .planning import Iteration, PlanBuilder, Row
from .policies import create_policy
from .residency import Residency
from .selection import Selection, select
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

# Times that a batch is chosen anew because room was made at once.
_PASSES: Final = 3

_NO_ROWS: Int32Array = np.zeros((0, 4), np.int32)


class Scheduler:
    """Owns the live jobs, their blocks and their slots. Every method is valid in every state."""

    def __init__(self, config: SchedulerConfig, cost: Cost, link: Link | None = None) -> None:
        """`link`: a first guess of how fast KV moves. Raises InvalidRequest for an unknown policy."""
        self.config = config
        self.cost = cost
        self.policy = create_policy(config, cost)
        self.residency = Residency(config, self.policy, cost, link)
        self.blocks = self.residency.blocks
        self.jobs: dict[str, Job] = {}
        self.in_flight: deque[Iteration] = deque()
        self.record_levels = False  # whether iterations shall tell their jobs' levels
        self.preemptions = 0  # of all jobs there were, as are
        self.recomputed_tokens = 0
        # One batch for each plan that may hold other jobs than the one before: with a pipeline, one a stage.
        stages = config.pipeline_parallel_size
        self._batches = [DecodeRows(config.max_num_seqs, cost) for _ in range(stages)]
        self._version = 0  # counts what may change a batch
        self._deadline: float | None = None  # when time alone may change one
        self._mark = 0  # of the decision being made: chosen jobs carry it
        self._barred: dict[Job, None] = {}  # jobs that must stay out of the batch being chosen
        self._unreported: dict[Job, float] = {}  # service that the policy has not been told of
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
        if job.output:
            self._resume(job, now)
        else:
            self._estimate(job)
        if job.waiting_since is None:
            job.waiting_since = now if job.output else job.arrival
        self.policy.add(job, now)
        self.jobs[job.job_id] = job
        self._version += 1

    def _resume(self, job: Job, now: float) -> None:
        """Take up a job where a lost engine left it.

        What it had been served counts as served, so it is not charged for what is computed again, and a policy that
        goes by service has it about where it was; but it joins by all that has to be computed. Of its waits no more is
        known than the last, where `waiting_since` was given.
        """
        prompt = len(job.prompt)
        contexts = np.arange(prompt + 1, job.known, dtype=np.int32)  # of the tokens behind the first
        job.attained = self.cost.prefill_charge(0, prompt) + float(self.cost.decode_each(contexts).sum())
        job.served = job.known - 1
        job.next_seconds = self.cost.prefill_charge(0, job.known)

    def abort(self, job_id: str, now: float, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a job at once; False when there is no such job. A plan in flight runs on and its result is dropped."""
        job = self.jobs.get(job_id)
        if job is None:
            return False
        self._end(job, reason, now)
        return True

    def progress(self, job: Job) -> tuple[int, float]:
        """Tokens of the job whose KV is computed or being computed, and the modelled seconds of its service so far."""
        if isinstance(job.batch, DecodeRows):
            return job.batch.position(job.row), job.attained + job.batch.unreported(job)
        return job.computed, job.attained + self._unreported.get(job, 0.0)

    # --- what to run -------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> BatchPlan | None:
        """The next iteration, or None when there is nothing to do before a plan in flight has returned.

        A plan without rows waits for KV that is moving; when the last job has left, one closes the slots that are still
        open, and the executor is as it was at the start.
        """
        batch = self._batches[self._next_plan % len(self._batches)]
        residency = self.residency
        self._report(batch, now)
        growing = batch.growing()
        if (
            batch.version != self._version
            or (self._deadline is not None and now >= self._deadline)
            or len(growing) > self.blocks.free_blocks
            or residency.short
        ):
            growing = self._choose(batch, growing, now)
        idle = residency.waits or not (batch.jobs or batch.prefills)
        if idle and not self.in_flight and self.jobs and not residency.moving:
            growing = self._unstick(batch, growing, now)
            idle = residency.waits or not (batch.jobs or batch.prefills)
        if idle and (self.in_flight or not (residency.untold or residency.moving)):
            return None
        return self._plan(batch, growing, idle, now)

    def _unstick(self, batch: DecodeRows, growing: list[int], now: float) -> list[int]:
        """Nothing runs and nothing moves, though jobs live: choose anew, now that no plan holds anybody's blocks.

        If that is not enough, others give up their KV for the best job that wants room, and it fits alone.
        """
        growing = self._choose(batch, growing, now)
        if not (batch.jobs or batch.prefills or self.residency.moving):
            for other in self._batches:
                for job in list(other.jobs):
                    self._leave(job, now)
            self.residency.force(now)
            growing = self._choose(batch, [], now)
        return growing

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
                self._leave(job)
            budget = self.config.max_num_batched_tokens - len(decodes)
            chunks = Chunks(self.cost, self.config.stall_limit, rows)
            for job in batch.prefills:
                if (tokens := chunks.cut(job.computed, min(job.known - job.computed, budget))) == 0:
                    break
                taken += self._prefill(plan, job, tokens, prefills, now)
                budget -= tokens
            for job in batch.prefills[len(prefills) :]:  # there is no time for them: they wait, and it counts
                self._pause(job, now)
            if prefills:
                self._version += 1  # they have other rows next time
        closed, copies = self.residency.tell(plan, taken)
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

    def _report(self, batch: DecodeRows, now: float) -> None:
        """Tell the policy of service that may change a job's place."""
        self._flush(now)
        for job in batch.expired():
            batch.sync(job)
            if (own := batch.take_service(job)) > 0.0:
                job.attained += own
                job.next_seconds = self.cost.decode_seconds(job.served + 1)
                self.policy.on_service(job, own, now)
                self._version += 1
            batch.set_horizon(job, self.policy.horizon(job))

    def _flush(self, now: float) -> None:
        for job in list(self._unreported):
            self._serve(job, 0.0, now)

    def _serve(self, job: Job, seconds: float, now: float) -> None:
        """Report service, and what has not been reported before."""
        seconds += self._unreported.pop(job, 0.0)
        if seconds > 0.0:
            job.attained += seconds
            self._estimate(job)
            self.policy.on_service(job, seconds, now)
            self._version += 1

    def _choose(self, batch: DecodeRows, growing: list[int], now: float) -> list[int]:
        """Fill the batch anew, and have KV moved for it; returns the places that need another block."""
        residency = self.residency
        growers = {batch.jobs[row] for row in growing}
        self._barred.clear()
        for _ in range(_PASSES):
            chosen = self._select(batch, growers, now)
            blocks = batch.blocks(self.config.block_size)
            blocks += sum(self.blocks.held(job.index) for job in chosen.prefills)
            moves = residency.plan(self._mark, blocks, chosen.last, now)
            if moves is None:
                break
            self._barred.update(dict.fromkeys([*moves.pauses, *moves.drops, *(job for job, _ in moves.offloads)]))
            for job in self._barred:
                job.mark = 0
                self._leave(job, now)
            if not residency.move(moves):
                break
            # Blocks became free at once: whom they were made free for may run.
        mark = self._mark
        for job in [job for job in batch.jobs if job.mark != mark]:
            self._leave(job, now)
        for job in batch.prefills:
            if job.mark != mark and job.batch is None and not job.finished and job.waiting_since is None:
                self._pause(job, now)
        self._flush(now)
        batch.prefills = [job for job in chosen.prefills if job.mark == mark]
        for job in chosen.joins:
            if job.mark == mark:
                batch.add(job, self.blocks.held(job.index) * self.blocks.block_size, self.policy.horizon(job))
        batch.version = self._version
        self._deadline = self.policy.next_deadline()
        return batch.growing()

    def _select(self, batch: DecodeRows, growers: set[Job], now: float) -> Selection:
        self._mark += 1
        return select(
            batch,
            growers,
            self._mark,
            now,
            config=self.config,
            policy=self.policy,
            residency=self.residency,
            available=self._available,
        )

    def _available(self, job: Job) -> bool:
        """Whether a job that is not in the batch could be: not with its last token being sampled, or in another."""
        if job in self._barred or (job.in_flight and len(self._batches) > 1):
            return False
        if job.batch is not None:
            self._leave(job)
        return len(job.output) + job.pending < job.max_output

    def _leave(self, job: Job, preempted: float | None = None) -> None:
        """Take a job out of the decodes, if it is there: at a time `preempted`, or because it has nothing to do."""
        if isinstance(job.batch, DecodeRows):
            seconds = job.batch.remove(job)
            if seconds > 0.0:
                self._unreported[job] = seconds
                self._version += 1
            if preempted is not None:
                self._pause(job, preempted)

    def _pause(self, job: Job, now: float) -> None:
        if job.waiting_since is None:  # else it was chosen for a batch that never ran
            job.metrics.preemptions += 1
            self.preemptions += 1
            job.waiting_since = now

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
        taken = self.residency.open(job, plan) if job.slot is None else 0
        assert job.slot is not None
        row = Row(job, job.computed, tokens, job.computed + tokens == job.known)
        rows.append(row)
        plan.row(job, job.slot, row.start, tokens, int(row.samples))
        job.computed = end = row.start + tokens
        job.pending += row.samples
        job.primed = row.samples
        job.in_flight += 1
        # Charged is the modelled solo time of what is new; neighbours and recomputation are never charged.
        new = end - max(row.start, job.served)
        again = tokens - max(0, new)
        job.metrics.recomputed_tokens += again
        self.recomputed_tokens += again
        if new > 0:
            prompt = len(job.prompt)
            own = self.cost.prefill_charge(job.served, end) if job.served < prompt else self.cost.decode_seconds(end)
            self._unreported[job] = own
            job.served = end
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
        if len(self._batches) > 1:
            self._version += 1  # its jobs may now join another batch
        for copy, taken in zip(result.copies.tolist(), result.copy_seconds.tolist(), strict=True):
            self.residency.acknowledge(copy, taken)
            self._version += 1
        # Plans overlap when several are in flight; no second is counted twice.
        seconds = now - max(iteration.scheduled, self._last_completed)
        self._last_completed = now
        if samples:
            self.residency.iteration_seconds = seconds
        updates: list[JobUpdate] = []
        stops, plain = iteration.stop_tokens, not (result.errors or iteration.logprobs)
        sample = 0
        for job, token in zip(iteration.decodes, result.tokens.tolist(), strict=False):
            job.in_flight -= 1
            job.pending -= 1
            if job.finish_reason is not None:
                if not job.in_flight:
                    self._release(job)
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
                    self._release(job)
            else:
                if row.start < len(job.prompt):
                    job.metrics.prefill_seconds += seconds
                else:
                    job.metrics.decode_seconds += seconds
                if row.samples:
                    updates.append((job, self._append(job, result, sample, now)))
            sample += row.samples
        return updates

    def _estimate(self, job: Job) -> None:
        if job.served < len(job.prompt):
            job.next_seconds = self.cost.prefill_charge(job.served, len(job.prompt))
        else:
            job.next_seconds = self.cost.decode_seconds(job.served + 1)

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
        self._leave(job)
        self._serve(job, 0.0, now)
        job.finish_reason = reason
        job.metrics.finish = now
        if reason not in (FinishReason.ABORT, FinishReason.ERROR):
            self.policy.on_finish(job, len(job.output), now)
        self.policy.remove(job)
        del self.jobs[job.job_id]
        self._version += 1
        if not job.in_flight:
            self._release(job)

    def _release(self, job: Job) -> None:
        self.residency.release(job)
        self._version += 1  # others may find room

    def check_integrity(self) -> None:
        """Raise RuntimeError when the books do not balance: a block, slot or job lost, doubled or leaked."""
        self.residency.check_integrity()
        holders = self.residency.holders
        in_flight: dict[Job, list[bool]] = {}  # a job's rows: whether each samples
        for iteration in self.in_flight:
            for job in iteration.decodes:
                in_flight.setdefault(job, []).append(True)
            for row in iteration.prefills:
                in_flight.setdefault(row.job, []).append(row.samples)
        for what, fine in {
            "the policy holds other jobs": len(self.policy) == len(self.jobs),
            "a finished job is kept": all(not job.finished or job in in_flight for job in holders),
            "a job in flight holds no slot": in_flight.keys() <= holders.keys(),
        }.items():
            if not fine:
                raise RuntimeError(what)
        for batch in self._batches:
            for place, job in enumerate(batch.jobs):
                if job.batch is not batch or job.row != place or job.finished:
                    raise RuntimeError(f"job {job.job_id!r} is not where its batch has it")
                batch.sync(job)
        for job in {**holders, **dict.fromkeys(self.jobs.values())}:
            samples = in_flight.get(job, [])
            if (
                (job.in_flight, job.pending) != (len(samples), sum(samples))
                or not job.computed <= self.blocks.held(job.index) * self.blocks.block_size
                or not 0 <= job.computed <= (math.inf if job.finished else job.known)  # dropped tokens are not known
                or (job.slot is None) != (job not in holders)
            ):
                raise RuntimeError(f"job {job.job_id!r} is out of step with its blocks or plans: {job}")


def _logprobs(result: StepResult, sample: int, alternatives: int) -> TokenLogprobs:
    tokens = result.top_tokens[sample, :alternatives].tolist()
    values = result.top_logprobs[sample, :alternatives].tolist()
    top = [(token, value) for token, value in zip(tokens, values, strict=True) if token >= 0]
    return TokenLogprobs(int(result.tokens[sample]), float(result.logprobs[sample]), top)
