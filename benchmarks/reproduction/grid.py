"""Beyond the paper: gittins against fcfs, skip-join-mlfq and the SRPT oracle over workloads × loads × batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastserve.bench.plot_style import INK

from . import figures
from .cases import AZURE, Case
from .common import Missing, Scale, at_loads, table
from .lab import Data, Lab

NAME = "grid"
TITLE = "Over the grid: gittins never far behind"

WORKLOADS: Final = {
    "alpaca": "Alpaca-like",
    "zipf:2": "Zipf 2",
    "zipf:1.5": "Zipf 1.5",
    "constant:128,128": "constant",
    "bimodal:32,512,0.1,128": "bimodal",
    "zipf:0.99": "Zipf 0.99",
    AZURE: "Azure conversation",
    "sharegpt": "ShareGPT-like",
}
HEAVY: Final = ("zipf:1.5", "zipf:2", "bimodal:32,512,0.1,128")
HEAVY_LOAD: Final = 0.9  # what is promised of them holds from here on
LOADS = (0.5, 0.7, 0.9, 1.0, 1.2)
BATCHES = (16, 64, 256)
POLICIES = ("fcfs", "skip-join-mlfq", "gittins", "srpt")
SEEDS = 2
AGAINST_FCFS, AGAINST_SKIP_JOIN = 1.03, 1.05
KV_BLOCKS = 2**20  # more than all jobs together can hold: memory does not bind


def case(workload: str, batch: int, scale: Scale) -> Case:
    # 1,000 arrivals are more than 500 completions, even at load 1.2 and with 256 jobs under way.
    jobs, warmup = scale.pick((3_000, 1_000), (300, 100))
    return Case(
        workload=workload, jobs=jobs, warmup_jobs=warmup, max_num_seqs=batch, kv_blocks=KV_BLOCKS, swap_blocks=0
    )


def measure(lab: Lab, scale: Scale) -> None:
    for workload in WORKLOADS:
        if workload == AZURE and scale.azure is None:
            continue
        cases = [case(workload, batch, scale) for batch in scale.pick(BATCHES, BATCHES[:1])]
        at_loads(lab, cases, scale.pick(LOADS, LOADS[2::2]), POLICIES, scale.seeds(SEEDS), scale)


@dataclass(frozen=True)
class Cell:
    """One point of the grid: mean JCTs over the seeds, in seconds."""

    workload: str
    batch: int
    load: float
    jct: dict[str, float]

    @property
    def against_fcfs(self) -> float:
        return self.jct["gittins"] / self.jct["fcfs"]

    @property
    def against_skip_join(self) -> float:
        return self.jct["gittins"] / self.jct["skip-join-mlfq"]

    @property
    def nearer_srpt(self) -> bool | None:
        """Whether gittins is nearer SRPT than skip-join is, or better than both; None where nothing is promised."""
        if self.load < HEAVY_LOAD or self.workload not in HEAVY:
            return None
        return self.is_nearer_srpt

    @property
    def is_nearer_srpt(self) -> bool:
        """The same wherever the point lies."""
        own, other, oracle = (self.jct[policy] for policy in ("gittins", "skip-join-mlfq", "srpt"))
        return own <= min(other, oracle) or abs(own - oracle) <= abs(other - oracle)

    @property
    def violations(self) -> Iterator[str]:
        if self.against_fcfs > AGAINST_FCFS:
            yield f"{self.against_fcfs:.3f} × fcfs"
        if self.against_skip_join > AGAINST_SKIP_JOIN:
            yield f"{self.against_skip_join:.3f} × skip-join"
        if self.nearer_srpt is False:
            yield "farther from SRPT than skip-join"


def cells(data: Data) -> list[Cell]:
    scale = Scale(data.quick)
    found = []
    for workload in WORKLOADS:
        for batch in BATCHES:
            which = case(workload, batch, scale)
            for load in LOADS:
                jct = {
                    policy: data.values("mean_jct", case=which.as_dict(), policy=policy, load=load)
                    for policy in POLICIES
                }
                if all(jct.values()):
                    means = {policy: math.fsum(each) / len(each) for policy, each in jct.items()}
                    found.append(Cell(workload, batch, load, means))
    if not found:
        raise Missing("every point of the grid")
    return found


_PANELS: Final = (("fcfs", "gittins ÷ fcfs"), ("skip-join-mlfq", "gittins ÷ skip-join"), ("srpt", "gittins ÷ srpt"))


def draw(data: Data, folder: Path) -> None:
    from matplotlib.colors import TwoSlopeNorm

    found = cells(data)
    rows = sorted({(list(WORKLOADS).index(cell.workload), cell.batch) for cell in found})
    loads = sorted({cell.load for cell in found})
    title = "Mean JCT of gittins as a multiple of another policy's; blue is better, red is worse"
    with figures.canvas(folder / "grid.svg", title, (11.5, 1.4 + 0.28 * len(rows))) as figure:
        for axes, (policy, name) in zip(figure.subplots(1, 3, sharey=True), _PANELS, strict=True):
            image = [[math.nan] * len(loads) for _ in rows]
            for cell in found:
                ratio = cell.jct["gittins"] / cell.jct[policy]
                row, column = rows.index((list(WORKLOADS).index(cell.workload), cell.batch)), loads.index(cell.load)
                image[row][column] = math.log2(ratio)
                colour = "white" if abs(math.log2(ratio)) > 0.8 else INK
                axes.text(column, row, f"{ratio:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
            axes.imshow(image, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(0, -1.5, 1.5))
            axes.set_xticks(range(len(loads)), [f"{load:g}" for load in loads])
            axes.set_yticks(range(len(rows)), [f"{list(WORKLOADS.values())[i]}, {batch}" for i, batch in rows])
            axes.tick_params(length=0)
            axes.set_xlabel("load")
            axes.set_title(name, loc="left", fontweight="bold", fontsize=11)
            for side in axes.spines.values():
                side.set_visible(False)


def section(data: Data) -> str:
    scale = Scale(data.quick)
    found = cells(data)
    example = case("sharegpt", BATCHES[0], scale)
    bad = [cell for cell in found if any(cell.violations)]
    worst_fcfs = max(found, key=lambda cell: cell.against_fcfs)
    worst_skip = max(found, key=lambda cell: cell.against_skip_join)
    heavy = [cell for cell in found if cell.nearer_srpt is not None]
    loses = max(found, key=lambda cell: cell.jct["skip-join-mlfq"] / cell.jct["fcfs"])
    heavy_names = ", ".join(name for workload, name in WORKLOADS.items() if workload in HEAVY)
    beyond = [cell for cell in found if cell.load >= HEAVY_LOAD and cell.workload not in HEAVY]
    parts = [
        f"""OPT-13B on one A100-80G, Gamma arrivals (CV 1), {example.jobs} jobs a point and
{len(scale.seeds(SEEDS))} paired seeds; the first {example.warmup_jobs} to arrive are left out, so that at least 500
have completed before the first that counts ends up in the statistics, and all policies are compared on the same jobs.
KV for all live jobs fits ({KV_BLOCKS} blocks): memory does not bind, policies alone differ. Loads are shares of what
fcfs gets done; from 1 on there is no steady state, and the numbers are those of a finite trace. A bound is held by the
mean over seeds; single seeds scatter. Heavy tails are {heavy_names}: a few jobs hold most of the work. *Nearer SRPT*
is a mean JCT whose distance from SRPT's is at most skip-join's, or one that is better than both.

    {example.command(" ".join(POLICIES), "--load 0.9", len(scale.seeds(SEEDS)))}

""",
        table(
            ("promise", "worst", "where", "held at"),
            [
                _promise(f"gittins ≤ {AGAINST_FCFS} × fcfs", worst_fcfs, worst_fcfs.against_fcfs, AGAINST_FCFS,
                         [cell.against_fcfs for cell in found]),
                _promise(f"gittins ≤ {AGAINST_SKIP_JOIN} × skip-join", worst_skip, worst_skip.against_skip_join,
                         AGAINST_SKIP_JOIN, [cell.against_skip_join for cell in found]),
                (
                    "nearer SRPT than skip-join (heavy tails, load ≥ 0.9)",
                    "–",
                    "–",
                    f"{sum(cell.nearer_srpt is True for cell in heavy)} of {len(heavy)}",
                ),
            ],
        ),
        f"\nFor comparison, skip-join-mlfq takes up to {loses.jct['skip-join-mlfq'] / loses.jct['fcfs']:.2f} × as long "
        f"as fcfs ({_where(loses)}). On the other workloads at those loads gittins is nearer SRPT at "
        f"{sum(cell.is_nearer_srpt for cell in beyond)} of {len(beyond)} points.\n\n"
        "![Mean JCT of gittins against others](grid.svg)\n\n",
    ]  # fmt: skip
    if AZURE not in {cell.workload for cell in found}:
        parts.append("Azure conversation was skipped: its trace was not given (`--azure FILE`).\n\n")
    if bad:
        parts += [
            f"**Where a promise is broken** ({len(bad)} of {len(found)} points); mean JCT in seconds:\n\n",
            table(
                ("point", "fcfs", "skip-join", "gittins", "srpt", "broken"),
                (
                    (_where(cell), *(f"{cell.jct[policy]:.3g}" for policy in POLICIES), "; ".join(cell.violations))
                    for cell in bad
                ),
            ),
        ]
    else:
        parts.append(f"No promise is broken at any of the {len(found)} points.\n")
    return "".join(parts)


def _promise(name: str, worst: Cell, value: float, bound: float, all_values: list[float]) -> tuple[str, ...]:
    held = sum(each <= bound for each in all_values)
    return name, f"{value:.3f}", _where(worst), f"{held} of {len(all_values)}"


def _where(cell: Cell) -> str:
    return f"{WORKLOADS[cell.workload]}, batch {cell.batch}, load {cell.load:g}"
