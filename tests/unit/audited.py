"""An engine on a virtual clock whose every plan is checked, by what the plans alone say, before the simulator runs it.

Audited ── Engine ──▶ Auditor (rules of a plan, work done) ──▶ SimExecutor (times)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel, Link
from fastserve.engine import Engine, IterationRecord
from fastserve.simulator import SimExecutor, VirtualClock
from fastserve.simulator.replay import plan_digest
from fastserve.types import OFFLOAD, UPLOAD, BatchPlan, Job, SamplingParams, StepResult


class Given(NamedTuple):
    """A job of a trace. It ends after `output` tokens, by end-of-sequence unless `limited`, or is aborted at a time."""

    arrival: float
    prompt: int
    output: int
    limited: bool = True
    abort: float | None = None
    priority: int = 0


@dataclass
class Work:
    """What the device did for one job."""

    computed: int = 0  # positions that were computed at least once
    again: int = 0  # tokens computed that had been before
    uploads: list[float] = field(default_factory=list)  # seconds of each copy that brought KV back


@dataclass
class _Slot:
    seed: int
    length: int = 0
    table: list[int | None] = field(default_factory=list)  # None: the block is another slot's by now


class Auditor:
    """An Executor around another: asserts what a runtime may rely on, and counts work by the seeds of jobs."""

    def __init__(self, config: SchedulerConfig, inner: SimExecutor, clock: VirtualClock) -> None:
        self.work: dict[int, Work] = {}
        self.digests: list[str] = []
        self.on_row: Callable[[int], None] = lambda seed: None  # called with the seed of each row
        self.copied = [0, 0]  # blocks, by direction
        self.slots: dict[int, _Slot] = {}
        self.copies: dict[int, list[tuple[int, int, int]]] = {}  # not acknowledged: (direction, device, host)
        self._uploads: dict[int, tuple[Work, float]] = {}  # whose each of them is, and since when
        self._config = config
        self._inner = inner
        self._clock = clock
        self._in_flight: deque[set[int]] = deque()  # blocks of the jobs of each plan
        self._rows: deque[set[int]] = deque()  # slots of each plan

    def submit(self, plan: BatchPlan) -> None:
        self.digests.append(plan_digest(plan))
        for slot in plan.closed.tolist():
            del self.slots[slot]
        for (slot, *_), seed in zip(plan.opened.tolist(), plan.opened_seeds.tolist(), strict=True):
            assert slot not in self.slots, "opened twice"
            self.slots[slot] = _Slot(seed)
        coming = {to for _, direction, _, to in plan.copies.tolist() if direction != OFFLOAD}
        for slot, index, block in plan.table.tolist():
            self._enter(slot, index, block)
            assert block not in self._moving_blocks(), "given away while it is copied"
        used = {block for row in plan.rows.tolist() for block in self._run(*row)}
        assert len(plan.tokens) == plan.rows[:, 2].sum() <= self._config.max_num_batched_tokens
        assert len(set(plan.rows[:, 0].tolist())) == len(plan.rows) <= self._config.max_num_seqs
        assert not used & (self._moving_blocks() | coming), "read or written while it is copied"
        slots = set(plan.rows[:, 0].tolist())
        if self._config.pipeline_parallel_size > 1:
            assert not slots & set().union(*self._rows), "a job is in two plans of a pipeline"
        self._rows.append(slots)
        self._in_flight.append(used)
        assert len(self._in_flight) <= self._config.max_in_flight
        self._copy(plan)
        self._inner.submit(plan)

    def poll(self, timeout: float | None) -> StepResult | None:
        result = self._inner.poll(timeout)
        if result is not None:
            self._in_flight.popleft()
            self._rows.popleft()
            for copy in result.copies.tolist():
                del self.copies[copy]
                if copy in self._uploads:
                    work, since = self._uploads.pop(copy)
                    work.uploads.append(self._clock.now - since)
        return result

    def _enter(self, slot: int, index: int, block: int) -> None:
        assert 0 <= block < self._config.num_blocks
        for other in self.slots.values():
            other.table = [None if held == block else held for held in other.table]
        table = self.slots[slot].table
        assert index <= len(table), "a hole in the table"
        table[index:] = [block, *table[index + 1 :]]

    def _run(self, slot: int, start: int, count: int, logits: int) -> list[int]:
        """Account for a row; the blocks it reads and writes."""
        state = self.slots[slot]
        assert start == state.length and count > 0 and logits in (0, 1)
        state.length = end = start + count
        work = self.work.setdefault(state.seed, Work())
        work.again += max(0, min(work.computed, end) - start)
        work.computed = max(work.computed, end)
        self.on_row(state.seed)
        blocks = [block for block in state.table[: -(-end // self._config.block_size)] if block is not None]
        assert len(blocks) == -(-end // self._config.block_size), "a block is not there"
        return blocks

    def _copy(self, plan: BatchPlan) -> None:
        rows = plan.copies.tolist()
        for copy, direction, source, destination in rows:
            device, host = (source, destination) if direction == OFFLOAD else (destination, source)
            assert not any(device in used for used in self._in_flight), "copied under a plan that uses it"
            under_way = [move for moves in self.copies.values() for move in moves]
            assert device not in {move[1] for move in under_way} and host not in {move[2] for move in under_way}
            assert 0 <= host < self._config.num_host_blocks
            self.copies.setdefault(copy, []).append((direction, device, host))
            self.copied[direction] += 1
            if direction == UPLOAD:
                (seed,) = {slot.seed for slot in self.slots.values() if device in slot.table}
                self._uploads[copy] = self.work[seed], self._clock.now
        order = [copy for copy, *_ in rows]
        assert order == sorted(order), "rows of one copy are adjacent"

    def _moving_blocks(self) -> set[int]:
        return {device for moves in self.copies.values() for _, device, _ in moves}


class Audited:
    """An engine, its clock, and what came of every job of a trace."""

    def __init__(self, config: SchedulerConfig, cost: CostModel, link: Link) -> None:
        self.config, self.cost = config, cost
        self.clock = VirtualClock()
        self.records: list[IterationRecord] = []
        self.jobs: list[Job] = []
        self._inner = SimExecutor(cost, self.clock, link=link, stages=config.pipeline_parallel_size)
        self.auditor = Auditor(config, self._inner, self.clock)
        self.engine = Engine(config, self.auditor, cost, link=link, clock=self.clock, on_iteration=self.records.append)

    def add(self, given: Given) -> Job:
        number = len(self.jobs)
        job = self.engine.add_job(
            str(number),
            range(2, 2 + given.prompt),
            SamplingParams(temperature=0.0, max_tokens=given.output + (0 if given.limited else 3)),
            seed=number,
            vocab_size=2**31 - 1,
            eos_token_ids=(1,),
            priority=given.priority,
            arrival=given.arrival,
            known_output=given.output,
        )
        self._inner.expect(number, None if given.limited else given.output)
        self.jobs.append(job)
        return job

    def run(self, trace: list[Given], after_step: Callable[[], None] = lambda: None, steps: int = 4000) -> None:
        """Run the trace to its end; AssertionError if that is not reached. Integrity is checked after every step.

        Jobs arrive and are aborted in the middle of iterations, too.
        """
        happenings = deque(sorted(_happenings(trace), key=lambda happening: happening[0]))
        jobs: dict[int, Job] = {}
        for _ in range(steps):
            while happenings and happenings[0][0] <= self.clock.now:
                _, number, given = happenings.popleft()
                if given is not None:
                    jobs[number] = self.add(given)
                else:
                    live = not jobs[number].finished
                    assert self.engine.abort(jobs[number].job_id) is live
                self.engine.check_integrity()
            if self.engine.has_work:
                self.engine.step(happenings[0][0] - self.clock.now if happenings else None)
                self.engine.check_integrity()
                after_step()
            elif happenings:
                self._inner.skip_to(happenings[0][0])
            else:
                return
        raise AssertionError(f"{len(self.engine.jobs)} jobs are not done after {steps} steps")

    def check_nothing_is_held(self) -> None:
        blocks = self.engine.scheduler.blocks
        assert (blocks.free_blocks, blocks.free_host_blocks) == (blocks.num_blocks, blocks.num_host_blocks)
        assert not self.auditor.slots and not self.auditor.copies


def _happenings(trace: list[Given]) -> Iterator[tuple[float, int, Given | None]]:
    """(when, number of the job, the job or None for its abort)"""
    for number, given in enumerate(trace):
        yield given.arrival, number, given
    for number, given in enumerate(trace):
        if given.abort is not None:
            yield max(given.arrival, given.abort), number, None
