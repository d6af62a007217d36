"""What passes through an executor during a real run: the shapes of its iterations, and its copies of KV."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..engine import IterationRecord
from ..types import OFFLOAD, UPLOAD, BatchPlan, Executor, Int32Array, StepResult
from .runs import wall_spans


@dataclass(slots=True)
class WatchedCopy:
    """One copy of KV blocks."""

    direction: int
    blocks: int
    seconds: float | None = None  # on its stream; None until it is acknowledged


@dataclass(slots=True)
class WatchedIteration:
    """One iteration with rows."""

    starts: Int32Array  # position of each row's first token
    tokens: Int32Array  # of each row
    seconds: float = 0.0  # on the device

    @property
    def decodes(self) -> bool:
        """Whether every row is of one token."""
        return int(self.tokens.max()) == 1


class Watch:
    """An Executor around another."""

    def __init__(self, executor: Executor) -> None:
        self.iterations: list[WatchedIteration] = []  # in the order in which they ended
        self.copies: list[WatchedCopy] = []  # in the order in which they were submitted
        self._executor = executor
        self._by_plan: dict[int, WatchedIteration] = {}
        self._under_way: dict[int, WatchedCopy] = {}

    def submit(self, plan: BatchPlan) -> None:
        if len(plan.rows):
            self._by_plan[plan.plan_id] = WatchedIteration(plan.rows[:, 1].copy(), plan.rows[:, 2].copy())
        for copy, direction, _, _ in plan.copies.tolist():
            if copy not in self._under_way:
                self._under_way[copy] = WatchedCopy(direction, 0)
                self.copies.append(self._under_way[copy])
            self._under_way[copy].blocks += 1
        self._executor.submit(plan)

    def poll(self, timeout: float | None) -> StepResult | None:
        result = self._executor.poll(timeout)
        if result is None:
            return None
        if (iteration := self._by_plan.pop(result.plan_id, None)) is not None:
            iteration.seconds = result.seconds
            self.iterations.append(iteration)
        for copy, seconds in zip(result.copies.tolist(), result.copy_seconds.tolist(), strict=True):
            self._under_way.pop(copy).seconds = seconds
        return result


def stalled_seconds(iterations: Sequence[IterationRecord]) -> float:
    """Seconds in which the device stood still for KV to arrive or leave: the spans of iterations without rows while
    jobs were alive. An iteration's span begins when it was submitted, or when the one before it ended if that is later.
    """
    spans = zip(iterations, wall_spans(iterations), strict=True)
    return sum(end - start for iteration, (start, end) in spans if not iteration.job_ids and iteration.waiting)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapSummary:
    """What swapping was in one run. `hidden` is 1 - stalled_seconds / copy_seconds; None where nothing was copied."""

    offloads: int
    offloaded_blocks: int
    uploads: int
    uploaded_blocks: int
    copy_seconds: float  # of all copies, each on its stream
    stalled_seconds: float
    hidden: float | None
    median_upload_blocks: float
    median_upload_seconds: float
    median_iteration_seconds: float  # of iterations with rows

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def summarize_swapping(iterations: Sequence[IterationRecord], watch: Watch) -> SwapSummary:
    """Of a run that has ended. Copies that no result acknowledged while jobs were alive are left out."""
    done = [(copy, copy.seconds) for copy in watch.copies if copy.seconds is not None]
    uploads = [(copy, seconds) for copy, seconds in done if copy.direction == UPLOAD]
    offloads = [copy for copy, _ in done if copy.direction == OFFLOAD]
    seconds, stalled = sum(seconds for _, seconds in done), stalled_seconds(iterations)
    return SwapSummary(
        offloads=len(offloads),
        offloaded_blocks=sum(copy.blocks for copy in offloads),
        uploads=len(uploads),
        uploaded_blocks=sum(copy.blocks for copy, _ in uploads),
        copy_seconds=seconds,
        stalled_seconds=stalled,
        hidden=1.0 - stalled / seconds if seconds else None,
        median_upload_blocks=median([copy.blocks for copy, _ in uploads] or [0]),
        median_upload_seconds=median([taken for _, taken in uploads] or [0.0]),
        median_iteration_seconds=median([each.seconds for each in watch.iterations] or [0.0]),
    )


class OtherLoad:
    """Processors that other programs kept busy since this was made; how far a timing is to be trusted."""

    def __init__(self) -> None:
        self._start = _ticks()

    def cores(self) -> float | None:
        """Mean number of processors; None where the system does not tell."""
        end = _ticks()
        if self._start is None or end is None:
            return None
        busy, own, total = (after - before for before, after in zip(self._start, end, strict=True))
        return max(0.0, busy - own) / max(total, 1e-9) * (os.cpu_count() or 1)


def _ticks() -> tuple[float, float, float] | None:
    """Seconds since the machine started, summed over processors: busy with anything, with this process, and all."""
    try:
        fields = [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    own = os.times()
    scale = os.sysconf("SC_CLK_TCK")
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / scale, own.user + own.system, sum(fields) / scale


def modelled_ratio(iterations: Sequence[WatchedIteration], cost: Any) -> float | None:
    """Sum of the iterations' modelled seconds over the sum of those measured; None for none."""
    measured = sum(each.seconds for each in iterations)
    return sum(cost.plan_seconds(each.starts, each.tokens) for each in iterations) / measured if measured else None


def by_shape(iterations: Sequence[WatchedIteration]) -> dict[str, list[WatchedIteration]]:
    """Iterations grouped by what is in them, for telling where a cost model errs."""
    groups: dict[str, list[WatchedIteration]] = {}
    for each in iterations:
        rows = len(each.tokens)
        size = 1 << (rows - 1).bit_length()  # 1, 2, 3–4, 5–8, …
        span = f"{rows}" if size <= 2 else f"{size // 2 + 1}–{size}"
        if each.decodes:
            context = "short" if float(np.mean(each.starts)) < 256 else "long"
            name = f"decode, {span} rows, {context} contexts"
        else:
            name = f"with prefill, {'up to' if int(each.tokens.sum()) <= 64 else 'more than'} 64 tokens"
        groups.setdefault(name, []).append(each)
    return dict(sorted(groups.items()))
