"""Who runs next: turns the policy's order into plans, and results into tokens.

    add ──▶ policy ──iter_best──▶ schedule ──BatchPlan──▶ executor ──StepResult──▶ complete ──▶ updates
                                     │ ▲
                                grow ▼ │ release
                                  BlockManager

Rows (`max_num_seqs`), tokens (`max_num_batched_tokens`) and blocks are three separate limits of an iteration. A job
left out of an iteration keeps its blocks and its slot until a job of higher priority needs them; then they are taken,
and what it had is computed again later.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from operator import itemgetter
from typing import Final

from .config import SchedulerConfig
from .cost import CostModel
from .kv import BlockManager
from .planning import Iteration, PlanBuilder, Row
from .policies import create_policy
from .types import BatchPlan, FinishReason, InvalidRequest, Job, JobUpdate, StepResult, TokenLogprobs

# How many prefills, in batches, a decision passes over once the token budget is gone, looking for decodes behind them.
_PASSED_OVER: Final = 4

# Blocks that every job that holds some should find free when it grows, before another job is let in.
_HEADROOM: Final = 2

# A job's blocks may be taken once it was charged this many times what computing them again would cost. With 8, traces
# finish later than under fcfs. Where a decode costs less than 16 prefilled tokens, as on a CPU, few jobs repay in time.
_REPAYMENT: Final = 16.0


class Scheduler:
    """Owns the live jobs, their blocks and their slots. Every method is valid in every state."""

    def __init__(self, config: SchedulerConfig, cost: CostModel) -> None:
        """Raises InvalidRequest for an unknown policy."""
        self.config = config
        self.cost = cost
        self.policy = create_policy(config, cost)
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self.jobs: dict[str, Job] = {}
        self.in_flight: deque[Iteration] = deque()
        # Jobs with a slot, finished ones with a plan in flight included, and what each was charged since it got it.
        self._holders: dict[Job, float] = {}
        self._free_slots: list[int] = []
        self._num_slots = 0
        self._closed: list[int] = []  # slots to close in the next plan
        self._last_rows: list[Row] = []
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
        self._estimate(job)
        job.waiting_since = job.arrival
        self.jobs[job.job_id] = job
        self.policy.add(job, now)

    def abort(self, job_id: str, now: float, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a job at once; False when there is no such job. A plan in flight runs on and its result is dropped."""
        job = self.jobs.get(job_id)
        if job is None:
            return False
        self._end(job, reason, now)
        return True

    # --- what to run -------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> BatchPlan | None:
        """The next iteration, or None when no job can run now.

        When the last job has left, one plan without rows closes the slots that are still open, and the executor is as
        it was at the start.
        """
        members, prefill_tokens = self._choose(now)
        plan = PlanBuilder()
        rows: list[Row] = []
        for job, tokens in self._with_blocks(members, prefill_tokens):
            rows.append(self._grant(plan, job, tokens, now))
        if not rows and (self.in_flight or not self._closed):
            return None
        running = {row.job for row in rows}
        for job, *_ in self._last_rows:
            if job not in running and self._runnable(job):
                job.metrics.preemptions += 1
                job.waiting_since = now
        self._last_rows = rows
        levels = tuple(self.policy.level(row.job) for row in rows)
        waiting = len(self.jobs) - len(rows)
        self.in_flight.append(Iteration(self._next_plan, now, rows, levels, waiting, self.blocks.free_blocks))
        batch = plan.build(self._next_plan, self._closed)
        self._next_plan += 1
        self._closed = []
        return batch

    def _choose(self, now: float) -> tuple[list[Job], int]:
        """The jobs that get a row, best first, and the tokens left for prefills.

        Every decode chosen has its token set aside, so a prefill, however long and however important, never stalls the
        jobs it shares the iteration with. A prefill for which nothing is left gives up its row.
        """
        rows, budget = self.config.max_num_seqs, self.config.max_num_batched_tokens
        decodes: list[tuple[int, Job]] = []
        prefills: list[tuple[int, Job]] = []
        wanted = 0  # by the prefills chosen
        passed_over = 0
        for place, job in enumerate(self._candidates(now)):
            remaining = _remaining(job)
            if remaining == 1:
                decodes.append((place, job))
                while prefills and wanted - (last := _remaining(prefills[-1][1])) >= budget - len(decodes):
                    prefills.pop()
                    wanted -= last
            elif wanted < budget - len(decodes):
                prefills.append((place, job))
                wanted += remaining
            else:
                passed_over += 1
                if passed_over == _PASSED_OVER * rows:
                    break
            if len(decodes) + len(prefills) == rows:
                break
        return [job for _, job in sorted(decodes + prefills, key=itemgetter(0))], budget - len(decodes)

    def _candidates(self, now: float) -> Iterator[Job]:
        """Jobs that can run, best first, as far as there is memory for those that hold none.

        A job without blocks starts only where it can stay: with room for all its known tokens next to what the jobs
        that hold blocks will need soon, except those it may rob (see `_with_blocks`). Starting it earlier would have
        somebody robbed at once, and compute the same prefill over and over. When there is no room for one, none behind
        it starts either, so small jobs do not keep a large one out; only jobs that hold blocks follow.
        """
        room = self.blocks.num_blocks - sum(map(self._claim, self._holders))
        robbable: dict[Job, int] | None = None
        for job in self.policy.iter_best(now):
            if robbable:
                room -= robbable.pop(job, 0)  # it outranks all that follow
            if not self._runnable(job):
                continue
            if job.slot is None:
                needed = self.blocks.blocks_for(job.known)
                if needed > room and robbable is None:
                    victims = [other for other in self._outranked(job) if self._repaid(other)]
                    robbable = {other: self._claim(other) for other in victims if not other.in_flight}
                    pausing = sum(self._claim(other) for other in victims if other.in_flight)
                    room += sum(robbable.values())
                if needed > room:
                    break
                room -= self._claim(job)
            yield job
        else:
            return
        if needed > room + pausing:
            yield from sorted(filter(self._runnable, self._outranked(job)), key=self.policy.rank)

    def _claim(self, job: Job) -> int:
        """The blocks that a job holds or will need soon."""
        if job.finished:
            return self.blocks.held(job.index)
        soon = job.known + _HEADROOM * self.blocks.block_size
        return self.blocks.blocks_for(min(soon, len(job.prompt) + job.max_output - 1))

    def _with_blocks(self, members: list[Job], prefill_tokens: int) -> Iterator[tuple[Job, int]]:
        """Members that have room in the KV pool, and for how many tokens; the caller takes the room before going on.

        A job may take the blocks of those it outranks once they have repaid what computing them again will cost
        (`_repaid`), the cheapest to compute again first. Only the best of the jobs that hold blocks may take those of
        any other.

        Why there is no deadlock and no livelock: with nothing in flight, the best job that holds blocks can take those
        of every other, and `add` made sure that it fits alone, so each iteration advances it, and to new work in the
        end: policies charge recomputation nothing and leave an uncharged job in its place, and jobs promoted meanwhile
        queue behind it. What it has got is kept as tokens, even if its KV is lost. A better job that waits to start
        lets nobody start behind it, and those that hold blocks end or repay in a bounded number of their iterations;
        then it takes what it needs. With plans in flight, a job that needs the blocks of jobs in flight ends the plan,
        so that those pause and can be robbed in the next.
        """
        blocks = self.blocks
        victims: list[Job] | None = None
        lost: set[Job] = set()
        first = True
        for job in members:
            if job in lost:
                continue
            remaining = _remaining(job)
            tokens = 1 if remaining == 1 else min(remaining, prefill_tokens)
            needed = blocks.blocks_for(job.computed + tokens) - blocks.held(job.index)
            if needed > blocks.free_blocks:
                anybody = first and job.slot is not None
                if victims is None:
                    victims = sorted(self._holders, key=lambda other: (-other.computed, other.index))
                outranked = self._outranked(job)
                while victims and needed > blocks.free_blocks:
                    victim = victims.pop()
                    # One that this job may not rob is no victim for those still to come either.
                    if victim in outranked and not victim.in_flight and (anybody or self._repaid(victim)):
                        self._release(victim)
                        lost.add(victim)
                paused = (other for other in outranked if other.in_flight and (anybody or self._repaid(other)))
                if needed > blocks.free_blocks and any(paused):
                    return
                tokens = min(tokens, blocks.capacity(job.index) - job.computed)
                if tokens <= 0:
                    continue
            if remaining > 1:
                prefill_tokens -= tokens
            yield job, tokens
            first = False

    def _outranked(self, job: Job) -> list[Job]:
        """Live jobs that hold blocks and come after this one."""
        rank = self.policy.rank
        return [other for other in self._holders if not other.finished and rank(other) > rank(job)]

    def _repaid(self, job: Job) -> bool:
        """Whether the job has got enough new work out of the blocks it holds for them to be taken.

        What it was charged since it began to hold them is at least _REPAYMENT times the modelled time of computing them
        again. So recomputation, but for that of the best job's making, stays below 1/_REPAYMENT of what is charged.
        """
        return self._holders[job] >= _REPAYMENT * self.cost.prefill_seconds(0, job.computed)

    def _grant(self, plan: PlanBuilder, job: Job, tokens: int, now: float) -> Row:
        if job.slot is None:
            job.slot = self._take_slot()
            self._holders[job] = 0.0
            plan.open(job, job.slot)
        row = Row(job, job.computed, tokens, job.computed + tokens == job.known)
        plan.grow(job.slot, self.blocks.grow(job.index, job.computed + tokens))
        plan.row(job, job.slot, row.start, tokens, int(row.samples))
        job.computed += tokens
        job.pending += row.samples
        job.in_flight += 1
        if job.waiting_since is not None:
            job.waited += max(0.0, now - job.waiting_since)
            job.waiting_since = None
        if job.metrics.first_scheduled is None:
            job.metrics.first_scheduled = now
        return row

    def _runnable(self, job: Job) -> bool:
        """False for a finished job, and for one whose last token is already being sampled."""
        return not job.finished and len(job.output) + job.pending < job.max_output

    # --- what came of it ---------------------------------------------------------------------------------------------

    def complete(self, result: StepResult, now: float) -> list[JobUpdate]:
        """Apply the result of the oldest plan in flight. Raises RuntimeError when it is not that plan's."""
        samples = sum(row.samples for row in self.in_flight[0].rows) if self.in_flight else 0
        if not self.in_flight or result.plan_id != self.in_flight[0].plan_id or len(result.tokens) != samples:
            raise RuntimeError(f"result of plan {result.plan_id} with {len(result.tokens)} tokens matches no plan")
        iteration = self.in_flight.popleft()
        # Plans overlap when several are in flight; no second is counted twice.
        seconds = now - max(iteration.scheduled, self._last_completed)
        self._last_completed = now
        updates: list[JobUpdate] = []
        sampled = iter(range(samples))
        for row in iteration.rows:
            job = row.job
            sample = next(sampled) if row.samples else None
            job.in_flight -= 1
            job.pending -= row.samples
            if job.finished:
                if not job.in_flight:
                    self._release(job)
                continue
            if row.start < len(job.prompt):
                job.metrics.prefill_seconds += seconds
            else:
                job.metrics.decode_seconds += seconds
            self._charge(row, now)
            if sample is not None:
                if sample in result.errors:
                    job.error = result.errors[sample]
                    self._end(job, FinishReason.ERROR, now)
                    updates.append(JobUpdate(job, []))
                else:
                    updates.append(JobUpdate(job, [self._append(job, result, sample, now)]))
        return updates

    def _charge(self, row: Row, now: float) -> None:
        """Charge the modelled solo time of what is new in the row; neighbours and recomputation are never charged."""
        job, end = row.job, row.start + row.tokens
        new = end - max(row.start, job.served)
        job.metrics.recomputed_tokens += row.tokens - max(0, new)
        if new <= 0:
            return
        prompt = len(job.prompt)
        own = self.cost.prefill_charge(job.served, end) if job.served < prompt else self.cost.decode_seconds(end)
        job.served = end
        self._estimate(job)
        self._holders[job] += own
        job.attained += own
        self.policy.on_service(job, own, now)

    def _estimate(self, job: Job) -> None:
        if job.served < len(job.prompt):
            job.next_seconds = self.cost.prefill_charge(job.served, len(job.prompt))
        else:
            job.next_seconds = self.cost.decode_seconds(job.served + 1)

    def _append(self, job: Job, result: StepResult, sample: int, now: float) -> int:
        """Add a sampled token to the job's output, and finish the job if it was the last; returns the token."""
        token = int(result.tokens[sample])
        job.output.append(token)
        if job.params.logprobs is not None:
            job.logprobs.append(_logprobs(result, sample, job.params.logprobs))
        if job.metrics.first_token is None:
            job.metrics.first_token = now
        if token in job.stop_tokens and len(job.output) > job.params.min_tokens:
            reason = FinishReason.STOP
        elif len(job.output) >= job.max_output:
            reason = FinishReason.LENGTH
        else:
            return token
        self._end(job, reason, now)
        return token

    def _end(self, job: Job, reason: FinishReason, now: float) -> None:
        """Finish a live job; its blocks and slot go back when no plan in flight works on it."""
        job.finish_reason = reason
        job.metrics.finish = now
        if reason not in (FinishReason.ABORT, FinishReason.ERROR):
            self.policy.on_finish(job, len(job.output), now)
        self.policy.remove(job)
        del self.jobs[job.job_id]
        if not job.in_flight:
            self._release(job)

    # --- slots and blocks --------------------------------------------------------------------------------------------

    def _take_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        self._num_slots += 1
        return self._num_slots - 1

    def _release(self, job: Job) -> None:
        """Give back the blocks and the slot of a job that no plan in flight works on; it starts over if it lives."""
        if job.slot is None:
            return
        self.blocks.release(job.index)
        self._closed.append(job.slot)
        self._free_slots.append(job.slot)
        del self._holders[job]
        job.slot = None
        job.computed = 0

    def check_integrity(self) -> None:
        """Raise RuntimeError when the books do not balance: a block, slot or job lost, doubled or leaked."""
        self.blocks.check_integrity()
        in_flight: dict[Job, list[Row]] = {}
        for iteration in self.in_flight:
            for row in iteration.rows:
                in_flight.setdefault(row.job, []).append(row)
        slots = [*(job.slot for job in self._holders), *self._free_slots]
        held = sum(self.blocks.held(job.index) for job in self._holders)
        for what, fine in {
            "a slot is lost or doubled": len(slots) == self._num_slots and set(slots) == set(range(self._num_slots)),
            "a block belongs to no job": held + self.blocks.free_blocks == self.blocks.num_blocks,
            "the policy holds other jobs": len(self.policy) == len(self.jobs),
            "a finished job is kept": all(not job.finished or job in in_flight for job in self._holders),
            "a job in flight holds no slot": in_flight.keys() <= self._holders.keys(),
        }.items():
            if not fine:
                raise RuntimeError(what)
        for job in {**self._holders, **dict.fromkeys(self.jobs.values())}:
            rows = in_flight.get(job, [])
            if (
                (job.in_flight, job.pending) != (len(rows), sum(row.samples for row in rows))
                or self.blocks.held(job.index) != self.blocks.blocks_for(job.computed)
                or not 0 <= job.computed <= (math.inf if job.finished else job.known)  # dropped tokens are not known
                or (job.slot is None) != (job not in self._holders)
            ):
                raise RuntimeError(f"job {job.job_id!r} is out of step with its blocks or plans: {job}")


def _remaining(job: Job) -> int:
    """Known tokens whose KV is not computed."""
    return job.known - job.computed


def _logprobs(result: StepResult, sample: int, alternatives: int) -> TokenLogprobs:
    tokens = result.top_tokens[sample, :alternatives].tolist()
    values = result.top_logprobs[sample, :alternatives].tolist()
    top = [(token, value) for token, value in zip(tokens, values, strict=True) if token >= 0]
    return TokenLogprobs(int(result.tokens[sample]), float(result.logprobs[sample]), top)
