"""Runs what is not known yet, in several processes, and keeps each result as soon as it is there."""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

_SAVE_SECONDS: Final = 5.0
_TELL_SECONDS: Final = {True: 5.0, False: 30.0}  # between two lines of progress, on a terminal and in a log

Value = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """`call(*arguments)` gives the result of what `what` names."""

    what: Value
    call: Callable[..., Value]
    arguments: tuple[Any, ...]

    @property
    def key(self) -> str:
        return _key(self.what)


def _key(what: Value) -> str:
    return json.dumps(what, sort_keys=True)


@dataclass
class Data:
    """The results of one experiment: a file of JSON, one point a line."""

    name: str
    quick: bool = False
    points: dict[str, tuple[Value, Value]] = field(default_factory=dict)  # what, result; by key

    @classmethod
    def load(cls, path: Path) -> Data:
        """An experiment without a file has no points yet."""
        if not path.exists():
            return cls(path.stem)
        stored = json.loads(path.read_text(encoding="utf-8"))
        points = {_key(what): (what, result) for what, result in stored["points"]}
        return cls(stored["experiment"], stored["quick"], points)

    def save(self, path: Path) -> None:
        """A reader never sees half a file."""
        lines = ",\n".join(json.dumps(pair, separators=(",", ":")) for pair in self.points.values())
        head = f'{{"experiment": {json.dumps(self.name)}, "quick": {json.dumps(self.quick)}, "points": [\n'
        draft = path.with_suffix(".draft")
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(f"{head}{lines}\n]}}\n", encoding="utf-8")
        draft.replace(path)

    def select(self, **wanted: Any) -> list[tuple[Value, Value]]:
        """The points that are of these values; None wants the key to be absent."""
        return [
            (what, result)
            for what, result in self.points.values()
            if all(what.get(name) == value for name, value in wanted.items())
        ]

    def values(self, measure: str, **wanted: Any) -> list[float]:
        """One measure of the points selected, by seed."""
        found = sorted(self.select(**wanted), key=lambda point: point[0].get("seed", 0))
        return [result[measure] for _, result in found if result.get(measure) is not None]


class Lab:
    """Does an experiment's tasks and keeps what comes of them in its data."""

    def __init__(self, data: Data, path: Path, workers: int) -> None:
        self.data = data
        self._path = path
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._used: set[str] = set()

    def run(self, tasks: Sequence[Task], label: str = "") -> list[Value]:
        """The tasks' results, in order; those known already are not done again. Raises what a task raises."""
        self._used.update(task.key for task in tasks)
        todo = list({task.key: task for task in tasks if task.key not in self.data.points}.values())
        if todo:
            try:
                self._do(todo, f"{self.data.name} {label}".strip())
            finally:
                self.data.save(self._path)
        return [self.data.points[task.key][1] for task in tasks]

    def forget_unused(self) -> None:
        """Drop points that the experiment, as it is now, has not asked for."""
        self.data.points = {key: point for key, point in self.data.points.items() if key in self._used}
        self.data.save(self._path)

    def _do(self, tasks: Sequence[Task], label: str) -> None:
        started = saved = time.monotonic()
        shown = -math.inf
        for done, (task, result) in enumerate(self._results(tasks), start=1):
            self.data.points[task.key] = task.what, result
            now = time.monotonic()
            if now - shown > _TELL_SECONDS[sys.stderr.isatty()] or done == len(tasks):
                left = (now - started) / done * (len(tasks) - done)
                print(f"{label}: {done}/{len(tasks)}, about {left:.0f} s left", file=sys.stderr, flush=True)
                shown = now
            if now - saved > _SAVE_SECONDS:
                self.data.save(self._path)
                saved = now

    def _results(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Value]]:
        """As they come."""
        if self._pool is None:
            for task in tasks:
                yield task, task.call(*task.arguments)
            return
        waiting: dict[Future[Value], Task] = {self._pool.submit(task.call, *task.arguments): task for task in tasks}
        pending = set(waiting)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting[future], future.result()

    @contextmanager
    def processes(self) -> Iterator[Lab]:
        """Within, tasks run in `workers` processes."""
        if self._workers == 1:
            yield self
            return
        with ProcessPoolExecutor(self._workers, multiprocessing.get_context("spawn")) as pool:
            self._pool = pool
            try:
                yield self
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            finally:
                self._pool = None
