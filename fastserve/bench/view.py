"""What a terminal shows while a trace runs: progress, the queue, and answers as they come."""

from __future__ import annotations

from collections import deque
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .runs import Iteration

_ANSWERS = 6  # lines of finished jobs on show
_WINDOW = 2.0  # seconds over which tokens/s is measured


class TraceView:
    """Live progress of one run; a context manager. Prints its last state where the output is no terminal."""

    def __init__(self, console: Console, policy: str, jobs: int) -> None:
        self._interactive = console.is_terminal
        self._answers: deque[tuple[float, str, str]] = deque(maxlen=_ANSWERS)
        self._recent: deque[tuple[float, int]] = deque()  # (completed, tokens) of the last iterations
        self._tokens = 0  # of finished jobs
        self._began = self._ended = 0.0  # on the engine's clock
        self._progress = Progress(
            TextColumn("[bold]{task.description}[/]"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn(
                "[dim]·[/] {task.fields[running]} running [dim]·[/] {task.fields[waiting]:>3} waiting [dim]·[/]"
            ),
            TextColumn("{task.fields[rate]:>3.0f} tokens/s"),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task(f"{policy:<14}", total=jobs, running=0, waiting=0, rate=0.0)
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render)

    def __enter__(self) -> TraceView:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._answers.clear()
        elapsed = self._ended - self._began
        self._progress.update(self._task, running=0, waiting=0, rate=self._tokens / elapsed if elapsed else 0.0)
        self._live.stop()

    def iteration(self, iteration: Iteration) -> None:
        """Note an iteration that completed; one outside the context is none of this run."""
        if not self._live.is_started:
            return
        now = self._ended = iteration.completed
        self._began = self._began or iteration.submitted
        self._recent.append((now, iteration.decode_tokens))
        while self._recent[0][0] < now - _WINDOW:
            self._recent.popleft()
        rate = sum(tokens for _, tokens in self._recent) / _WINDOW
        self._progress.update(self._task, running=len(iteration.job_ids), waiting=iteration.waiting, rate=rate)

    def finished(self, jct: float, title: str, text: str, tokens: int) -> None:
        """Note a finished job: its completion time in seconds, what it asked and its answer of so many tokens."""
        self._progress.advance(self._task)
        self._tokens += tokens
        self._answers.append((jct, title, " ".join(text.split())))

    def refresh(self) -> None:
        """Draw now; it happens by itself four times a second."""
        self._live.refresh()

    def _render(self) -> Group:
        if not self._interactive or not self._answers:
            return Group(self._progress)
        answers = Table.grid(padding=(0, 1))
        answers.add_column(justify="right", style="dim", no_wrap=True)
        answers.add_column(no_wrap=True, overflow="ellipsis", ratio=2)
        answers.add_column(no_wrap=True, overflow="ellipsis", ratio=3, style="italic")
        answers.expand = True
        for jct, title, text in self._answers:
            answers.add_row(f"{jct:6.2f} s", Text(title), Text(text))
        return Group(self._progress, Text(), answers)
