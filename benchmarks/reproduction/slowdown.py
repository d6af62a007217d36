"""What the slowdown bound buys and costs: mean against P99, over its setting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from fastserve.bench.plot_style import COLOURS
from fastserve.bench.stats import estimate
from fastserve.bench.tables import number

from . import figures
from .cases import Case
from .common import Scale, capacities, point, table, text, values
from .lab import Data, Lab

NAME = "slowdown"
TITLE = "The slowdown bound: mean against tail"

WORKLOAD, LOAD = "sharegpt", 0.98
LIMITS: Final = ("1", "2", "4", "8", "16", "none")
BOUNDED = ("skip-join-mlfq", "gittins")
MARKS = ("fcfs", "srpt")
SEEDS = 3


def case(limit: str, scale: Scale) -> Case:
    jobs, warmup = scale.pick((8_000, 1_000), (600, 100))
    return Case(
        workload=WORKLOAD,
        jobs=jobs,
        warmup_jobs=warmup,
        kv_blocks=2**20,
        swap_blocks=0,
        starvation_limit="none",
        slowdown_limit=limit,
    )


def _limits(scale: Scale) -> tuple[str, ...]:
    found: tuple[str, ...] = scale.pick(LIMITS, LIMITS[2::5])
    return found


def measure(lab: Lab, scale: Scale) -> None:
    seeds = scale.seeds(SEEDS)
    base = case("none", scale)
    rates = capacities(lab, [base], seeds, scale)
    tasks = [
        point(case(limit, scale), policy, seed, LOAD * rates[base, seed], scale, load=LOAD)
        for seed in seeds
        for policy in (*MARKS, *BOUNDED)
        for limit in (_limits(scale) if policy in BOUNDED else ("none",))
    ]
    lab.run(tasks, "runs")


def draw(data: Data, folder: Path) -> None:
    scale = Scale(data.quick)
    title = f"OPT-13B on one A100-80G, {WORKLOAD}, load {LOAD:g}, batch 16; the numbers are slowdown bounds"
    with figures.canvas(folder / "slowdown.svg", title, (7.6, 4.8)) as figure:
        axes = figure.subplots()
        for policy in BOUNDED:
            xs, ys = ([_mean(data, measure, limit, policy, scale) for limit in _limits(scale)] for measure in _AXES)
            axes.plot(xs, ys, color=COLOURS[policy], marker="o", markersize=4.5, label=policy)
            below = policy == BOUNDED[0]
            for label, x, y in _labels(_limits(scale), xs, ys):
                axes.annotate(
                    label,
                    (x, y),
                    textcoords="offset points",
                    xytext=(5, -11 if below else 5),
                    fontsize=8,
                    color=COLOURS[policy],
                )
        for policy, marker in zip(MARKS, "s*", strict=True):
            x, y = (_mean(data, measure, "none", policy, scale) for measure in _AXES)
            axes.plot([x], [y], marker, color=COLOURS[policy], markersize=9, label=policy)
        axes.set_xscale("log")
        axes.set_yscale("log")
        figures.logarithmic(axes.xaxis)
        figures.logarithmic(axes.yaxis)
        axes.set_xlabel("mean JCT (s)")
        axes.set_ylabel("P99 JCT (s)")
        figures.plain(axes)
        figures.legend_below(figure, axes)


def _labels(limits: Sequence[str], xs: list[float], ys: list[float]) -> Iterator[tuple[str, float, float]]:
    """One label for neighbours that lie on top of each other."""
    first = 0
    for i in range(1, len(limits) + 1):
        if i < len(limits) and abs(xs[i] / xs[first] - 1) + abs(ys[i] / ys[first] - 1) < _NEAR:
            continue
        yield (limits[first] if i == first + 1 else f"{limits[first]} … {limits[i - 1]}"), xs[first], ys[first]
        first = i


_NEAR: Final = 0.03
_AXES: Final = ("mean_jct", "p99_jct")


def _mean(data: Data, measure: str, limit: str, policy: str, scale: Scale) -> float:
    return estimate(values(data, measure, case(limit, scale), policy, load=LOAD)).mean


def section(data: Data) -> str:
    scale = Scale(data.quick)
    example = case("16", scale)

    def row(policy: str, limit: str) -> tuple[str, ...]:
        found = (
            text(values(data, m, case(limit, scale), policy, load=LOAD)) for m in (*_AXES, "p95_jct", "preemptions")
        )
        return policy, limit if policy in BOUNDED else "", *found

    loosest, tightest = _limits(scale)[-1], _limits(scale)[0]
    buys = ", and ".join(
        f"{policy}'s P99 goes from {number(p99[0])} to {number(p99[1])} s and its mean from {number(mean[0])} to "
        f"{number(mean[1])} s"
        for policy in BOUNDED
        for mean, p99 in [[[_mean(data, m, limit, policy, scale) for limit in (loosest, tightest)] for m in _AXES]]
    )
    rows = [row(policy, "none") for policy in MARKS]
    rows += [row(policy, limit) for policy in BOUNDED for limit in _limits(scale)]
    return "".join(
        (
            f"""A job that has waited `--slowdown-limit` times its own service goes first. {WORKLOAD}, load
{LOAD:g}, OPT-13B on one A100-80G, batch 16, {example.jobs} jobs less {example.warmup_jobs} of warm-up,
{len(scale.seeds(SEEDS))} seeds, memory not binding; no starvation limit besides.
From no bound to the tightest here, {buys}.
Jobs that skip-join promotes take turns at the top, which costs preemptions and no more; gittins serves
those it promotes to completion, in an eighth of the device's time, so that any bound that is reached at all does the
same. No bound makes either policy's P99 that of fcfs: somebody waits for those who go first.

    {example.command(" ".join(BOUNDED), f"--load {LOAD:g}", len(scale.seeds(SEEDS)))}

![Mean against P99](slowdown.svg)

""",
            table(("policy", "bound", "mean JCT (s)", "P99 (s)", "P95 (s)", "preemptions"), rows, left=2),
        )
    )
