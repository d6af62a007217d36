"""Simulated runs on a terminal: means over seeds with their confidence, policy by policy, and who ran when."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .simulation import RunSummary, TimelineJob
from .stats import Estimate, estimate
from .tables import new_table, number, ratio_text

NO_STEADY_STATE = "finite trace: no steady state"

_MEASURES = {
    "mean_jct": "mean JCT (s)",
    "p95_jct": "P95 (s)",
    "p99_jct": "P99 (s)",
    "mean_ttft": "TTFT (s)",
    "mean_normalized_latency": "s/token",
    "mean_program_completion": "program (s)",
    "p95_program_completion": "program P95",
}
_COMPARED = ("mean_jct", "p95_jct", "p99_jct", "mean_program_completion")
# What a narrow terminal does without, first to go first; a ratio is named like its measure, with ×.
_DISPENSABLE = (
    "preempted", "× p99_jct", "mean_ttft", "swapped", "p99_jct", "mean_normalized_latency", "p95_program_completion",
    "× p95_jct", "p95_jct", "cached", "× mean_program_completion",
)  # fmt: skip
_MOST_USERS = 12  # that a table shows
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Level:
    """Runs at one rate or one load, by policy; those of a policy differ in their seeds."""

    load: float | None
    rate: float | None  # None: a trace's own; where there is a load, the mean over the seeds
    runs: dict[str, list[RunSummary]]

    @property
    def steady(self) -> bool:
        return self.load is None or self.load < 1

    def estimate(self, policy: str, measure: str) -> Estimate:
        return estimate([getattr(run, measure) for run in self.runs[policy]])

    @property
    def title(self) -> str:
        rate = "the trace's own rate" if self.rate is None else f"{number(self.rate)} jobs/s"
        parts = [rate] if self.load is None else [f"load {self.load:g}", rate]
        return " · ".join(parts if self.steady else [*parts, NO_STEADY_STATE])


def levels_of(runs: Sequence[RunSummary]) -> list[Level]:
    """Runs by rate or load, each in the order in which it first appears."""
    grouped: dict[tuple[float | None, float | None], dict[str, list[RunSummary]]] = {}
    for run in runs:
        key = (run.load, None) if run.load is not None else (None, run.rate)
        grouped.setdefault(key, {}).setdefault(run.policy, []).append(run)
    levels = []
    for (load, rate), by_policy in grouped.items():
        if load is not None:
            rate = estimate([run.rate or 0.0 for run in next(iter(by_policy.values()))]).mean
        levels.append(Level(load, rate, by_policy))
    return levels


def level_table(level: Level, without: Collection[str] = ()) -> Table:
    """A line a policy; ratios say how many times smaller a value is than the first policy's."""
    first = next(iter(level.runs))
    columns: dict[str, tuple[str, list[str | Text]]] = {}
    for measure, heading in _MEASURES.items():
        if any(getattr(run, measure) is None for runs in level.runs.values() for run in runs):
            continue
        estimates = {policy: level.estimate(policy, measure) for policy in level.runs}
        columns[measure] = heading, [estimate_text(each) for each in estimates.values()]
        if measure in _COMPARED and len(level.runs) > 1:
            baseline = estimates[first].mean
            ratios = [ratio_text(baseline, each.mean) for each in list(estimates.values())[1:]]
            columns[f"× {measure}"] = "", ["", *ratios]
    preempted = [f"{sum(run.preemptions for run in runs) / len(runs):.0f}" for runs in level.runs.values()]
    columns["preempted"] = "preempted", [*preempted]
    if any(run.swapped_blocks for runs in level.runs.values() for run in runs):
        columns["swapped"] = "swapped", [_swapped(runs) for runs in level.runs.values()]

    if all(run.hit_rate is not None for runs in level.runs.values() for run in runs):
        found = [level.estimate(policy, "hit_rate").mean for policy in level.runs]
        bounds = [level.estimate(policy, "hit_rate_bound").mean for policy in level.runs]
        columns["cached"] = (
            "cached",
            [f"{100 * share:.1f} of {100 * bound:.1f} %" for share, bound in zip(found, bounds, strict=True)],
        )

    table = new_table()
    table.title, table.title_justify, table.title_style = level.title, "left", "bold"
    table.add_column("policy", no_wrap=True)
    shown = [column for name, column in columns.items() if name not in without]
    for heading, _ in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for row, policy in enumerate(level.runs):
        table.add_row(policy, *(cells[row] for _, cells in shown))
    return table


def users_table(level: Level) -> Table | None:
    """P95 of each user's JCT, a line a policy; None where there is one user or too many."""
    users = list(dict.fromkeys(user for runs in level.runs.values() for run in runs for user in run.users or ()))
    if not 2 <= len(users) <= _MOST_USERS:
        return None
    table = new_table()
    table.add_column("P95 JCT (s)", no_wrap=True)
    for user in users:
        table.add_column(Text(user), justify="right", no_wrap=True)
    for policy, runs in level.runs.items():
        cells = []
        for user in users:
            values = [run.users[user]["p95_jct"] for run in runs if run.users and user in run.users]
            cells.append(estimate_text(estimate(values)) if values else "–")
        table.add_row(policy, *cells)
    return table


def estimate_text(value: Estimate) -> str:
    """`4.23 ±3%`: the interval as a share of the mean."""
    if value.half_width is None or value.mean == 0:
        return number(value.mean)
    return f"{number(value.mean)} ±{100 * value.half_width / value.mean:.0f}%"


def print_runs(console: Console, runs: Sequence[RunSummary], notes: Sequence[str] = ()) -> None:
    """Every level's table, and below them what they mean."""
    levels = levels_of(runs)
    without = _left_out(console, levels)
    for level in levels:
        console.print(level_table(level, without))
        if (users := users_table(level)) is not None:
            console.print(users)
    seeds = len({run.seed for run in runs})
    policies = list(levels[0].runs)
    explained = list(notes)
    if seeds > 1:
        explained.append(f"means over {seeds} seeds ± 95 % confidence interval")
    if len(policies) > 1:
        explained.append(f"× is how many times better than {policies[0]}")
    if any(run.hit_rate is not None for run in runs):
        explained.append("cached: of prompts' tokens, and of what a cache would find that forgets nothing")
    if explained:
        console.print(f"[dim]{' · '.join(explained)}[/]", soft_wrap=True)


def _left_out(console: Console, levels: Sequence[Level]) -> set[str]:
    """The columns for which the console is too narrow."""
    without: set[str] = set()
    unlimited = console.options.update(max_width=1000)
    for name in _DISPENSABLE:
        widest = max(console.measure(level_table(level, without), options=unlimited).maximum for level in levels)
        if widest <= console.width:
            break
        without.add(name)
    return without


def print_timelines(console: Console, runs: Sequence[RunSummary]) -> None:
    """For every run, a line a job: when it ran, and when it waited. All runs share one scale."""
    end = max(job.finish for run in runs for job in run.timeline or ())
    for run in runs:
        jobs = run.timeline or []
        labels = [f"{job.job}" for job in jobs]
        spare = max(map(len, labels)) + 14
        width = max(20, console.width - spare)
        title = f"{run.policy} · seed {run.seed} · mean JCT {number(run.mean_jct)} s"
        console.print(f"\n[bold]{title}[/]  [dim]{number(end / width)} s a column[/]", soft_wrap=True)
        for label, job in zip(labels, jobs, strict=True):
            bar = gantt(job, end, width)
            line = Text(f"{label:>{spare - 14}} ", style="dim")
            line.append_text(Text(bar, style="cyan")).append(f" {number(job.finish - job.arrival):>8} s", style="dim")
            console.print(line, soft_wrap=True)
    console.print("[dim]█ runs all of the time · ▒ some of it · · waits[/]")


def gantt(job: TimelineJob, end: float, width: int) -> str:
    """The job in `width` columns from 0 to `end` seconds."""
    column = end / width
    ran = [0.0] * width
    for start, finish in job.spans:
        last = min(width - 1, int(finish / column))
        for at in range(min(width - 1, int(start / column)), last + 1):
            ran[at] += max(0.0, min(finish, (at + 1) * column) - max(start, at * column))
    cells = []
    for at, seconds in enumerate(ran):
        there = min(job.finish, (at + 1) * column) - max(job.arrival, at * column)
        if there <= 1e-9 * column:
            cells.append(" ")
        elif seconds >= 0.999 * there:
            cells.append("█")
        else:
            cells.append("▒" if seconds > 1e-9 * column else "·")
    return "".join(cells)


def _swapped(runs: Sequence[RunSummary]) -> str:
    sizes = [run.swapped_bytes for run in runs if run.swapped_bytes is not None]
    if len(sizes) < len(runs):
        return f"{sum(run.swapped_blocks for run in runs) / len(runs):.0f} blocks"
    size, unit = sum(sizes) / len(sizes), 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{number(size)} {_UNITS[unit]}"
