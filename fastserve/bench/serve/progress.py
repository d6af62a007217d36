"""What a terminal shows while a server is under load."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .experiment import Watcher
from .replay import Standing
from .results import ServeRun
from .target import Target


class Bar(Watcher):
    """A line a run, drawn by the loop that receives tokens, twice a second: a thread that draws would hold them up."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("[dim]·[/] {task.fields[open]} open {task.fields[more]}"),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
        )

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def began(self, target: Target, rate: float | None, round: int, jobs: int) -> None:
        at = "" if rate is None else f" at {rate:g} jobs/s"
        self._task = self._progress.add_task(f"{target.name}{at}", total=jobs, open=0, more="")
        self._progress.refresh()

    def standing(self, standing: Standing) -> None:
        more = f"[dim]·[/] {standing.waiting} waiting here" if standing.waiting else ""
        if standing.failed:
            more += f" [dim]·[/] [red]{standing.failed} failed[/]"
        self._progress.update(self._task, completed=standing.ended, open=standing.open, more=more)
        self._progress.refresh()

    def ended(self, run: ServeRun) -> None:
        ended = run.summary["completed"] + run.summary["failed"]
        self._progress.update(self._task, completed=ended, open=0)
        self._progress.refresh()
