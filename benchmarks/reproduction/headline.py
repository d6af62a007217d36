"""The paper's headline: GPT-3 175B on 16 A100, heavy-tailed lengths; preemption against Orca."""

from __future__ import annotations

from pathlib import Path

from fastserve.bench.stats import estimate

from . import figures
from .cases import Case
from .common import ORCA, Scale, at_loads, capacities, capacities_of, contender, ratios, table, text, times, values
from .lab import Data, Lab

NAME = "headline"
TITLE = "The headline: GPT-3 175B on 16 A100"

THETA, LOAD, BATCH = 2.0, 0.95, 8
THETAS = (1.5, 1.8, 2.0, 2.2)
LOADS = (0.5, 0.7, 0.9, 0.95, 0.98)
BATCHES = (8, 16, 64)
LIGHT = ("constant:128,128", "bimodal:64,192,0.5,64")
CONTENDERS = (ORCA, "fcfs", "mlfq", "skip-join-mlfq", "gittins", "srpt")
SEEDS = 5
SIDE_SEEDS = 3  # of what is not the headline itself
PAPER_MEAN, PAPER_P95 = 5.1, 6.4


def case(scale: Scale, theta: float = THETA, batch: int = BATCH, workload: str | None = None) -> Case:
    if workload is not None:  # a light tail settles sooner
        jobs, warmup = scale.pick((1_200, 200), (300, 50))
    elif (theta, batch) == (THETA, BATCH):
        jobs, warmup = scale.pick((24_000, 4_000), (2_000, 400))
    else:
        jobs, warmup = scale.pick((6_000, 1_000), (1_000, 200))
    return Case(
        workload=workload or f"zipf:{theta:g}",
        jobs=jobs,
        warmup_jobs=warmup,
        model="gpt3-175b",
        hardware="a100-40g",
        tensor_parallel_size=8,
        pipeline_parallel_size=2,
        max_num_seqs=batch,
    )


def measure(lab: Lab, scale: Scale) -> None:
    seeds = scale.seeds(SEEDS)
    main = case(scale)
    at_loads(lab, [main], LOADS, CONTENDERS, seeds, scale)
    others = [case(scale, batch=batch) for batch in BATCHES if batch != BATCH]
    others += [case(scale, theta) for theta in THETAS if theta != THETA]
    others += [case(scale, workload=workload) for workload in LIGHT]
    seeds = scale.seeds(SIDE_SEEDS)
    capacities(lab, [contender(case(scale, batch=batch), ORCA)[0] for batch in BATCHES], seeds, scale)
    at_loads(lab, others, [LOAD], [name for name in CONTENDERS if name != "mlfq"], seeds, scale)


def draw(data: Data, folder: Path) -> None:
    main = case(Scale(data.quick))
    figures.over_loads(
        folder / "headline.svg",
        f"GPT-3 175B on 16 A100-40G (TP 8 × PP 2), Zipf {THETA:g}, batch {BATCH}",
        LOADS,
        {
            label: {
                name: [estimate(values(data, measure, main, name, load=load)) for load in LOADS] for name in CONTENDERS
            }
            for measure, label in (("mean_jct", "Mean JCT"), ("p95_jct", "P95 JCT"), ("p99_jct", "P99 JCT"))
        },
    )


def section(data: Data) -> str:
    scale = Scale(data.quick)
    seeds = len(scale.seeds(SEEDS))
    main = case(scale)
    mean = ratios(data, "mean_jct", main, ORCA, "skip-join-mlfq", load=LOAD)
    tail = ratios(data, "p95_jct", main, ORCA, "skip-join-mlfq", load=LOAD)
    parts = [
        f"""GPT-3 175B on 16 A100-40G (TP 8 × PP 2), prompt and output each Zipf(θ) over 1 … 1024
tokens, Gamma arrivals with a coefficient of variation of 1, {main.jobs} jobs of which the first {main.warmup_jobs}
are left out, {seeds} seeds ({SIDE_SEEDS}, and 6000 jobs less 1000, for other θ and batches). A batch of {BATCH} is
one of each of the two pipeline stages. *Orca* is fcfs with `--admission reserve`: KV for 2048 tokens from the start.
A load is the rate as a share of what fcfs with paged admission gets done; all loads here are below saturation.

At **θ = {THETA:g}, batch {BATCH}, load {LOAD:g}**, skip-join-mlfq against Orca, ratios taken seed by seed:

""",
        table(
            ("", "ours", "the paper, up to"),
            [
                ("mean JCT", f"**{times(mean)}**", f"{PAPER_MEAN} ×"),
                ("P95 JCT", f"**{times(tail)}**", f"{PAPER_P95} ×"),
            ],
        ),
        f"\n    {main.command('fcfs skip-join-mlfq', f'--load {LOAD:g}', seeds)}\n\n![JCT over load](headline.svg)\n\n",
        "Every policy there, in seconds, and how many times smaller than Orca's:\n\n",
        _policies(data, main, CONTENDERS),
        "\nOver the load, how many times smaller than Orca's:\n\n",
        table(
            _ratio_head("load"),
            (_ratio_row(f"{load:g}", data, main, load) for load in LOADS),
        ),
        f"\nOver θ, at load {LOAD:g}; the larger θ, the fewer of the jobs hold most of the work:\n\n",
        table(_ratio_head("θ"), (_ratio_row(f"{theta:g}", data, case(scale, theta), LOAD) for theta in THETAS)),
        f"\nOver the batch, at load {LOAD:g} of that batch's own capacity:\n\n",
        table(
            ("batch", "Orca saturates at", "skip-join: mean", "P95", "P99", "over paged fcfs: mean", "P95", "P99"),
            (_batch_row(data, case(scale, batch=batch)) for batch in BATCHES),
        ),
        "\nOrca's saturation is a load too: below 1, reserving for the longest output keeps out jobs that would fit; "
        f"where it is below {LOAD:g}, Orca's queue only grows, so that the ratio over it is that of a finite trace.\n",
        "\n**Where preemption does not pay.** ",
        _does_not_pay(data, scale),
    ]
    return "".join(parts)


def _ratio_head(first: str) -> tuple[str, ...]:
    return (first, "skip-join: mean", "P95", "P99", "gittins: mean", "P95", "P99", "srpt: mean")


_RATIOS = (
    ("skip-join-mlfq", "mean_jct"),
    ("skip-join-mlfq", "p95_jct"),
    ("skip-join-mlfq", "p99_jct"),
    ("gittins", "mean_jct"),
    ("gittins", "p95_jct"),
    ("gittins", "p99_jct"),
    ("srpt", "mean_jct"),
)


def _ratio_row(first: str, data: Data, which: Case, load: float) -> tuple[str, ...]:
    return (first, *(text(ratios(data, measure, which, ORCA, name, load=load)) for name, measure in _RATIOS))


def _batch_row(data: Data, which: Case) -> tuple[str, ...]:
    gains = (
        text(ratios(data, measure, which, base, "skip-join-mlfq", load=LOAD))
        for base in (ORCA, "fcfs")
        for measure in ("mean_jct", "p95_jct", "p99_jct")
    )
    return (str(which.max_num_seqs), _saturation(data, which), *gains)


def _policies(data: Data, which: Case, names: tuple[str, ...]) -> str:
    measures = ("mean_jct", "p95_jct", "p99_jct")
    return table(
        ("policy", "mean JCT", "×", "P95", "×", "P99", "×", "s/token"),
        (
            (
                name,
                *(
                    cell
                    for measure in measures
                    for cell in (
                        text(values(data, measure, which, name, load=LOAD)),
                        text(ratios(data, measure, which, ORCA, name, load=LOAD)),
                    )
                ),
                text(values(data, "mean_normalized_latency", which, name, load=LOAD)),
            )
            for name in names
        ),
    )


def _saturation(data: Data, which: Case) -> str:
    paged, reserve = (capacities_of(data, each) for each in (which, contender(which, ORCA)[0]))
    return text([own / base for own, base in zip(reserve, paged, strict=False)])


def _does_not_pay(data: Data, scale: Scale) -> str:
    def gain(measure: str, which: Case, policy: str = "skip-join-mlfq", base: str = ORCA, load: float = LOAD) -> str:
        return times(ratios(data, measure, which, base, policy, load=load))

    main, big, low = case(scale), case(scale, batch=BATCHES[-1]), LOADS[0]
    light = ", ".join(
        f"`{which.workload}` {gain('mean_jct', which)} (gittins {gain('mean_jct', which, 'gittins')})"
        for which in (case(scale, workload=workload) for workload in LIGHT)
    )
    return (
        f"At load {low:g} hardly anybody waits: mean {gain('mean_jct', main, load=low)}, P95 "
        f"{gain('p95_jct', main, load=low)}, P99 {gain('p99_jct', main, load=low)}. In a batch of {BATCHES[-1]} short "
        f"jobs find a place anyway: against paged fcfs, mean {gain('mean_jct', big, base='fcfs')}. On light tails, at "
        f"load {LOAD:g}, there is little to gain from going first, and sharing delays everybody: {light}. A ratio "
        "below 1 is a loss. And the tail gains less than the mean everywhere: the longest jobs wait for all others.\n"
    )
