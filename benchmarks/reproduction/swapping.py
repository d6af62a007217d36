"""What moving KV ahead of need is worth: proactive against reactive and recompute, where memory is what binds."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fastserve.bench.plot_style import QUIET
from fastserve.bench.stats import estimate

from . import figures
from .cases import Case, rounded
from .common import Scale, capacities, capacities_of, point, present, table, text, times, values
from .lab import Data, Lab, Task
from .opt13b import MOST, gain_text, rate_text, rates_of
from .search import SLO, sustained

NAME = "swapping"
TITLE = "Swapping: proactive, reactive, recompute"
POLICY: Final = "skip-join-mlfq"

MODES = ("proactive", "reactive", "recompute")
JOBS, SEEDS = 400, 3
HOST_BLOCKS = 20_000  # 262 GB of 13 MB blocks: more than is ever used
BLOCKS = 988  # what the weights of OPT-13B leave on an A100-40G
# Settings: the starvation limit, and how many times over a job must repay its KV before others may take it. "paper":
# the authors' α, and KV goes to whoever is ahead; "ours": what FastServe serves with; between them: α alone.
ROWS: Final = (("paper", "0.3", 0.0), ("α of the paper", "0.3", None), ("ours", None, None))
CURVE_RATES = (1, 1.5, 2, 2.5, 3)
CURVE_SEEDS = 2
PAPER: Final = {"proactive": 2.78, "reactive": 1.72, "recompute": 1.03}


def case(mode: str, alpha: str | None, repayment: float | None, scale: Scale) -> Case:
    return Case(
        workload="sharegpt",
        jobs=scale.pick(JOBS, 60),
        hardware="a100-40g",
        kv_blocks=BLOCKS,
        swap_blocks=HOST_BLOCKS,
        swap_mode=mode,
        starvation_limit=alpha,
        repayment=repayment,
    )


def measure(lab: Lab, scale: Scale) -> None:
    seeds = scale.seeds(SEEDS)
    main = case(MODES[0], None, None, scale)
    rate = capacities(lab, [main], [0], scale)[main, 0]
    for name, alpha, repayment in reversed(ROWS):  # what takes longest comes last
        tasks = [
            Task(
                {"sustained": which.as_dict(), "policy": policy, "seed": seed},
                sustained,
                (which, policy, seed, rounded(rate), rounded(MOST * rate)),
            )
            for mode in MODES
            for policy in (("fcfs", POLICY) if name == "ours" and mode == MODES[0] else (POLICY,))
            for seed in seeds
            for which in (case(mode, alpha, repayment, scale),)
        ]
        lab.run(tasks, f"sustained rates, {name}")
    lab.run(
        [
            point(which, POLICY, seed, rate, scale)
            for rate in _curve_rates(scale)
            for which in _curve_cases(scale).values()
            for seed in scale.seeds(CURVE_SEEDS)
        ],
        "curve",
    )


def _curve_rates(scale: Scale) -> tuple[float, ...]:
    rates: tuple[float, ...] = scale.pick(CURVE_RATES, CURVE_RATES[2::2])
    return rates


def _curve_cases(scale: Scale) -> dict[str, Case]:
    """The paper's three, and ours at the paper's α."""
    found = {f"{mode} (paper)": case(mode, "0.3", 0.0, scale) for mode in MODES}
    return {"proactive (ours)": case(MODES[0], "0.3", None, scale), **found}


def draw(data: Data, folder: Path) -> None:
    scale = Scale(data.quick)
    cases = _curve_cases(scale)
    jobs = next(iter(cases.values())).jobs
    title = f"{POLICY}, OPT-13B on one A100-40G, {BLOCKS} KV blocks, α 300 ms, ShareGPT-like, {jobs} jobs"
    colours = dict(zip(cases, ("#2f5bea", "#8fa8f5", "#e07a3f", "#9aa1ad"), strict=True))
    with figures.canvas(folder / "swapping.svg", title, (7.6, 4.4)) as figure:
        axes = figure.subplots()
        for name, which in cases.items():
            found = [estimate(_latencies(data, which, rate)) for rate in _curve_rates(scale)]
            means = [value.mean for value in found]
            axes.plot(_curve_rates(scale), means, label=name, color=colours[name], marker="o")
        for mode, rate in PAPER.items():
            axes.plot([rate], [SLO], marker="x", color=colours[f"{mode} (paper)"], linestyle="")
        axes.axhline(SLO, color=QUIET, linewidth=1, linestyle=(0, (5, 4)), zorder=0)
        axes.set_ylim(0, 1)
        axes.set_xlabel("jobs per second (crosses: where the paper's lines meet the limit)")
        axes.set_ylabel("mean normalized latency (s per token)")
        figures.plain(axes)
        figures.legend_below(figure, axes)


def section(data: Data) -> str:
    scale = Scale(data.quick)
    capacity = capacities_of(data, case(MODES[0], None, None, scale))[0]
    most = MOST * capacity
    rows: list[tuple[str, ...]] = []
    naive = {mode: rates_of(data, case(mode, "0.3", 0.0, scale), POLICY) for mode in MODES}
    fcfs = rates_of(data, case(MODES[0], None, None, scale), "fcfs")
    for name, alpha, repayment in ROWS:
        own = {mode: rates_of(data, case(mode, alpha, repayment, scale), POLICY) for mode in MODES}
        rows.append(
            (
                name,
                *(rate_text(own[mode], most) for mode in MODES),
                *(gain_text(own["proactive"], own[mode], most) for mode in MODES[1:]),
                *(gain_text(own["proactive"], naive[mode], most) for mode in MODES[1:]),
                rate_text(fcfs, most) if name == "ours" else "",
            )
        )
    gains = [times([PAPER["proactive"] / PAPER[mode]]) for mode in MODES[1:]]
    rows.append(("reported", *(str(rate) for rate in PAPER.values()), *gains, *gains, ""))
    main = case(MODES[0], "0.3", 0.0, scale)
    seeds = len(scale.seeds(SEEDS))
    head = ("settings", *MODES, "÷ reactive", "÷ recompute", "÷ paper's", "÷ paper's", "fcfs")
    cases = _curve_cases(scale)
    return "".join(
        (
            f"""{POLICY} on OPT-13B, one A100-40G, ShareGPT-like, {main.jobs} jobs, batch 16, {seeds} seeds; jobs/s at
a mean normalized latency of {SLO} s/token, by bisection. {BLOCKS} blocks ({BLOCKS * 16:,} tokens) are what the
weights leave; a block of 16 tokens is 13 MB and takes 0.52 ms over PCIe 4 each way.

The *paper*'s settings are its α of 300 ms and KV that goes to whoever is ahead in the queues: preempted jobs are
killed and computed again (recompute), or copied while the batch waits (reactive), or ahead of need (proactive). With so
short an α an overload has all jobs take turns, a token each, and what the three modes differ in is everything. *Ours*
bounds it in every mode: a job keeps its KV until it was served 16 times what bringing it back costs (`--repayment`),
so recompute and reactive are stronger opponents than the paper's, and the serving default promotes after 60 s. The last
two ratios are over the paper's kind of reactive and recompute. The last column is what fcfs sustains in the same
memory.

    {main.command(POLICY, "--rate 2", seeds)}

""",
            table(head, rows),
            "\n![Normalized latency over rate](swapping.svg)\n\n",
            f"Mean normalized latency (s/token) with {BLOCKS} blocks and the paper's α:\n\n",
            table(
                ("jobs/s", *cases),
                present(
                    lambda rate: (f"{rate:g}", *(text(_latencies(data, which, rate)) for which in cases.values())),
                    _curve_rates(scale),
                ),
            ),
        )
    )


def _latencies(data: Data, which: Case, rate: float) -> list[float]:
    return values(data, "mean_normalized_latency", which, POLICY, rate=rate)
