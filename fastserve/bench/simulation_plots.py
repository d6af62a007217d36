"""Simulated runs as a picture, on the paper's axes: rate or load against normalized latency and completion times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plot_style import COLOURS, GRID, INK, QUIET, STYLE, plain
from .simulation import RunSummary
from .simulation_tables import NO_STEADY_STATE, Level, levels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SLO = 0.3  # seconds a token: what the paper calls acceptable

_MARKERS = "osD^v"
_PANELS = (
    ("mean_normalized_latency", "Mean normalized latency", "seconds per token"),
    ("mean_jct", "Mean job completion time", "seconds"),
    ("p95_jct", "P95 job completion time", "seconds"),
)


def plot_sweep(runs: Sequence[RunSummary], path: Path, title: str) -> None:
    """Write a picture, of the kind that the file's name ends in: a panel a measure, a line a policy.

    Bars are 95 % confidence intervals over seeds, where there are several. Raises OSError where the file cannot be
    written, and ValueError for an ending that no picture has.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    levels = levels_of(runs)
    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.10, wspace=0.03)
        figure = Figure(figsize=(13.5, 4.8), layout=layout)
        figure.suptitle(title, x=0.012, ha="left", fontsize=11, color=QUIET)
        panels = figure.subplots(1, len(_PANELS))
        for axes, (measure, name, unit) in zip(panels, _PANELS, strict=True):
            _panel(axes, levels, measure)
            axes.set_title(name, loc="left", fontweight="bold", fontsize=11)
            axes.set_ylabel(unit)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, facecolor="white")


def _panel(axes: Axes, levels: Sequence[Level], measure: str) -> None:
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    by_load = levels[0].load is not None
    values: list[float] = []
    for i, policy in enumerate(levels[0].runs):
        points = sorted(
            ((_position(level), level.estimate(policy, measure)) for level in levels), key=lambda point: point[0]
        )
        means = [value.mean for _, value in points]
        widths = [value.half_width or 0.0 for _, value in points]
        # On a logarithmic axis, a bar must not reach 0.
        below = [min(width, 0.95 * mean) for width, mean in zip(widths, means, strict=True)]
        axes.errorbar(
            [x for x, _ in points],
            means,
            yerr=(below, widths) if any(widths) else None,
            color=COLOURS.get(policy, INK),
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=4.5,
            linewidth=2.0,
            capsize=2.5,
            label=policy,
        )
        values += means
    if max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    if measure == "mean_normalized_latency" and max(values) > SLO > 0.5 * min(values):
        axes.axhline(SLO, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate(f"{SLO} s/token", (0.99, SLO), color=QUIET, fontsize=8.5, **place)
    if by_load and max(level.load or 0.0 for level in levels) >= 1:
        _shade_overload(axes, levels)
    axes.set_xlabel("load (share of fcfs's capacity)" if by_load else "jobs per second")
    axes.grid(color=GRID, linewidth=0.8)
    plain(axes)


def _shade_overload(axes: Axes, levels: Sequence[Level]) -> None:
    loads = [level.load or 0.0 for level in levels]
    margin = 0.05 * (max(loads) - min(loads)) or 0.05
    axes.set_xlim(min(loads) - margin, max(loads) + margin)
    axes.axvspan(max(1.0, min(loads) - margin), max(loads) + margin, color="#f4f5f7", zorder=-1, linewidth=0)
    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "ha": "right", "va": "bottom"}
    axes.annotate(NO_STEADY_STATE, (max(loads) + 0.9 * margin, 0.02), color=QUIET, fontsize=8, **place)


def _position(level: Level) -> float:
    """On the horizontal axis: load or jobs a second; of a trace at its own rate, as they were served."""
    if level.load is not None:
        return level.load
    return next(iter(level.runs.values()))[0].jobs_per_second if level.rate is None else level.rate
