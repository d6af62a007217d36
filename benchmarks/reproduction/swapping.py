"""What moving KV ahead of need is worth: proactive against reactive and recompute, where memory is what binds."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fastserve.bench.stats import estimate

from . import figures
from .cases import Case, rounded
from .common import Scale, capacities, capacities_of, point, present, table, text, times, values
from .lab import Data, Lab, Task
from .opt13b import MOST, gain_text, rate_text, rates_of
from .search import SLO, sustained

NAME = "swapping"
TITLE = "Swapping: proactive, reactive, recompute"

MODES = ("proactive", "reactive", "recompute")
WORKLOADS = ("sharegpt",)
JOBS, SEEDS = 400, 2
HOST_BLOCKS = 20_000  # 262 GB of 13 MB blocks: more than is ever used
# 988 blocks are what the weights of OPT-13B leave on an A100-40G; the others are smaller pools on the same device.
BLOCKS = (988, 300, 200)
CURVE_BLOCKS = BLOCKS[1]
CURVE_RATES = (0.5, 1, 1.5, 2, 3, 4)
PAPER: Final = {"proactive": 2.78, "reactive": 1.72, "recompute": 1.03}


def case(blocks: int, mode: str, scale: Scale, workload: str = "sharegpt") -> Case:
    return Case(
        workload=workload,
        jobs=scale.pick(JOBS, 60),
        hardware="a100-40g",
        kv_blocks=blocks,
        swap_blocks=HOST_BLOCKS,
        swap_mode=mode,
    )


def measure(lab: Lab, scale: Scale) -> None:
    seeds = scale.seeds(SEEDS)
    main = case(BLOCKS[0], MODES[0], scale)
    rate = capacities(lab, [main], [0], scale)[main, 0]
    tasks = [
        Task(
            {"sustained": which.as_dict(), "policy": policy, "seed": seed},
            sustained,
            (which, policy, seed, rounded(rate), rounded(MOST * rate)),
        )
        for blocks in BLOCKS
        for mode in MODES
        for policy in (("fcfs", "skip-join-mlfq") if mode == MODES[0] else ("skip-join-mlfq",))
        for seed in seeds
        for which in (case(blocks, mode, scale),)
    ]
    lab.run(tasks, "sustained rates")
    rates = scale.pick(CURVE_RATES, CURVE_RATES[2::3])
    curve = [
        point(case(CURVE_BLOCKS, mode, scale), "skip-join-mlfq", seed, rate, scale)
        for rate in rates
        for mode in MODES
        for seed in seeds
    ]
    lab.run(curve, "curve")


def draw(data: Data, folder: Path) -> None:
    scale = Scale(data.quick)
    rates = scale.pick(CURVE_RATES, CURVE_RATES[2::3])
    jobs = case(CURVE_BLOCKS, MODES[0], scale).jobs
    title = f"skip-join-mlfq, OPT-13B on one A100-40G with {CURVE_BLOCKS} KV blocks, ShareGPT-like, {jobs} jobs"
    colours = dict(zip(MODES, ("#2f5bea", "#e07a3f", "#9aa1ad"), strict=True))
    with figures.canvas(folder / "swapping.svg", title, (7.6, 4.4)) as figure:
        axes = figure.subplots()
        for mode in MODES:
            found = [estimate(_latencies(data, mode, rate, scale)) for rate in rates]
            means = [value.mean for value in found]
            widths = [value.half_width or 0.0 for value in found]
            axes.errorbar(rates, means, yerr=widths, label=mode, color=colours[mode], marker="o", capsize=2.5)
        axes.axhline(SLO, color=figures.QUIET, linewidth=1, linestyle=(0, (5, 4)), zorder=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("jobs per second")
        axes.set_ylabel("mean normalized latency (s per token)")
        figures.plain(axes)
        figures.legend_below(figure, axes)


def section(data: Data) -> str:
    scale = Scale(data.quick)
    capacity = capacities_of(data, case(BLOCKS[0], MODES[0], scale))[0]
    most = MOST * capacity
    rows = []
    for blocks in BLOCKS:
        fcfs = rates_of(data, case(blocks, MODES[0], scale), "fcfs")
        found = {mode: rates_of(data, case(blocks, mode, scale), "skip-join-mlfq") for mode in MODES}
        rows.append(
            (
                f"{blocks}",
                *(rate_text(found[mode], most) for mode in MODES),
                gain_text(found["proactive"], found["reactive"], most),
                gain_text(found["proactive"], found["recompute"], most),
                rate_text(fcfs, most),
            )
        )
    rows.append(
        (
            "paper",
            *(str(rate) for rate in PAPER.values()),
            *(times([PAPER["proactive"] / PAPER[mode]]) for mode in MODES[1:]),
            "",
        )
    )
    main = case(BLOCKS[0], MODES[0], scale)
    head = ("KV blocks", *MODES, "proactive ÷ reactive", "÷ recompute", "fcfs")
    rates = scale.pick(CURVE_RATES, CURVE_RATES[2::3])
    return "".join(
        (
            f"""skip-join-mlfq on OPT-13B, one A100-40G, ShareGPT-like, {main.jobs} jobs, batch 16,
{len(scale.seeds(SEEDS))} seeds; jobs/s at a mean normalized latency of {SLO} s/token, by bisection. Memory is what
binds here: 988 blocks (15,808 tokens) are what the weights leave, and the live jobs of a preempting policy hold
several times that; smaller pools bind harder. Blocks of 16 tokens are 13 MB and take 0.52 ms over PCIe 4 each way.
The last column is what fcfs sustains with the same memory.

    {main.command("skip-join-mlfq", "--rate 2", len(scale.seeds(SEEDS)))}

""",
            table(head, rows),
            "\n![Normalized latency over rate](swapping.svg)\n\n",
            f"Mean normalized latency (s/token) with {CURVE_BLOCKS} blocks:\n\n",
            table(
                ("jobs/s", *MODES),
                present(
                    lambda rate: (f"{rate:g}", *(text(_latencies(data, mode, rate, scale)) for mode in MODES)), rates
                ),
            ),
        )
    )


def _latencies(data: Data, mode: str, rate: float, scale: Scale) -> list[float]:
    return values(data, "mean_normalized_latency", case(CURVE_BLOCKS, mode, scale), "skip-join-mlfq", rate=rate)
