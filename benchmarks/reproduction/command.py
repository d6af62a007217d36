"""`python benchmarks/paper.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Final

import typer

from . import grid, headline, opt13b, opt175b, slowdown, swapping
from .common import Scale
from .lab import Data, Lab
from .page import data_path, render

EXPERIMENTS: Final[dict[str, ModuleType]] = {
    module.NAME: module for module in (headline, opt175b, opt13b, swapping, grid, slowdown)
}
_FOLDER: Final = Path(__file__).resolve().parents[2] / "docs" / "results"


def regenerate(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Run one experiment of {', '.join(EXPERIMENTS)}. Repeatable.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few jobs, to see that everything works; about a minute each.")
    ] = False,
    only_render: Annotated[
        bool, typer.Option("--render", help="Run nothing; make the page and figures of the data.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget finished runs first.")] = False,
    azure: Annotated[
        Path | None, typer.Option(help="AzureLLMInferenceTrace_conv.csv, for the lengths of Azure conversations.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes. Results do not depend on them.", min=1)] = 1,
    out: Annotated[
        Path, typer.Option(help="Where the page, figures and data go.", show_default="docs/results")
    ] = _FOLDER,
) -> None:
    """Run the paper's experiments in simulation and write docs/results/. What has been run is not run again."""
    if unknown := set(only or ()) - EXPERIMENTS.keys():
        raise typer.BadParameter(f"must be one of {', '.join(EXPERIMENTS)}; got {unknown.pop()!r}", param_hint="--only")
    for name in [] if only_render else only or EXPERIMENTS:
        path = data_path(out, name)
        data = Data(name, quick) if fresh else Data.load(path)
        if data.quick != quick:
            data = Data(name, quick)  # the page shows one or the other
        lab = Lab(data, path, workers)
        with lab.processes():
            EXPERIMENTS[name].measure(lab, Scale(quick, azure))
        lab.forget_unused()
        print(f"wrote {render(EXPERIMENTS, out)}", file=sys.stderr)
    if only_render:
        print(f"wrote {render(EXPERIMENTS, out)}", file=sys.stderr)


def main() -> None:
    typer.run(regenerate)
