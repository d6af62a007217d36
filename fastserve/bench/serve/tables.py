"""Runs against servers as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..tables import new_table, number, ratio_text
from .comparison import FIGURES, Level, compare
from .record import SHORT
from .results import STATISTICS, ServeRun, Slo, warnings

_LATENCIES: Final = {  # label and scale
    "jct": ("JCT (s)", 1.0),
    "ttft": ("TTFT (s)", 1.0),
    "tpot": ("TPOT (ms)", 1e3),
    "itl": ("Gap between tokens (ms)", 1e3),
    "normalized_latency": ("Normalized latency (ms/token)", 1e3),
}
_LOADS: Final = {
    "jobs_per_second": "jobs/s",
    "output_tokens_per_second": "output tokens/s",
    "total_tokens_per_second": "all tokens/s",
}


def print_runs(console: Console, title: str, runs: Sequence[ServeRun]) -> None:
    """One run in full; of several, how they compare, and what was wrong with each."""
    console.print(Text(title, style="bold"), soft_wrap=True)
    if len(runs) == 1:
        console.print(run_report(runs[0]), soft_wrap=False)
    else:
        for level in compare(runs):
            console.print(comparison_table(level))
        several = len({run.target.name for run in runs}) > 1
        rounds = max((run.round for run in runs), default=0) + 1
        notes = [f"medians of {rounds} rounds in turn"] if rounds > 1 else []
        notes += [f"× is how many times better than {runs[0].target.name}"] if several else []
        if notes:
            console.print(f"[dim]{escape(' · '.join(notes))}[/]", soft_wrap=True)
        for run in runs:
            if errors := run.summary["errors"]:
                console.print(Text(f"{_name(run)}:"), error_table(errors))
    for run in runs:
        for warning in warnings(run.summary):
            where = f"{_name(run)}: " if len(runs) > 1 else ""
            console.print(f"[yellow]{escape(where + warning)}[/]", soft_wrap=True)


def run_report(run: ServeRun) -> Group:
    """Everything about one run but its warnings."""
    summary = run.summary
    parts: list[RenderableType] = [
        Text(f"{run.target.model} at {run.target.base_url}", style="dim"),
        load_table(summary),
        latency_table(summary),
    ]
    if summary["errors"]:
        parts.append(error_table(summary["errors"]))
    if "goodput" in summary:
        goodput = summary["goodput"]
        share = "–" if goodput["share"] is None else f"{100 * goodput['share']:.1f} %"
        rate = "" if goodput["jobs_per_second"] is None else f", {number(goodput['jobs_per_second'])} jobs/s"
        parts.append(Text(f"goodput: {share} of jobs{rate} within {Slo(goodput['slo']).name}", style="bold"))
    parts.append(Text(" · ".join(_facts(summary)), style="dim"))
    return Group(*parts)


def load_table(summary: dict[str, Any]) -> Table:
    """What was offered, and what the server did of it."""
    table = new_table()
    table.add_column("load")
    table.add_column("offered", justify="right")
    table.add_column("achieved", justify="right")
    table.add_row("jobs", str(summary["jobs"]), str(summary["completed"]))
    for name, label in _LOADS.items():
        table.add_row(label, _cell(summary["offered"].get(name)), _cell(summary["achieved"][name]))
    return table


def latency_table(summary: dict[str, Any]) -> Table:
    """Of all jobs that were answered, and of short and long answers by themselves."""
    table = new_table()
    classes = {"latency": "all jobs", "short": f"≤ {SHORT} tokens", "long": f"> {SHORT} tokens"}
    table.add_column("")
    for statistic in STATISTICS:
        table.add_column(statistic.upper() if statistic.startswith("p") else statistic, justify="right")
    shown = [name for name in classes if summary[name]["jct"] is not None]
    if len(shown) == 2:  # all are of one class
        shown = ["latency"]
    for group in shown:
        if len(shown) > 1:
            count = summary[group]["jct"]["count"]
            table.add_row(Text(f"{classes[group]} ({count})", style="bold"))
        for measure, (label, scale) in _LATENCIES.items():
            values = summary[group][measure]
            if values is not None:
                last = measure == "normalized_latency"
                table.add_row(label, *(number(scale * values[each]) for each in STATISTICS), end_section=last)
    return table


def error_table(errors: Sequence[dict[str, Any]]) -> Table:
    """Failed jobs by what they failed of."""
    table = new_table()
    table.add_column("error", style="red", no_wrap=True)
    table.add_column("jobs", justify="right")
    table.add_column("the first one says", overflow="fold")
    for each in errors:
        table.add_row(Text(each["error"]), str(each["jobs"]), Text(each["detail"]))
    return table


def comparison_table(level: Level) -> Table:
    """A line a figure, a column a server, each but the first with how many times better it is."""
    table = new_table()
    title = "" if level.rate is None else f"{level.rate:g} jobs/s"
    table.title, table.title_justify, table.title_style = title, "left", "bold"
    table.add_column("")
    for i, server in enumerate(level.servers):
        table.add_column(Text(server.target), justify="right")
        if i:
            table.add_column("×", justify="right")
    for figure in FIGURES:
        if not any(figure.key in server.medians for server in level.servers):
            continue
        cells: list[str | Text] = []
        for i, server in enumerate(level.servers):
            value = server.medians.get(figure.key)
            cells.append(_cell(None if value is None else figure.scale * value))
            if i:
                better = server.better.get(figure.key)
                cells.append(Text("") if better is None else ratio_text(better, 1.0))
        table.add_row(figure.label, *cells)
    if any(server.failed for server in level.servers):
        failed: list[str | Text] = []
        for i, server in enumerate(level.servers):
            failed.append(Text(str(server.failed), style="bold red" if server.failed else ""))
            failed += [""] if i else []
        table.add_row("failed jobs", *failed)
    return table


def _facts(summary: dict[str, Any]) -> Iterator[str]:
    yield f"{number(summary['seconds'])} s"
    yield f"{summary['output_tokens']} tokens out"
    yield f"at most {summary['peak_open']} jobs at once"
    if summary["later"]["ttft"] is not None:
        yield f"TTFT of later calls {number(summary['later']['ttft']['mean'])} s"
    if summary["programs"] is not None:
        yield f"programs {number(summary['programs']['mean'])} s, P95 {number(summary['programs']['p95'])}"
    if summary["cached_share"] is not None:
        yield f"{100 * summary['cached_share']:.0f} % of prompts cached"
    if summary["other_length"]:
        yield f"{summary['other_length']} answers of another length than asked for"
    client = summary["client"]
    if client["late"] is not None:
        yield f"client: late by {1e3 * client['late']['p99']:.1f} ms at P99, {1e3 * client['late']['max']:.1f} at most"
    if client["cpu_microseconds_per_token"] is not None and client["cores"] is not None:
        yield f"{client['cpu_microseconds_per_token']:.0f} µs a token, {100 * client['cores']:.0f} % of a core"


def _name(run: ServeRun) -> str:
    rate = "" if run.rate is None else f", {run.rate:g} jobs/s"
    return f"{run.target.name}{rate}, round {run.round + 1}"


def _cell(value: float | None) -> str:
    return "–" if value is None else number(value)
