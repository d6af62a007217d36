"""Runs against servers as a picture: how latencies are distributed, or how they grow with the rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..plot_style import GRID, INK, QUIET, STYLE, plain
from .comparison import FIGURES, Level, compare
from .results import ServeRun, sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS: Final = ("#2f5bea", "#e07a3f", "#0f8b8d", "#b0399b", "#9aa1ad", INK)
_MARKERS: Final = "osD^v"
_DISTRIBUTIONS: Final = (("jct", "Job completion time"), ("ttft", "Time to first token"), ("itl", "Gap between tokens"))
_CURVES: Final = ("mean_jct", "p95_jct", "mean_ttft", "mean_normalized_latency")
_WIDE: Final = 100.0  # largest ÷ smallest from which an axis is logarithmic


def plot_runs(runs: Sequence[ServeRun], path: Path, title: str) -> None:
    """Write a picture, of the kind that the file's name ends in.

    Of one rate: the share of answers within a time, a line a server. Of several: medians over rounds by rate. Raises
    OSError where the file cannot be written, and ValueError for an ending that no picture has.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    levels = compare(runs)
    by_rate = len(levels) > 1
    count = len(_CURVES) if by_rate else len(_DISTRIBUTIONS)
    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.10, wspace=0.03)
        figure = Figure(figsize=(4.5 * count, 4.8), layout=layout)
        figure.suptitle(title, x=0.012, ha="left", fontsize=11, color=QUIET)
        panels = figure.subplots(1, count)
        for i, axes in enumerate(panels):
            if by_rate:
                _curve(axes, levels, _CURVES[i])
            else:
                _distribution(axes, runs, *_DISTRIBUTIONS[i])
            axes.grid(color=GRID, linewidth=0.8)
            plain(axes)
        handles, labels = panels[0].get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, facecolor="white")


def _distribution(axes: Axes, runs: Sequence[ServeRun], measure: str, name: str) -> None:
    """Rounds of a server are put together."""
    largest, smallest = 0.0, np.inf
    for i, target in enumerate(dict.fromkeys(run.target.name for run in runs)):
        done = [record for run in runs if run.target.name == target for record in run.records if record.ok]
        values = np.sort(np.array(sample(measure, done)))
        if not values.size:
            continue
        share = np.arange(1, values.size + 1) / values.size
        colour = _COLOURS[i % len(_COLOURS)]
        axes.step(np.r_[values[0], values], np.r_[0.0, share], where="post", color=colour, linewidth=2.0, label=target)
        largest, smallest = max(largest, float(values[-1])), min(smallest, float(np.percentile(values, 5)))
    if smallest > 0 and largest > _WIDE * smallest:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.set(ylim=(0, 1.02), xlabel="seconds")
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_title(name, loc="left", fontweight="bold", fontsize=11)


def _curve(axes: Axes, levels: Sequence[Level], key: str) -> None:
    figure = next(each for each in FIGURES if each.key == key)
    drawn: list[float] = []
    for i, target in enumerate(server.target for server in levels[0].servers):
        points = sorted(
            (level.rate or 0.0, figure.scale * server.medians[key])
            for level in levels
            for server in level.servers
            if server.target == target and key in server.medians
        )
        look: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        axes.plot([x for x, _ in points], [y for _, y in points], label=target, linewidth=2.0, markersize=4.5, **look)
        drawn += [y for _, y in points]
    if drawn and max(drawn) > 20 * min(drawn) > 0:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("jobs per second")
    axes.set_title(figure.label, loc="left", fontweight="bold", fontsize=11)
