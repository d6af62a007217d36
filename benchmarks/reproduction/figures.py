"""The experiments' figures, in one style."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fastserve.bench.plot_style import COLOURS, GRID, INK, QUIET, STYLE
from fastserve.bench.plot_style import plain as plain_frame
from fastserve.bench.stats import Estimate

_MARKERS: Final = dict(zip(COLOURS, "xos^Dv", strict=True))


@contextmanager
def canvas(path: Path, title: str, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure to draw on, written to `path` at the end."""
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.012, ha="left", fontsize=11, color=QUIET)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, facecolor="white", metadata=metadata)


def legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def plain(axes: Axes, title: str = "") -> None:
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.grid(color=GRID, linewidth=0.8)
    plain_frame(axes)


def logarithmic(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, at 1, 2 and 5 of each decade."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def line(axes: Axes, policy: str, xs: Sequence[float], values: Sequence[Estimate], **more: Any) -> None:
    """A policy's means, with their confidence intervals; on a logarithmic axis, no bar reaches 0."""
    means = [value.mean for value in values]
    widths = [value.half_width or 0.0 for value in values]
    below = [min(width, 0.9 * mean) for width, mean in zip(widths, means, strict=True)]
    style: dict[str, Any] = {"label": policy, "linewidth": 1.8, "markersize": 4.5, "capsize": 2.5}
    style |= {"color": COLOURS.get(policy, INK), "marker": _MARKERS.get(policy, "o")}
    axes.errorbar(xs, means, yerr=(below, widths), **style | more)


def over_loads(
    path: Path,
    title: str,
    loads: Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[Estimate]]],
) -> None:
    """A panel a measure, a line a policy."""
    with canvas(path, title, (4.4 * len(panels), 4.2)) as figure:
        for axes, (name, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for policy, estimates in lines.items():
                # Orca is often the same as fcfs, and must not hide behind it.
                line(axes, policy, loads, estimates, **({"linestyle": ":", "zorder": 5} if policy == "orca" else {}))
            axes.set_yscale("log")
            logarithmic(axes.yaxis)
            axes.set_xlabel("load (share of fcfs's capacity)")
            axes.set_ylabel("seconds")
            plain(axes, name)
        legend_below(figure, figure.axes[0])
