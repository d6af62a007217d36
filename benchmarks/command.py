"""The command lines of the benchmarks that run a real model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cpu_clock import use_cpu_clock
from rich.console import Console


def parse(
    description: str, runs: str, arguments: Sequence[str] | None, *, jobs: int | None = None
) -> tuple[argparse.Namespace, Console]:
    """The options, with the clock they ask for in use, and where to print. `runs` is the help of --runs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--runs", type=int, default=3, help=f"{runs} (default: 3)")
    if jobs is not None:
        parser.add_argument("--jobs", type=int, default=jobs, help=f"(default: {jobs})")
    parser.add_argument("--seed", type=int, default=0, help="of the trace (default: 0)")
    parser.add_argument("--threads", type=int, default=0, help="0: one a core")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument(
        "--cpu-clock", action="store_true", help="count processor seconds: for a busy machine; 1 thread"
    )
    options = parser.parse_args(arguments)
    if options.cpu_clock:
        options.threads = 1
        use_cpu_clock()
    return options, Console(highlight=False, width=None if sys.stdout.isatty() else 140)
