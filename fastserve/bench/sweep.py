"""Many simulated runs: policies × rates × seeds, over processes, in an order that never depends on them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from ..types import InvalidRequest
from ..workloads.synthetic import MAX_RATE, MIN_RATE
from .simulation import CAPACITY_JOBS, Point, RunSummary, Setting, capacity, run

Result = TypeVar("Result")
Task = Callable[..., Result]  # takes `on_finished`, to be told of the number of jobs that have ended
Progress = Callable[[float], None]  # hears the share of the work that is done, 0 … 1

_POLL_SECONDS = 0.2  # between two looks at how far the processes are
_TELL_EVERY = 64  # jobs
_WORTH_PROCESSES = 1000  # jobs in all: fewer are done before another process has started


@dataclass(frozen=True)
class SweepResult:
    """All runs, by rate, then policy, then seed; and the capacities, where loads needed them."""

    runs: list[RunSummary]
    capacities: dict[int, float]  # jobs a second, by seed

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `fastserve simulate`."""
        capacities = [{"seed": seed, "jobs_per_second": rate} for seed, rate in self.capacities.items()]
        return {"runs": [run.as_dict() for run in self.runs], "capacities": capacities}


def sweep(
    setting: Setting,
    policies: Sequence[str],
    seeds: Sequence[int],
    *,
    rates: Sequence[float | None] = (),
    loads: Sequence[float] = (),
    workers: int | None = None,
    timeline: bool = False,
    progress: Progress | None = None,
) -> SweepResult:
    """Every policy at every rate and at every load, with every seed. A load is a share of the seed's own capacity.

    Several workers are processes, and what comes out does not depend on their number; None: one a core, or this process
    alone where there is little to do. Raises what a run raises.
    """
    measured = [partial(capacity, setting, seed) for seed in seeds] if loads else []
    points = len(policies) * len(seeds) * (len(rates) + len(loads))
    jobs = len(measured) * min(setting.jobs, CAPACITY_JOBS) + points * setting.jobs
    tell = None if progress is None else lambda ended: progress(min(1.0, ended / jobs))
    if workers is None:
        workers = _available_cores() if jobs >= _WORTH_PROCESSES else 1
    with _Pool(min(workers, max(points, len(measured))), len(measured) + points, tell) as pool:
        capacities = dict(zip(seeds, pool.run(measured), strict=True)) if measured else {}
        grid = [Point(policy, rate, seed) for rate in rates for policy in policies for seed in seeds]
        grid += [
            Point(policy, rate_of(load, capacities[seed]), seed, load)
            for load in loads
            for policy in policies
            for seed in seeds
        ]
        return SweepResult(pool.run([partial(run, setting, point, timeline=timeline) for point in grid]), capacities)


def rate_of(load: float, capacity: float) -> float:
    """Jobs a second that a load is. Raises InvalidRequest, naming the load, where no workload takes that rate."""
    rate = load * capacity
    if not MIN_RATE <= rate <= MAX_RATE:
        raise InvalidRequest(
            "load",
            f"{load:g} of the {capacity:g} jobs a second that were measured is a rate of {rate:g}, and a rate must be "
            f"between {MIN_RATE:g} and {MAX_RATE:g}",
        )
    return rate


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Pool:
    """Does tasks in this process, or with several workers in theirs; a context manager."""

    def __init__(self, workers: int, tasks: int, tell: Callable[[int], None] | None) -> None:
        # Fresh processes: a fork would copy the locks of the thread that draws the progress.
        context = multiprocessing.get_context("spawn")
        self._ended: Any = context.RawArray("q", tasks)  # jobs that have ended, by task
        self._begun = 0  # tasks
        self._tell = tell
        self._strangers = set(multiprocessing.active_children())
        self._executor = ProcessPoolExecutor(workers, context, _enter, (self._ended,)) if workers > 1 else None

    def run(self, tasks: Sequence[Task[Result]]) -> list[Result]:
        """Their results, in order. Raises the first exception, and leaves the tasks that have not begun."""
        first, self._begun = self._begun, self._begun + len(tasks)
        if self._executor is None:
            return [task(on_finished=partial(self._note, first + i)) for i, task in enumerate(tasks)]
        futures = [self._executor.submit(_perform, first + i, task) for i, task in enumerate(tasks)]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, _POLL_SECONDS if self._tell else None, FIRST_EXCEPTION)
            for future in done:
                future.result()
            if self._tell is not None:
                self._tell(sum(self._ended))
        return [future.result() for future in futures]

    def _note(self, task: int, ended: int) -> None:
        self._ended[task] = ended
        if self._tell is not None and ended % _TELL_EVERY == 0:
            self._tell(sum(self._ended))

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._executor is None:
            return
        if kind is not None:  # nobody wants to wait for the runs under way
            for process in set(multiprocessing.active_children()) - self._strangers:
                process.terminate()
        self._executor.shutdown(cancel_futures=True)


_own_ended: Any = None  # in a worker: the array of its _Pool


def _enter(ended: Any) -> None:
    global _own_ended
    _own_ended = ended
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is the parent's to explain


def _perform(number: int, task: Task[Result]) -> Result:
    def note(ended: int) -> None:
        _own_ended[number] = ended

    return task(on_finished=note)
