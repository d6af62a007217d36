"""The demo's picture: who ran when under each policy, and how long everybody took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .plot_style import GRID, INK, QUIET, STYLE, plain
from .runs import JobRun, PolicyRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WAITING = "#e3e6ec"
_KINDS = ("#0f8b8d", "#e07a3f", "#7c5cbf", "#5b8def")  # colours of job kinds
_POLICIES = ("#9aa1ad", "#2f5bea", "#b0399b", "#0f8b8d")  # colours of policies, the baseline quiet


def plot_runs(runs: Sequence[PolicyRun], path: Path, title: str) -> None:
    """Write a PNG: one timeline a policy on top, below it the JCT distribution and mean JCTs by kind of job.

    Jobs are drawn in order of arrival, the first on top. Raises OSError where the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    kinds = sorted({job.kind for job in runs[0].jobs})
    colours = {kind: _KINDS[i % len(_KINDS)] for i, kind in enumerate(kinds)}
    columns = max(2, len(runs))
    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.10, wspace=0.02, hspace=0.03)
        figure = Figure(figsize=(6.2 * columns, 8.6), layout=layout)
        figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        swatches = [_swatch(colour, f"{kind} running") for kind, colour in colours.items()] + [
            _swatch(_WAITING, "waiting")
        ]
        figure.legend(handles=swatches, loc="upper right", ncols=len(swatches), frameon=False)
        grid = figure.add_gridspec(2, columns, height_ratios=(1.45, 1.0))
        end = max(run.makespan for run in runs)
        for column, run in enumerate(runs):
            _timeline(figure.add_subplot(grid[0, column]), run, colours, end, labelled=column == 0)
        _distribution(figure.add_subplot(grid[1, 0]), runs)
        _means(figure.add_subplot(grid[1, 1:]), runs, kinds)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=150, facecolor="white")


def _timeline(axes: Axes, run: PolicyRun, colours: dict[str, str], end: float, *, labelled: bool) -> None:
    """One line a job: pale from arrival to last token, coloured while it is in the batch."""
    from matplotlib.collections import LineCollection

    order = sorted(run.jobs, key=lambda job: job.metrics.arrival)
    width = max(1.2, 230 / len(order))
    waits = [[(job.metrics.arrival, y), (job.metrics.finish or job.metrics.arrival, y)] for y, job in enumerate(order)]
    axes.add_collection(LineCollection(waits, colors=_WAITING, linewidths=width, capstyle="butt"))
    for kind, colour in colours.items():
        spans = [[(a, y), (b, y)] for y, job in enumerate(order) if job.kind == kind for a, b in job.spans]
        axes.add_collection(LineCollection(spans, colors=colour, linewidths=width, capstyle="butt"))
    axes.set(xlim=(0, end * 1.01), ylim=(len(order) - 0.2, -0.8), xlabel="seconds", yticks=[])
    if labelled:
        axes.set_ylabel("jobs, in order of arrival")
    mean = run.summaries()["jct"].mean
    axes.set_title(f"{run.policy}", loc="left", fontweight="bold", fontsize=11)
    axes.set_title(f"mean JCT {mean:.1f} s", loc="right", color=QUIET, fontsize=9.5)
    plain(axes, left=False)


def _distribution(axes: Axes, runs: Sequence[PolicyRun]) -> None:
    """The share of jobs that finished within a given time."""
    top = 0.0
    for run, colour in zip(runs, _cycle(len(runs)), strict=True):
        jcts = np.sort(_jcts(run.jobs))
        share = np.arange(1, jcts.size + 1) / jcts.size
        axes.step(np.r_[0.0, jcts], np.r_[0.0, share], where="post", color=colour, linewidth=2.2, label=run.policy)
        top = max(top, float(jcts[-1]))
    axes.set(xlim=(0, top * 1.02), ylim=(0, 1.02), xlabel="job completion time (seconds)", ylabel="share of jobs")
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_title("Finished within", loc="left", fontweight="bold", fontsize=11)
    axes.grid(color=GRID, linewidth=0.8)
    plain(axes)
    axes.legend(loc="lower right", frameon=False)


def _means(axes: Axes, runs: Sequence[PolicyRun], kinds: Sequence[str]) -> None:
    """Who gains and who pays: the mean JCT of every kind of job under every policy."""
    groups = ["all jobs", *(f"{kind} jobs" for kind in kinds)]
    height = 0.8 / len(runs)
    longest = 0.0
    for i, (run, colour) in enumerate(zip(runs, _cycle(len(runs)), strict=True)):
        means = [run.summaries(kind)["jct"].mean for kind in (None, *kinds)]
        places = [group + (i - (len(runs) - 1) / 2) * height for group in range(len(groups))]
        bars = axes.barh(places, means, height=height * 0.88, color=colour, label=run.policy)
        axes.bar_label(bars, [f"{mean:.1f} s" for mean in means], padding=4, fontsize=9, color=INK)
        longest = max(longest, *means)
    axes.set_yticks(range(len(groups)), groups)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set(xlim=(0, longest * 1.14), ylim=(len(groups) - 0.45, -0.55), xlabel="seconds")
    axes.set_title("Mean job completion time", loc="left", fontweight="bold", fontsize=11)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    plain(axes, left=False)


def _jcts(jobs: Sequence[JobRun]) -> list[float]:
    return [job.metrics.jct for job in jobs if job.metrics.jct is not None]


def _cycle(count: int) -> list[str]:
    return [_POLICIES[i % len(_POLICIES)] for i in range(count)]


def _swatch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)
