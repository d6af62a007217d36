"""Results as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from .runs import PolicyRun
from .summary import MEASURES, STATISTICS

_UNITS = {"jct": ("s", 2), "ttft": ("s", 2), "normalized_latency": ("s/token", 3)}
_NOTICEABLE = 1.05  # ratios nearer to one are left uncoloured


def new_table() -> Table:
    """An empty table in the house style."""
    return Table(box=box.SIMPLE_HEAD, header_style="dim")


def number(value: float) -> str:
    """With three digits that count, and never an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{min(9, max(0, 2 - math.floor(math.log10(abs(value)))))}f}"


def ratio_text(baseline: float, value: float) -> Text:
    """How many times smaller `value` is than `baseline`: green where it is, red where it is larger."""
    if value <= 0.0:
        return Text("–", style="dim")
    ratio = baseline / value
    style = "bold green" if ratio > _NOTICEABLE else "bold red" if ratio < 1 / _NOTICEABLE else ""
    return Text(f"{ratio:.2f}×", style=style)


def summary_table(summaries: Mapping[str, Mapping[str, float]]) -> Table:
    """JCT, TTFT and normalized latency of one run, given as dicts by measure and statistic."""
    table = new_table()
    table.add_column("")
    for statistic in STATISTICS:
        table.add_column(_heading(statistic), justify="right")
    for measure, label in MEASURES.items():
        unit, digits = _UNITS[measure]
        values = (summaries[measure][statistic] for statistic in STATISTICS)
        table.add_row(f"{label} ({unit})", *(f"{value:.{digits}f}" for value in values))
    return table


def compare_policies(runs: Sequence[PolicyRun]) -> Table:
    """JCT, TTFT and normalized latency of every run side by side, each with how it compares to the first."""
    baseline, *others = runs
    table = new_table()
    table.add_column("")
    table.add_column("")
    table.add_column(baseline.policy, justify="right", style="none")
    for run in others:
        table.add_column(run.policy, justify="right")
        table.add_column("better by", justify="right")
    summaries = [run.summaries() for run in runs]
    for measure, label in MEASURES.items():
        unit, digits = _UNITS[measure]
        for statistic in STATISTICS:
            first, *rest = (getattr(summary[measure], statistic) for summary in summaries)
            cells: list[str | Text] = [f"{first:.{digits}f}"]
            for value in rest:
                cells += [f"{value:.{digits}f}", ratio_text(first, value)]
            heading = f"{label} ({unit})" if statistic == STATISTICS[0] else ""
            table.add_row(heading, _heading(statistic), *cells, end_section=statistic == STATISTICS[-1])
    return table


def _heading(statistic: str) -> str:
    return statistic.upper() if statistic.startswith("p") else statistic
