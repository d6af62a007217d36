"""OPT-175B on 16 A100, TP 8 × PP 2: the rates that are sustained with and without pipelined scheduling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from fastserve.bench.plot_style import COLOURS, INK, QUIET
from fastserve.bench.stats import estimate

from . import figures
from .cases import Case, rounded
from .common import Scale, capacities, capacities_of, point, present, table, text, values
from .lab import Data, Lab, Task
from .opt13b import MOST, gain_text, rate_text
from .search import MEAN, PRECISION, SLO, TAIL, lasting, sustained

NAME = "opt175b"
TITLE = "Pipelined scheduling: OPT-175B on 16 A100"

WORKLOADS = ("sharegpt", "alpaca")
# Jobs, as in the authors' scripts for OPT-13B: for Alpaca, as many more as come in 20 s.
SHORT: Final = {"sharegpt": 400, "alpaca": 300}
SECONDS: Final = {"sharegpt": 0.0, "alpaca": 20.0}
LONG = 3_000
SEEDS, LONG_SEEDS, CURVE_SEEDS, CAPACITY_SEEDS = 10, 2, 5, 3
ALPHA_SEEDS = 4  # with the paper's α, which preempts (and simulates) many times as much
MEASURES: Final = {MEAN: "mean", TAIL: "P95"}


@dataclass(frozen=True)
class Contender:
    """A policy, how it is run, and who of the paper is run so."""

    policy: str
    changes: dict[str, Any] = field(default_factory=dict)  # of the case
    paper: str = ""


_ALONE: Final = {"pipelining": False}
_FCFS, _VLLM, _SKIP_JOIN = "fcfs", "fcfs, one batch at a time", "skip-join"
_PAPER_ALPHA: Final = "skip-join, α 300 ms"
CONTENDERS: Final[dict[str, Contender]] = {
    _VLLM: Contender("fcfs", _ALONE, "vLLM"),
    "fcfs, KV reserved (Orca)": Contender("fcfs", {"admission": "reserve"}),
    _FCFS: Contender("fcfs", {}, "FCFS"),
    "skip-join, one batch at a time": Contender("skip-join-mlfq", _ALONE),
    "skip-join, one batch of 32 at a time": Contender("skip-join-mlfq", {**_ALONE, "max_num_seqs": 32}),
    _PAPER_ALPHA: Contender("skip-join-mlfq", {"starvation_limit": "0.3"}, "FastServe"),
    _SKIP_JOIN: Contender("skip-join-mlfq", {}, "FastServe"),
    "gittins": Contender("gittins"),
}
LONG_CONTENDERS: Final = (_VLLM, _FCFS, _SKIP_JOIN)
CURVES: Final = (*LONG_CONTENDERS, "gittins")

# What the authors published (artifact: benchmarks/artifact-evaluation/plot.ipynb, the panels for OPT-175B of figures 11
# and 12): seconds a token over jobs/s. A curve ends where they let it go on as a flat line.
PAPER_RATES: Final = {
    "sharegpt": (0.1, 0.2, 0.5, 1, 2, 2.25, 2.5, 3, 3.5, 4, 5, 6, 6.5, 7),
    "alpaca": (0.6, 3, 5, 8, 10, 11, 12, 13, 16, 19, 22, 25, 28, 31, 34, 37, 40),
}
PAPER_CURVES: Final[dict[tuple[str, str], dict[str, tuple[float, ...]]]] = {
    ("sharegpt", MEAN): {
        "FasterTransformer": (0.07, 0.463, 1.181, 2.714),
        "vLLM": (0.093, 0.089, 0.089, 0.489, 0.839, 1.27, 1.52),
        "FCFS": (0.065, 0.065, 0.07, 0.084, 0.132, 0.366, 0.481, 0.849),
        "FastServe": (0.067, 0.065, 0.067, 0.083, 0.096, 0.113, 0.126, 0.152, 0.178, 0.21, 0.264, 0.382, 0.519),
    },
    ("sharegpt", TAIL): {
        "FasterTransformer": (0.204, 1.773, 3.489, 11.098),
        "vLLM": (0.142, 0.107, 0.106, 1.587, 3.377, 5.644, 5.895),
        "FCFS": (0.13, 0.13, 0.131, 0.172, 0.373, 1.154, 1.934, 4.08),
        "FastServe": (0.13, 0.13, 0.127, 0.163, 0.187, 0.237, 0.323, 0.348, 0.422, 0.502, 0.513, 0.98, 1.332, 3.45),
    },
    ("alpaca", MEAN): {
        "FasterTransformer": (0.094, 0.42, 1.279, 2.078, 2.454),
        "vLLM": (0.092, 0.095, 0.128, 0.623, 0.837, 1.049, 1.31, 1.431, 1.829, 2.413),
        "FCFS": (0.062, 0.064, 0.066, 0.07, 0.104, 0.165, 0.234, 0.415, 0.652, 0.986),
        "FastServe": (
            *(0.061, 0.063, 0.067, 0.07, 0.075, 0.095, 0.118, 0.137, 0.204),
            *(0.27, 0.352, 0.447, 0.562, 0.685, 0.813, 0.958, 1.098),
        ),
    },
}  # fmt: skip
PANELS: Final = tuple(PAPER_CURVES)
CURVE_RATES: Final = {
    "sharegpt": (0.5, 1, 2, 2.5, 3, 4, 5, 6.5, 10),
    "alpaca": (3, 5, 8, 10, 12, 16, 19, 25, 31, 40, 80),
}


def case(workload: str, jobs: int, contender: str = _FCFS) -> Case:
    main = Case(
        workload=workload,
        jobs=jobs,
        model="opt-175b",
        hardware="a100-40g",
        tensor_parallel_size=8,
        pipeline_parallel_size=2,
    )
    return Case.from_dict(main.as_dict() | CONTENDERS[contender].changes)


def paper_rate(workload: str, measure: str, system: str) -> float | None:
    """Jobs/s at which what the authors published first crosses SLO, linear between their points."""
    curve = PAPER_CURVES.get((workload, measure), {}).get(system, ())
    for (low, under), (high, over) in pairwise(zip(PAPER_RATES[workload], curve, strict=False)):
        if under <= SLO < over:
            return low + (high - low) * (SLO - under) / (over - under)
    return None


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Length:
    """How many jobs: so many, or as many as come in some seconds if that is more."""

    jobs: int
    seconds: float = 0.0


def _short(scale: Scale, workload: str) -> Length:
    shrink = scale.pick(1, 10)
    return Length(SHORT[workload] // shrink, SECONDS[workload] / shrink)


def _long(scale: Scale) -> Length:
    return Length(scale.pick(LONG, LONG // 10))


def _searches(scale: Scale) -> Iterator[tuple[str, Length, str, str, range]]:
    """(workload, length, contender, measure, seeds) of the rates that are searched."""
    for workload, measure in PANELS:
        for name in CONTENDERS:
            if name != _PAPER_ALPHA:
                yield workload, _short(scale, workload), name, measure, scale.seeds(SEEDS)


def _long_searches(scale: Scale) -> Iterator[tuple[str, Length, str, str, range]]:
    """Those that take longest."""
    for workload in reversed(WORKLOADS):
        for name in LONG_CONTENDERS:
            yield workload, _long(scale), name, MEAN, scale.seeds(LONG_SEEDS)
    for workload, measure in PANELS:
        yield workload, _short(scale, workload), _PAPER_ALPHA, measure, scale.seeds(ALPHA_SEEDS)


def measure(lab: Lab, scale: Scale) -> None:
    own = {(workload, name): _capacity_case(scale, workload, name) for workload in WORKLOADS for name in CONTENDERS}
    known = capacities(lab, own.values(), scale.seeds(CAPACITY_SEEDS), scale)

    def search(workload: str, length: Length, name: str, limited: str, seeds: range) -> None:
        rate = rounded(known[own[workload, name], 0])
        which, policy = case(workload, length.jobs, name), CONTENDERS[name].policy
        tasks = [
            Task(
                {**_what(workload, length, name, limited), "seed": seed},
                sustained,
                (which, policy, seed, rate, rounded(MOST * rate), limited, length.seconds),
            )
            for seed in seeds
        ]
        lab.run(tasks, f"{workload}, {length.jobs} jobs, {MEASURES[limited]}, {name}")

    for each in _searches(scale):
        search(*each)
    lab.run(
        [
            point(_curve_case(scale, workload, name, rate), CONTENDERS[name].policy, seed, rate, scale)
            for workload in WORKLOADS
            for rate in _curve_rates(scale, workload)
            for name in CURVES
            for seed in scale.seeds(CURVE_SEEDS)
        ],
        "curves",
    )
    for each in _long_searches(scale):
        search(*each)


def _what(workload: str, length: Length, name: str, limited: str) -> dict[str, Any]:
    """Of which search a result is, but for the seed."""
    what = {
        "sustained": case(workload, length.jobs, name).as_dict(),
        "policy": CONTENDERS[name].policy,
        "measure": limited,
    }
    return what | ({"seconds": length.seconds} if length.seconds else {})


def _capacity_case(scale: Scale, workload: str, name: str) -> Case:
    return case(workload, _long(scale).jobs, name)


def _curve_case(scale: Scale, workload: str, name: str, rate: float) -> Case:
    length = _short(scale, workload)
    return lasting(case(workload, length.jobs, name), rate, length.seconds)


def _curve_rates(scale: Scale, workload: str) -> tuple[float, ...]:
    rates: tuple[float, ...] = CURVE_RATES[workload]
    return rates[1::3] if scale.quick else rates


# --- telling ---------------------------------------------------------------------------------------------------------


def _rates(data: Data, workload: str, length: Length, name: str, limited: str) -> list[float]:
    """Sustained rates by seed, infinite where the limit is never reached; none where they were not measured yet."""
    found = sorted(data.select(**_what(workload, length, name, limited)), key=lambda pair: pair[0]["seed"])
    return [float("inf") if result["rate"] is None else result["rate"] for _, result in found]


def _latencies(data: Data, workload: str, name: str, rate: float, limited: str) -> list[float]:
    """Normalized latencies at one rate of the curves, by seed."""
    which = _curve_case(Scale(data.quick), workload, name, rate)
    return values(data, limited, which, CONTENDERS[name].policy, rate=rate)


def draw(data: Data, folder: Path) -> None:
    title = "OPT-175B on 16 A100-40G (TP 8 × PP 2), batch 16; dashed: the paper's"
    with figures.canvas(folder / "opt175b.svg", title, (13.2, 4.4)) as figure:
        for axes, (workload, limited) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            rates = _curve_rates(Scale(data.quick), workload)
            for name in CURVES:
                contender = CONTENDERS[name]
                colour = INK if name == _VLLM else COLOURS[contender.policy]
                found = [estimate(_latencies(data, workload, name, rate, limited)) for rate in rates]
                figures.line(axes, contender.policy, rates, found, label=name, color=colour)
                if curve := PAPER_CURVES[workload, limited].get(contender.paper):
                    style: dict[str, Any] = {"color": colour, "linestyle": (0, (2, 2)), "linewidth": 1.2}
                    axes.plot(PAPER_RATES[workload][: len(curve)], curve, label=f"{contender.paper} (paper)", **style)
            axes.axhline(SLO, color=QUIET, linewidth=1, linestyle=(0, (5, 4)), zorder=0)
            axes.set_xscale("log")
            figures.logarithmic(axes.xaxis)
            axes.set_xlim(min(rates) * 0.9, max(rates) * 1.1)
            axes.set_ylim(0, 0.8)
            axes.set_xlabel("jobs per second")
            axes.set_ylabel(f"{MEASURES[limited]} normalized latency (s per token)")
            figures.plain(axes, {"sharegpt": "ShareGPT-like", "alpaca": "Alpaca-like"}[workload])
        figures.legend_below(figure, figure.axes[0])


def section(data: Data) -> str:
    scale = Scale(data.quick)
    low = {workload: min(_curve_rates(scale, workload)) for workload in WORKLOADS}
    ours = {each: text(_latencies(data, each, _FCFS, low[each], MEAN)) for each in WORKLOADS}
    seeds, length = len(scale.seeds(SEEDS)), _short(scale, "alpaca")
    sharegpt = case("sharegpt", _short(scale, "sharegpt").jobs)
    return f"""OPT-175B on 16 A100-40G, TP 8 inside each of two nodes and a pipeline stage on each, as much KV as the
weights leave (3,551 blocks), batch 16, 2048 tokens a batch, blocks of 16, Gamma arrivals (CV 1). With pipelined
scheduling each of the two stages has a batch, so 32 jobs run at a time; *one batch at a time* is the same machine
without (`--no-pipelining`): a batch of 16 goes through both stages before the next enters, and half of the machine
stands idle. The rate is found by bisection, to {100 * PRECISION:.0f} %, for each seed: the highest at which the
normalized latency (JCT ÷ output tokens) stays within {SLO} s, in the mean over jobs or at P95. Traces are as long as in
the authors' scripts for OPT-13B (for 175B they published none): {sharegpt.jobs} jobs of ShareGPT; of Alpaca
{length.jobs}, or what comes in {length.seconds:g} s if that is more. {seeds} seeds; {len(scale.seeds(ALPHA_SEEDS))}
with the authors' α.

    {sharegpt.command("fcfs skip-join-mlfq gittins", "--rate 4", seeds)}

    {case("sharegpt", sharegpt.jobs, _VLLM).command("fcfs skip-join-mlfq", "--rate 2", seeds)}

What is whose: the paper's FCFS is our fcfs and its FastServe our skip-join, both pipelined, once with the authors' α
of 300 ms and once with our 60 s. Its vLLM is set beside fcfs of one batch at a time: that is a guess, from its rates,
which here are 0.35 (ShareGPT) and 0.49 (Alpaca) of those of their FCFS and were 0.95 and 0.72 of them on one device.
FasterTransformer batches whole jobs, which nothing here does. Orca has no row for OPT-175B there (see [the
headline](#the-headline-gpt-3-175b-on-16-a100)).

Jobs/s sustained at {SLO} s/token; × is the gain over fcfs, seed by seed:

{_table(data, PANELS)}
{_gains(data)}
**Where ours differ, and why.** At the lowest rates, where nobody waits, fcfs takes {ours["sharegpt"]} s a token on
ShareGPT and {ours["alpaca"]} on Alpaca, the paper's 0.07 and 0.064: the modelled machine is half as fast again as
theirs (presets.py has what is assumed of it; nothing was fitted), and its rates are higher by as much or more. So gains
compare, and rates do not. In ShareGPT's mean the gain over fcfs is smaller than the paper's, because our fcfs does
better, not because skip-join does worse, probably as with OPT-13B: waiting is divided by output tokens, and a
log-normal has fewer outputs of very few tokens than people's conversations. (Where nobody waits, the paper's P95 is
twice its mean, 0.130 to 0.065; ours is hardly above it.) P95 does not see how few the fewest are. How long a trace
is decides as much: in the Alpaca rows of [OPT-13B](#sustained-rates-opt-13b-on-one-a100), 400 jobs whatever the rate,
skip-join gains several times as much, of jobs that are all there after a second or two. The paper's α costs about a
tenth of the rate. Orca reserves 128 blocks a job, so that only 27 of the 32 rows are ever used.

![Normalized latency over rate](opt175b.svg)

**What pipelining is worth.** {_capacities(data, scale)}
**What is left of it in a steady state.** Such traces are over before anything is steady, so a rate far above capacity
can be "sustained". With {_long(scale).jobs} jobs ({len(scale.seeds(LONG_SEEDS))} seeds), at the mean, pipelining is
still worth its factor of 2, and preemption what there is to gain near capacity:

{_long_table(data, scale)}
Seconds a token over the rate, {len(scale.seeds(CURVE_SEEDS))} seeds:

{_curve_table(data, scale)}"""


def _table(data: Data, panels: Sequence[tuple[str, str]]) -> str:
    rows = []
    for workload, limited in panels:
        length = _short(Scale(data.quick), workload)
        for name in CONTENDERS:
            paper = _paper_cells(
                workload, limited, CONTENDERS[name].paper, _rates(data, workload, length, name, limited)
            )
            rows.append([*_row(data, workload, length, name, limited), *paper])
        rows.append([workload, MEASURES[limited], "–", "", "", *_paper_cells(workload, limited, "FasterTransformer")])
    return table((*_HEAD, "paper", "jobs/s", "×", "ours ÷ paper"), rows, left=3)


def _long_table(data: Data, scale: Scale) -> str:
    cells = ((workload, _long(scale), name, MEAN) for workload in WORKLOADS for name in LONG_CONTENDERS)
    return table(_HEAD, (_row(data, *each) for each in cells), left=3)


_HEAD: Final = ("workload", "limit on", "policy", "ours", "×")


def _row(data: Data, workload: str, length: Length, name: str, limited: str) -> list[str]:
    own, base = (_rates(data, workload, length, each, limited) for each in (name, _FCFS))
    most = MOST * capacities_of(data, _capacity_case(Scale(data.quick), workload, name))[0]
    return [workload, MEASURES[limited], name, rate_text(own, most), gain_text(own, base, most)]


def _paper_cells(workload: str, limited: str, system: str, own: Sequence[float] = ()) -> list[str]:
    """Whose, its rate, its gain over the paper's FCFS, and how many times higher our rate is."""
    rate, base = paper_rate(workload, limited, system), paper_rate(workload, limited, "FCFS")
    if rate is None or base is None:
        return ["", "", "", ""]
    ratio = text([each / rate for each in own]) if own and max(own) < float("inf") else "–"
    return [system, f"{rate:.3g}", f"{rate / base:.2f} ×", ratio]


def _gains(data: Data) -> str:
    """Ours and the paper's gain of pipelined skip-join over both kinds of fcfs."""
    rows = []
    for workload, limited in PANELS:
        best, length = paper_rate(workload, limited, "FastServe"), _short(Scale(data.quick), workload)
        own = _rates(data, workload, length, _SKIP_JOIN, limited)
        for name in (_FCFS, _VLLM):
            base, theirs = _rates(data, workload, length, name, limited), CONTENDERS[name].paper
            other = paper_rate(workload, limited, theirs)
            if best is not None and other is not None:
                gains = [each / rate for each, rate in zip(own, base, strict=False)]
                versus = text([gain * other / best for gain in gains]) if gains else "–"
                rows.append(
                    (
                        workload,
                        MEASURES[limited],
                        name,
                        gain_text(own, base, 0.0),
                        f"{theirs}: {best / other:.2f} ×",
                        versus,
                    )
                )
    head = ("workload", "limit on", "skip-join over", "ours", "the paper's FastServe over", "ours ÷ paper")
    return table(head, rows, left=3)


def _capacities(data: Data, scale: Scale) -> str:
    def told(workload: str) -> str:
        piped, alone, wide = (
            capacities_of(data, _capacity_case(scale, workload, name))
            for name in (_SKIP_JOIN, "skip-join, one batch at a time", "skip-join, one batch of 32 at a time")
        )
        gains = [[own / base for own, base in zip(piped, others, strict=True)] for others in (alone, wide)]
        return (
            f"{workload}: {text(piped)} jobs/s with a batch of 16 in each stage, {text(alone)} with one batch of 16 "
            f"({text(gains[0])} ×), {text(wide)} with one of 32 ({text(gains[1])} ×)"
        )

    return (
        f"What fcfs gets done when there is always more to do: {'; '.join(present(told, WORKLOADS))}. "
        "Decodes are bound by reading the weights: two batches of 16 at a time, or one of 32 that reads them half as "
        "often, put out about as many tokens. What a pipeline adds to that is the prefills, which are bound by "
        "compute, and keep both nodes busy.\n"
    )


def _curve_table(data: Data, scale: Scale) -> str:
    rows = []
    for workload, limited in PANELS:
        for rate in _curve_rates(scale, workload):
            row = [workload, MEASURES[limited], f"{rate:g}"]
            for name in CURVES:
                row.append(text(_latencies(data, workload, name, rate, limited)))
            for system in ("vLLM", "FCFS", "FastServe"):
                curve = PAPER_CURVES[workload, limited][system]
                row.append(str(dict(zip(PAPER_RATES[workload], curve, strict=False)).get(rate, "–")))
            rows.append(row)
    return table(("workload", "", "jobs/s", *CURVES, "paper: vLLM", "FCFS", "FastServe"), rows, left=2)
