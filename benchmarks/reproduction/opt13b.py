"""OPT-13B on one A100: the rate that each policy sustains at a mean normalized latency of 0.3 s a token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from fastserve.bench.plot_style import COLOURS, QUIET
from fastserve.bench.stats import estimate

from . import figures
from .cases import Case, rounded
from .common import Scale, capacities, capacities_of, point, table, text, times, values
from .lab import Data, Lab, Task
from .search import PRECISION, SLO, sustained

NAME = "opt13b"
TITLE = "Sustained rates: OPT-13B on one A100"

WORKLOADS = ("sharegpt", "alpaca")
POLICIES = ("fcfs", "skip-join-mlfq", "gittins")
# Settings of the starvation limit: "paper" is the authors' α of 300 ms; None is what FastServe serves with, 60 s.
PRESETS: Final[dict[str, str | None]] = {"default": None, "paper": "0.3"}
SHORT, LONG = 400, 3_000  # jobs: the authors' trace length, and one that comes near a steady state
SEEDS = {SHORT: 5, LONG: 2}
PAPER_SEEDS = {SHORT: 2, LONG: 1}  # with the paper's α, which preempts (and simulates) many times as much
MOST = 32.0  # the highest rate tried, as a multiple of capacity: there all jobs are as good as there from the start
CURVE_RATES = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 10)
CURVE_SEEDS = 2

# Jobs/s at 0.3 s/token (artifact): FCFS and FastServe.
PAPER: Final = {"sharegpt": (2.41, 4.89), "alpaca": (16.3, 32.4)}
# Mean s/token over jobs/s, ShareGPT (artifact).
PAPER_RATES: Final = (0.1, 0.2, 0.5, 1, 1.5, 1.75, 2, 2.25, 2.5, 3, 4, 4.5, 5, 5.5, 6, 10)
PAPER_CURVES: Final = {
    "skip-join-mlfq": (
        *(0.034, 0.033, 0.033, 0.039, 0.045, 0.043, 0.047, 0.048),
        *(0.048, 0.063, 0.106, 0.187, 0.331, 0.671, 0.856, 1.425),
    ),
    "fcfs": (0.024, 0.029, 0.033, 0.038, 0.045, 0.052, 0.091, 0.13, 0.403, 0.849, 1.459),
}  # fmt: skip


def case(workload: str, jobs: int, preset: str = "default") -> Case:
    return Case(workload=workload, jobs=jobs, starvation_limit=PRESETS[preset])


def _lengths(scale: Scale, preset: str = "default") -> dict[int, range]:
    """Seeds by number of jobs."""
    seeds = SEEDS if preset == "default" else PAPER_SEEDS
    return {jobs if not scale.quick else jobs // 10: scale.seeds(seeds[jobs]) for jobs in (SHORT, LONG)}


def measure(lab: Lab, scale: Scale) -> None:
    lengths = _lengths(scale)
    longest = max(lengths)
    known = capacities(lab, [case(workload, longest) for workload in WORKLOADS], [0], scale)
    # What takes longest comes last.
    _measure_curve(lab, scale, min(lengths))
    for preset in PRESETS:
        for workload in reversed(WORKLOADS):
            rate = known[case(workload, longest), 0]
            for jobs, seeds in _lengths(scale, preset).items():
                which = case(workload, jobs, preset)
                tasks = [
                    Task(
                        {"sustained": which.as_dict(), "policy": policy, "seed": seed},
                        sustained,
                        (which, policy, seed, rounded(rate), rounded(MOST * rate)),
                    )
                    for policy in (POLICIES if preset == "default" else POLICIES[1:])  # fcfs knows no starvation
                    for seed in seeds
                ]
                lab.run(tasks, f"{workload}, {jobs} jobs, α {preset}")


def _measure_curve(lab: Lab, scale: Scale, jobs: int) -> None:
    which = case("sharegpt", jobs)
    rates, seeds = scale.pick(CURVE_RATES, CURVE_RATES[1::4]), scale.seeds(CURVE_SEEDS)
    lab.run(
        [point(which, policy, seed, rate, scale) for rate in rates for policy in POLICIES for seed in seeds], "curve"
    )


def draw(data: Data, folder: Path) -> None:
    scale = Scale(data.quick)
    which = case("sharegpt", min(_lengths(scale)))
    rates = scale.pick(CURVE_RATES, CURVE_RATES[1::4])
    title = f"OPT-13B on one A100-80G, ShareGPT-like, {which.jobs} jobs, batch {which.max_num_seqs}"
    with figures.canvas(folder / "opt13b.svg", title, (7.6, 4.6)) as figure:
        axes = figure.subplots()
        for policy in POLICIES:
            found = [estimate(values(data, "mean_normalized_latency", which, policy, rate=rate)) for rate in rates]
            figures.line(axes, policy, rates, found)
        for policy, curve in PAPER_CURVES.items():
            style: dict[str, Any] = {
                "color": COLOURS[policy],
                "linestyle": (0, (2, 2)),
                "linewidth": 1.2,
            }
            axes.plot(PAPER_RATES[: len(curve)], curve, label=f"{policy} (paper)", **style)
        axes.axhline(SLO, color=QUIET, linewidth=1, linestyle=(0, (5, 4)), zorder=0)
        axes.set_ylim(0, 1)
        axes.set_xlabel("jobs per second")
        axes.set_ylabel("mean normalized latency (s per token)")
        figures.plain(axes)
        figures.legend_below(figure, axes)


def rates_of(data: Data, which: Case, policy: str) -> list[float]:
    """Sustained rates by seed, infinite where the limit is never reached; none where they were not measured yet."""
    found = sorted(data.select(sustained=which.as_dict(), policy=policy), key=lambda pair: pair[0]["seed"])
    return [math.inf if result["rate"] is None else result["rate"] for _, result in found]


def rate_text(rates: list[float], most: float) -> str:
    if not rates:
        return "–"
    return f"≥ {most:.3g}" if not all(map(math.isfinite, rates)) else text(rates)


def gain_text(rates: list[float], base: list[float], most: float) -> str:
    """How many times higher, seed by seed."""
    if not rates or not base or not all(map(math.isfinite, base)):
        return "–"
    if not all(map(math.isfinite, rates)):
        return f"≥ {min(most / each for each in base):.3g} ×"
    return times([own / each for own, each in zip(rates, base, strict=False)])


def section(data: Data) -> str:
    scale = Scale(data.quick)
    lengths = _lengths(scale)
    longest = max(lengths)
    parts = [
        f"""OPT-13B on one A100-80G, as much KV as its weights leave (3,937 blocks), batch 16, 2048
tokens a batch, blocks of 16, Gamma arrivals (CV 1). The rate is found by bisection, to {100 * PRECISION:.0f} %, for
each seed: the highest at which the mean over jobs of JCT ÷ output tokens is at most {SLO} s. No warm-up is dropped,
as in the paper. *paper* is the authors' α of 300 ms (`--starvation-limit 0.3`), *default* ours of 60 s.
{min(lengths)} jobs is the authors' trace length: at such rates it is over before anything is steady, and a rate above
capacity can be "sustained". So the gain over fcfs is a property of the trace's length as much as of the policy;
{longest} jobs show how much of it is left.

    {case("sharegpt", min(lengths)).command(" ".join(POLICIES), "--rate 4", len(lengths[min(lengths)]))}

""",
    ]
    rows = []
    for workload in WORKLOADS:
        capacity = capacities_of(data, case(workload, longest))[0]
        most = MOST * capacity
        for jobs in lengths:
            base = rates_of(data, case(workload, jobs), "fcfs")
            paper = PAPER[workload]
            of_paper = (
                (f"{paper[0]} → {paper[1]}", f"{paper[1] / paper[0]:.2f} ×") if jobs == min(lengths) else ("", "")
            )
            for preset in PRESETS:
                cells = [rate_text(base, most)]
                for policy in POLICIES[1:]:
                    own = rates_of(data, case(workload, jobs, preset), policy)
                    cells += [rate_text(own, most), gain_text(own, base, most)]
                rows.append((workload, f"{jobs}", preset, f"{capacity:.3g}", *cells, *of_paper))
    head = ("workload", "jobs", "α", "capacity", "fcfs", "skip-join", "gain", "gittins", "gain", "paper", "gain")
    parts += [
        "Jobs/s sustained, with 95 % confidence intervals over seeds "
        f"({_seeds(scale, 'default')}; with the paper's α {_seeds(scale, 'paper')}):\n\n",
        table(head, rows, left=3),
        "\n≥: within the limit even with all jobs there at the start; –: not measured yet. Capacity is what fcfs gets "
        "done.\n\n",
        "![Normalized latency over rate](opt13b.svg)\n\n",
        "Mean normalized latency (s/token), ShareGPT-like; the paper's are of real ShareGPT lengths. Its fcfs rises "
        "more steeply, probably because waiting is divided by output tokens, so that jobs of few tokens decide, and a "
        "log-normal has fewer of those than people's conversations.\n\n",
        _curve(data, scale, min(lengths)),
    ]
    return "".join(parts)


def _curve(data: Data, scale: Scale, jobs: int) -> str:
    which = case("sharegpt", jobs)
    paper = {policy: dict(zip(PAPER_RATES, curve, strict=False)) for policy, curve in PAPER_CURVES.items()}
    rows = []
    for rate in scale.pick(CURVE_RATES, CURVE_RATES[1::4]):
        row = [f"{rate:g}"]
        for policy in POLICIES:
            row.append(text(values(data, "mean_normalized_latency", which, policy, rate=rate)))
        row += [f"{paper[policy].get(rate, '–')}" for policy in POLICIES[:2]]
        rows.append(row)
    return table(("jobs/s", "fcfs", "skip-join", "gittins", "paper: FCFS", "FastServe"), rows)


def _seeds(scale: Scale, preset: str) -> str:
    return ", ".join(f"{len(seeds)} for {jobs} jobs" for jobs, seeds in _lengths(scale, preset).items())
