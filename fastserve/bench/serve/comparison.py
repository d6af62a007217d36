"""Runs beside each other: medians over rounds, and how many times better each server is than the first.

A ratio is the median of the rounds' ratios: what slows a round slows all servers in it. The same is done offline by
benchmarks/compare_peers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from .record import SHORT
from .results import ServeRun


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a run."""

    key: str
    label: str
    path: tuple[str, ...]  # in its summary
    scale: float = 1.0  # from the summary's unit to the label's
    higher_is_better: bool = False

    def of(self, run: ServeRun) -> float | None:
        value: Any = run.summary
        for name in self.path:
            value = value.get(name) if isinstance(value, dict) else None
        return None if value is None else float(value)


FIGURES: Final = (
    Figure("jobs_per_second", "jobs/s", ("achieved", "jobs_per_second"), higher_is_better=True),
    Figure("output_tokens_per_second", "tokens/s", ("achieved", "output_tokens_per_second"), higher_is_better=True),
    Figure("mean_jct", "JCT, mean (s)", ("latency", "jct", "mean")),
    Figure("p50_jct", "JCT, P50 (s)", ("latency", "jct", "p50")),
    Figure("p95_jct", "JCT, P95 (s)", ("latency", "jct", "p95")),
    Figure("p99_jct", "JCT, P99 (s)", ("latency", "jct", "p99")),
    Figure("mean_jct_short", f"JCT, mean, ≤ {SHORT} tokens (s)", ("short", "jct", "mean")),
    Figure("mean_jct_long", f"JCT, mean, > {SHORT} tokens (s)", ("long", "jct", "mean")),
    Figure("mean_ttft", "TTFT, mean (s)", ("latency", "ttft", "mean")),
    Figure("p95_ttft", "TTFT, P95 (s)", ("latency", "ttft", "p95")),
    Figure("p99_ttft", "TTFT, P99 (s)", ("latency", "ttft", "p99")),
    Figure("mean_ttft_later", "TTFT, mean, later calls (s)", ("later", "ttft", "mean")),
    Figure("p50_ttft_later", "TTFT, P50, later calls (s)", ("later", "ttft", "p50")),
    Figure("mean_program", "Program, mean (s)", ("programs", "mean")),
    Figure("p95_program", "Program, P95 (s)", ("programs", "p95")),
    Figure("cached_share", "Cached, of prompts (%)", ("cached_share",), 1e2, higher_is_better=True),
    Figure("mean_tpot", "TPOT, mean (ms)", ("latency", "tpot", "mean"), 1e3),
    Figure("p99_itl", "Gap, P99 (ms)", ("latency", "itl", "p99"), 1e3),
    Figure("max_itl", "Gap, longest (ms)", ("latency", "itl", "max"), 1e3),
    Figure(
        "mean_normalized_latency", "Normalized latency, mean (ms/token)", ("latency", "normalized_latency", "mean"), 1e3
    ),
    Figure("goodput_share", "Within the SLO (%)", ("goodput", "share"), 1e2, higher_is_better=True),
    Figure("goodput_jobs_per_second", "Goodput (jobs/s)", ("goodput", "jobs_per_second"), higher_is_better=True),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """One server at one rate: medians over rounds, by a figure's key."""

    target: str
    medians: dict[str, float]
    better: dict[str, float]  # than the first server, in times; only where both have a value above 0
    failed: int  # jobs, of all rounds
    jobs: int


@dataclass(frozen=True, slots=True)
class Level:
    """All servers at one rate, in the order in which they were named."""

    rate: float | None
    rounds: int
    servers: list[Figures]

    def as_dict(self) -> dict[str, Any]:
        return {
            "rate": self.rate,
            "rounds": self.rounds,
            "targets": [
                {
                    "target": each.target,
                    "median": each.medians,
                    "better_than_first": each.better,
                    "failed": each.failed,
                    "jobs": each.jobs,
                }
                for each in self.servers
            ],
        }


def compare(runs: Sequence[ServeRun]) -> list[Level]:
    """By rate, as they were run. Interrupted runs are left out: what they lack is not what others lack."""
    whole = [run for run in runs if not run.summary["interrupted"]]
    levels = []
    for rate in dict.fromkeys(run.rate for run in whole):
        own: dict[str, list[ServeRun]] = {}
        for run in whole:
            if run.rate == rate:
                own.setdefault(run.target.name, []).append(run)
        first = next(iter(own.values()))
        servers = [_figures(name, each, first) for name, each in own.items()]
        levels.append(Level(rate, len(first), servers))
    return levels


def _figures(name: str, runs: Sequence[ServeRun], first: Sequence[ServeRun]) -> Figures:
    medians: dict[str, float] = {}
    better: dict[str, float] = {}
    for figure in FIGURES:
        values = [value for value in map(figure.of, runs) if value is not None]
        if values:
            medians[figure.key] = median(values)
        # Rounds in which both have it; the last one may be of the first server alone.
        pairs = [(figure.of(base), figure.of(run)) for base, run in zip(first, runs, strict=False)]
        ratios = [a / b if figure.higher_is_better else b / a for b, a in pairs if a and b]
        if runs is not first and ratios:
            better[figure.key] = median(ratios)
    failed = sum(run.summary["failed"] for run in runs)
    return Figures(name, medians, better, failed, sum(run.summary["jobs"] for run in runs))
