"""The look of all pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK: Final = "#1f2430"
QUIET: Final = "#6b7280"
GRID: Final = "#e7e9ee"
COLOURS: Final = {
    "orca": INK,
    "fcfs": "#9aa1ad",
    "mlfq": "#e07a3f",
    "skip-join-mlfq": "#2f5bea",
    "gittins": "#0f8b8d",
    "srpt": "#b0399b",
}
# For matplotlib's rc_context.
STYLE: Final[dict[Any, Any]] = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "svg.hashsalt": "fastserve",  # the same picture is the same file
}


def plain(axes: Axes, *, left: bool = True) -> None:
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["left"].set_visible(left)
