"""Measuring the cost model and the link: real iterations of many shapes, and real copies, on whatever executor will
serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from statistics import median
from typing import Final

import numpy as np

from .config import SchedulerConfig
from .cost import CostModel, Link
from .types import OFFLOAD, UPLOAD, BatchPlan, Executor, StepResult

Sample = tuple[list[tuple[int, int]], float]  # rows (start, tokens) of an iteration, and its seconds on the device

_QUICK_SECONDS: Final = 0.6
_FULL_SECONDS: Final = 30.0
_CHUNKS: Final = 32  # of one prefill
# How often each iteration is run. Other programs can only make one slower, and what is measured at a start schedules
# for a long time: in quick mode the fastest counts, of as many rounds over all shapes as there is time for, since who
# disturbs one iteration disturbs the next. Full mode is asked what a run will take here, other programs included: there
# the median does.
_QUICK_ROUNDS: Final = 3
_QUICK_REPEATS: Final = 2
_FULL_REPEATS: Final = 3
_DISTURBED: Final = 1.5  # times as long as others let expect
# In full mode, batches of up to so many rows are measured at this context, too, which takes prefills in such chunks.
_BATCH_ROWS: Final = 16
_BATCH_CONTEXT: Final = 128
_BATCH_CHUNK: Final = 32
# In full mode: (jobs that decode, prompts beside them, tokens of each prompt). Few iterations that compute a prompt
# compute nothing else.
_MIXED: Final = ((2, 1, 32), (6, 1, 32), (3, 2, 32), (4, 4, 32), (2, 1, 64), (6, 1, 64), (4, 4, 64), (6, 1, 192))
_DECODE_ROUNDS: Final = 4
_DECODES: Final = 4  # of each, further and further into a block
_LINK_SECONDS: Final = 0.2
_COPY_BLOCKS: Final = 8  # of the larger copies
_COPY_REPEATS: Final = 4  # the first finds no pages behind the host's blocks
# temperature, top_p, min_p, repetition, presence and frequency penalty: those of a request that names none. Drawing a
# token takes longer than finding the largest logit.
_DEFAULTS: Final = (1.0, 1.0, 0.0, 1.0, 0.0, 0.0)


def measure(
    executor: Executor,
    config: SchedulerConfig,
    *,
    vocab_size: int,
    full: bool = False,
    model: str = "",
    device: str = "",
    version: str = "",
    on_sample: Callable[[list[tuple[int, int]], float], None] | None = None,
) -> CostModel:
    """Run synthetic iterations within the limits of `config` and fit a cost model to their device seconds.

    The executor must be idle; its slots and blocks are used from 0 on and given back. Quick mode spends about 0.6
    seconds of device time, full mode up to 30 and reaches long contexts. An iteration is left out when, judged by those
    before it, it would overrun: a slow machine is measured on small shapes. Raises what the executor raises.
    """
    bench = _Bench(executor, config, vocab_size, full, on_sample)
    bench.warm_up()
    if full:
        for slots in (1, 2, 4, 8, 16, 32, 64):
            bench.batch(slots, decodes=4, context=_BATCH_CONTEXT if slots <= _BATCH_ROWS else 0)
        for decoding, prompts, tokens in _MIXED:
            bench.mixed(decoding, prompts, tokens)
        for chunk in (64, 256, 512):
            bench.one_job(chunk, decodes=4)
    else:
        for slots in (1, 8) * _QUICK_ROUNDS:
            bench.batch(slots, decodes=1)
        for _ in range(_QUICK_ROUNDS):
            bench.growing_job(32)
    bench.close()
    samples = bench.samples if full else _undisturbed(bench.samples)
    return CostModel.fit(samples, model=model, device=device, version=version)


def _undisturbed(samples: list[Sample]) -> list[Sample]:
    """Without decodes of one job, up to a quarter of all samples, that took far longer than all others let expect.

    The longest contexts are measured once, and alone tell what a context costs.
    """
    kept = list(samples)
    for _ in range(len(samples) // 4):
        excess = [
            seconds / CostModel.fit(kept[:i] + kept[i + 1 :]).iteration_seconds(rows) if _is_decode(rows) else 0.0
            for i, (rows, seconds) in enumerate(kept)
        ]
        if max(excess) < _DISTURBED:
            break
        del kept[excess.index(max(excess))]
    return kept


def _is_decode(rows: list[tuple[int, int]]) -> bool:
    return len(rows) == 1 and rows[0][1] == 1


def measure_decode(executor: Executor, config: SchedulerConfig, *, vocab_size: int, rows: int) -> float:
    """Seconds of the fastest of a few iterations in which so many jobs decode, at the shortest contexts.

    The executor must be idle; its slots and blocks are used from 0 on and given back. Raises what the executor raises.
    """
    bench = _Bench(executor, config, vocab_size, False, None)
    bench.warm_up()
    for _ in range(_DECODE_ROUNDS):
        bench.batch(rows, decodes=_DECODES)
    bench.close()
    return min(seconds for _, seconds in bench.samples)


def measure_link(executor: Executor, num_blocks: int, num_host_blocks: int) -> Link | None:
    """Copy one block and a few to the host and back, and take the fastest of several times; None without a host pool.

    The executor must be idle, and is idle afterwards; the device's blocks keep what they hold, the host's do not. Takes
    at most about 0.2 seconds, or what one block takes there and back. Raises what the executor raises, and RuntimeError
    when it loses a copy.
    """
    if num_host_blocks == 0:
        return None
    many = min(_COPY_BLOCKS, num_blocks, num_host_blocks)
    fastest: dict[tuple[int, int], float] = {}  # (direction, blocks) → seconds
    spent, plan_id = 0.0, 0
    for blocks in sorted({1, many}) * _COPY_REPEATS:
        if fastest and spent + blocks * (fastest[OFFLOAD, 1] + fastest[UPLOAD, 1]) > _LINK_SECONDS:
            continue
        for direction in (OFFLOAD, UPLOAD):
            seconds = _copy(executor, plan_id, direction, blocks)
            fastest[direction, blocks] = min(seconds, fastest.get((direction, blocks), seconds))
            spent += seconds
            plan_id += 1
    offload, upload = (
        _block_seconds(many, fastest[direction, 1], fastest.get((direction, many))) for direction in (OFFLOAD, UPLOAD)
    )
    first = (fastest[OFFLOAD, 1] - offload + fastest[UPLOAD, 1] - upload) / 2
    return Link(offload_block=offload, upload_block=upload, latency=max(0.0, first))


def _copy(executor: Executor, number: int, direction: int, blocks: int) -> float:
    """Seconds of one copy of blocks 0 … blocks - 1 to the same places in the other pool, which is waited for."""
    copies = np.array([(number, direction, block, block) for block in range(blocks)], np.int32)
    result = _run(executor, BatchPlan(plan_id=number, copies=copies))
    if result.copies.tolist() != [number]:
        raise RuntimeError(f"a plan of copy {number} alone ended with the copies {result.copies.tolist()}")
    return float(result.copy_seconds[0])


def _block_seconds(many: int, one: float, all_: float | None) -> float:
    """What each further block adds, from the seconds of one and of many; noise must not make it nothing."""
    if many == 1 or all_ is None:
        return one
    return (all_ - one) / (many - 1) if all_ > one else all_ / many


def _run(executor: Executor, plan: BatchPlan) -> StepResult:
    executor.submit(plan)
    while (result := executor.poll(None)) is None:
        pass
    return result


class _Bench:
    """Issues legal plans (positions in order, tables that grow) and keeps what they cost."""

    def __init__(
        self,
        executor: Executor,
        config: SchedulerConfig,
        vocab_size: int,
        full: bool,
        on_sample: Callable[[list[tuple[int, int]], float], None] | None,
    ) -> None:
        self._samples: dict[tuple[tuple[int, int], ...], float] = {}  # by rows
        self._executor = executor
        self._config = config
        self._vocab_size = vocab_size
        self._budget, self._repeats = (_FULL_SECONDS, _FULL_REPEATS) if full else (_QUICK_SECONDS, _QUICK_REPEATS)
        self._typical: Callable[[list[float]], float] = median if full else min
        self._spent = 0.0
        self._on_sample = on_sample
        self._plan_id = 0
        self._used_blocks = 0
        self._tables: list[int] = []  # how many blocks each open slot has
        self._computed: list[int] = []  # how many positions of each open slot are done
        self._closed: list[int] = []

    @property
    def samples(self) -> list[Sample]:
        return [(list(rows), seconds) for rows, seconds in self._samples.items()]

    def warm_up(self) -> None:
        """First iterations pay for page faults and lazy set-up, so they are not samples."""
        self._open(1)
        self._run([1])
        self._samples.clear()
        self._spent = 0.0

    def batch(self, slots: int, decodes: int, *, context: int = 0) -> None:
        """Decodes of `slots` jobs (at most those that fit in an iteration) at the shortest contexts, then at `context`.

        Many rows of some context read more than one row of a long one does, for the same number of positions.
        """
        slots = min(slots, self._config.max_num_seqs)
        self._open(slots)
        for _ in range(decodes):
            self._run([1] * slots)
        chunk = min(_BATCH_CHUNK, self._config.max_num_batched_tokens // slots)
        while self._computed[0] < context:
            if not self._run([chunk] * slots):
                return
        for _ in range(decodes if context else 0):
            self._run([1] * slots)

    def mixed(self, decoding: int, prompts: int, tokens: int) -> None:
        """Prompts beside decodes, in one iteration, where that is allowed."""
        if decoding + prompts <= self._config.max_num_seqs:
            self._open(decoding + prompts)
            self._run([1] * decoding + [tokens] * prompts)

    def one_job(self, chunk: int, decodes: int) -> None:
        """One job's prefill in chunks to the longest context, then a few decodes there."""
        self._open(1)
        chunk = min(chunk, self._config.max_num_batched_tokens)
        for _ in range(_CHUNKS):
            if not self._run([chunk]):
                break
        for _ in range(decodes):
            self._run([1])

    def growing_job(self, chunk: int) -> None:
        """One job's prefill in chunks each twice as long as the one before, and a decode behind each."""
        self._open(1)
        for _ in range(_CHUNKS):
            if not (self._run([min(chunk, self._config.max_num_batched_tokens)]) and self._run([1])):
                break
            chunk *= 2

    def close(self) -> None:
        """Close every slot with a plan that has no rows."""
        self._open(0)
        self._submit(BatchPlan(plan_id=0, closed=np.array(self._closed, np.int32)))

    def _open(self, slots: int) -> None:
        """Start over with `slots` empty jobs."""
        self._closed += range(sum(1 for computed in self._computed if computed))
        self._tables, self._computed, self._used_blocks = [0] * slots, [0] * slots, 0

    def _run(self, tokens: Sequence[int]) -> bool:
        """One iteration of so many more tokens of each open job; False, and nothing run, where that is too much."""
        config, jobs = self._config, len(self._computed)
        slots = [slot for slot in range(jobs) if tokens[slot]]
        rows = [(self._computed[slot], tokens[slot]) for slot in slots]
        ends = [start + count for start, count in zip(self._computed, tokens, strict=True)]
        tables = [-(-end // config.block_size) for end in ends]
        added = [(slot, i) for slot in range(jobs) for i in range(self._tables[slot], tables[slot])]
        if (
            max(ends) > config.max_model_len
            or sum(tokens) > config.max_num_batched_tokens
            or self._used_blocks + len(added) > config.num_blocks
            or (self._samples and self._spent + self._repeats * self._expected(rows) > self._budget)
        ):
            return False
        new = [slot for slot in slots if not self._computed[slot]]
        plan = BatchPlan(
            plan_id=0,  # numbered as it is submitted
            rows=np.array([(slot, *row, 1) for slot, row in zip(slots, rows, strict=True)], np.int32),
            tokens=np.fromiter(islice(cycle(range(self._vocab_size)), sum(tokens)), np.int32),
            opened=np.array([(slot, 1, 0, 0, -1, 0, 0, 0) for slot in new], np.int32).reshape(-1, 8),
            opened_params=np.array([_DEFAULTS for _ in new], np.float32).reshape(-1, 6),
            opened_seeds=np.zeros(len(new), np.uint64),
            closed=np.array(self._closed, np.int32),
            table=np.array(
                [(slot, i, self._used_blocks + block) for block, (slot, i) in enumerate(added)], np.int32
            ).reshape(-1, 3),
        )
        self._closed = []
        again = BatchPlan(plan_id=0, rows=plan.rows, tokens=plan.tokens)  # the same positions, computed over
        times = [self._submit(each).seconds for each in (plan, *[again] * (self._repeats - 1))]
        self._spent += sum(times)
        seconds = self._typical(times)
        self._computed, self._tables = ends, tables
        self._used_blocks += len(added)
        self._samples[tuple(rows)] = min(seconds, self._samples.get(tuple(rows), seconds))
        if self._on_sample is not None:
            self._on_sample(rows, seconds)
        return True

    def _submit(self, plan: BatchPlan) -> StepResult:
        numbered = replace(plan, plan_id=self._plan_id)
        self._plan_id += 1
        return _run(self._executor, numbered)

    def _expected(self, rows: list[tuple[int, int]]) -> float:
        """What the model so far says; at first, nothing is known and anything is allowed."""
        return CostModel.fit(self.samples).iteration_seconds(rows) if self._samples else 0.0
