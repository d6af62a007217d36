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
from dataclasses import dataclass
from typing import Final, NamedTuple

from .config import SchedulerConfig
from .cost import CostModel
from .kv import BlockManager
from .planning import PlanBuilder
from .policies import create_policy
from .types import BatchPlan, FinishReason, InvalidRequest, Job, JobUpdate, StepResult, TokenLogprobs

# How many prefills, in batches, a decision passes over once the token budget is gone, looking for decodes behind them.
_PASSED_OVER: Final = 4

# Blocks that every running job should find free when it grows, before another job is let in.
_HEADROOM: Final = 2


class Row(NamedTuple):
    """One job's part in an iteration: positions start … start + tokens - 1."""

    job: Job
    start: int
    tokens: int
    samples: bool  # whether it ends at the job's last token, and so samples the next one


@dataclass(slots=True, frozen=True)
class Iteration:
    """A plan in flight."""

    plan_id: int
    scheduled: float
    rows: list[Row]
    levels: tuple[int, ...]
    waiting: int  # live jobs that are not in it
    free_blocks: int


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
        self._holders: dict[Job, None] = {}  # jobs with a slot, finished ones with a plan in flight included
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
        self.jobs[job.job_id] = job
        self.policy.add(job, now)

    def abort(self, job_id: str, now: float, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a job at once; False when there is no such job. A plan in flight runs on and its result is dropped."""
        job = self.jobs.get(job_id)
        if job is None:
            return False
        self._finish(job, reason, now)
        if not job.in_flight:
            self._release(job)
        return True

    # --- what to run -------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> BatchPlan | None:
        """The next iteration, or None when no job can run now.

        When the last job has left, one plan without rows closes the slots that are still open, and the executor is as
        it was at the start.
        """
        members, order, prefill_tokens = self._choose(now)
        plan = PlanBuilder()
        rows: list[Row] = []
        for job, tokens in self._with_blocks(members, order, prefill_tokens, now):
            rows.append(self._grant(plan, job, tokens, now))
        if not rows and (self.in_flight or not self._closed):
            return None
        running = {row.job for row in rows}
        for job, *_ in self._last_rows:
            if job not in running and self._runnable(job):
                job.metrics.preemptions += 1
        self._last_rows = rows
        levels = tuple(self.policy.level(row.job) for row in rows)
        waiting = len(self.jobs) - len(rows)
        self.in_flight.append(Iteration(self._next_plan, now, rows, levels, waiting, self.blocks.free_blocks))
        batch = plan.build(self._next_plan, self._closed)
        self._next_plan += 1
        self._closed = []
        return batch

    def _choose(self, now: float) -> tuple[list[Job], dict[Job, int], int]:
        """The jobs that get a row, best first; the rank of every job looked at; and the tokens left for prefills.

        Every decode chosen has its token set aside, so a prefill, however long and however important, never stalls the
        jobs it shares the iteration with. A prefill for which nothing is left gives up its row.
        """
        rows, budget = self.config.max_num_seqs, self.config.max_num_batched_tokens
        order: dict[Job, int] = {}
        decodes: list[Job] = []
        prefills: list[Job] = []
        wanted = 0  # by the prefills chosen
        passed_over = 0
        for rank, job in enumerate(self.policy.iter_best(now)):
            order[job] = rank
            if not self._runnable(job):
                continue
            remaining = _remaining(job)
            if remaining == 1:
                decodes.append(job)
                while prefills and wanted - (last := _remaining(prefills[-1])) >= budget - len(decodes):
                    prefills.pop()
                    wanted -= last
            elif wanted < budget - len(decodes):
                prefills.append(job)
                wanted += remaining
            else:
                passed_over += 1
                if passed_over == _PASSED_OVER * rows:
                    break
            if len(decodes) + len(prefills) == rows:
                break
        return sorted(decodes + prefills, key=order.__getitem__), order, budget - len(decodes)

    def _with_blocks(
        self, members: list[Job], order: dict[Job, int], prefill_tokens: int, now: float
    ) -> Iterator[tuple[Job, int]]:
        """Members that have room in the KV pool, and for how many tokens; the caller takes the room before going on.

        A job may take the blocks of those it outranks, the one that runs latest (largest ENST) first. A job without
        blocks starts only where it can stay: with room for all its known tokens after what the jobs before it will need
        soon. Starting it earlier would have it robbed at once, and compute the same prefill over and over. Once one job
        could not start, none behind it does, so small jobs do not keep a large one out.

        Why there is no deadlock and no livelock: with nothing in flight, the best job can take the blocks of every
        other, and `add` made sure that it fits alone, so each iteration advances the best job. It stays the best until
        it has got *new* work done, because policies charge recomputation nothing and leave an uncharged job in its
        place; jobs promoted meanwhile queue behind it. So every turn at the front ends in progress that is kept as
        tokens, even if its KV is lost. With plans in flight, a job that needs the blocks of jobs in flight ends the
        plan, so that those pause and can be robbed in the next.
        """
        blocks = self.blocks
        victims: list[Job] | None = None
        lost: set[Job] = set()
        first, may_start, owed = True, True, 0
        for job in members:
            starts = job.slot is None and not first
            if job in lost or (starts and not may_start):
                continue
            remaining = _remaining(job)
            tokens = 1 if remaining == 1 else min(remaining, prefill_tokens)
            needed = blocks.blocks_for(job.computed + tokens) - blocks.held(job.index)
            to_be_had = blocks.blocks_for(job.known) + owed if starts else needed
            if to_be_had > blocks.free_blocks:
                outranked = [other for other in self._holders if order.get(other, math.inf) > order[job]]
                idle = sum(blocks.held(other.index) for other in outranked if not other.in_flight)
                if to_be_had > blocks.free_blocks + idle:
                    if to_be_had <= blocks.free_blocks + sum(blocks.held(other.index) for other in outranked):
                        return
                    if starts:
                        may_start = False
                        continue
                if victims is None:
                    victims = self._by_work_ahead(order, now)
                while victims and needed > blocks.free_blocks:
                    victim = victims.pop()
                    # One of higher priority than this job is no victim for those still to come either.
                    if order.get(victim, math.inf) > order[job]:
                        self._release(victim)
                        lost.add(victim)
                tokens = min(tokens, blocks.capacity(job.index) - job.computed)
                if tokens <= 0:
                    continue
            if remaining > 1:
                prefill_tokens -= tokens
            yield job, tokens
            first = False
            owed += blocks.blocks_for(job.known) + _HEADROOM - blocks.held(job.index)

    def _by_work_ahead(self, order: dict[Job, int], now: float) -> list[Job]:
        """Jobs whose blocks could be taken, the one that runs latest last."""
        idle = [job for job in self._holders if not job.in_flight]
        idle.sort(key=lambda job: (self.policy.work_ahead(job, now), order.get(job, math.inf), job.index))
        return idle

    def _grant(self, plan: PlanBuilder, job: Job, tokens: int, now: float) -> Row:
        if job.slot is None:
            job.slot = self._take_slot()
            self._holders[job] = None
            plan.open(job, job.slot)
        row = Row(job, job.computed, tokens, job.computed + tokens == job.known)
        plan.grow(job.slot, self.blocks.grow(job.index, job.computed + tokens))
        plan.row(job, job.slot, row.start, tokens, int(row.samples))
        job.computed += tokens
        job.pending += row.samples
        job.in_flight += 1
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
                updates.append(JobUpdate(job, [self._append(job, result, sample, now)]))
        return updates

    def _charge(self, row: Row, now: float) -> None:
        """Charge the modelled solo time of what is new in the row; neighbours and recomputation are never charged."""
        job, end = row.job, row.start + row.tokens
        new = max(0, end - max(row.start, job.served))
        own = self.cost.prefill_seconds(end - new, new)  # of one token: a decode's
        job.metrics.recomputed_tokens += row.tokens - new
        job.served = max(job.served, end)
        self._estimate(job)
        self.policy.on_service(job, own, now)

    def _estimate(self, job: Job) -> None:
        if job.served < len(job.prompt):
            job.next_seconds = self.cost.prefill_seconds(job.served, len(job.prompt) - job.served)
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
        self._finish(job, reason, now)
        if not job.in_flight:
            self._release(job)
        return token

    def _finish(self, job: Job, reason: FinishReason, now: float) -> None:
        job.finish_reason = reason
        job.metrics.finish = now
        if reason is not FinishReason.ABORT:
            self.policy.on_finish(job, len(job.output), now)
        self.policy.remove(job)
        del self.jobs[job.job_id]

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
                or not 0 <= job.computed <= job.known
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
