"""The paper's headline: GPT-3 175B on 16 A100, heavy-tailed lengths; preemption against Orca."""

from __future__ import annotations

from pathlib import Path

from fastserve.bench.stats import estimate

from . import figures
from .cases import Case
from .common import (
    ORCA,
    Scale,
    at_loads,
    capacities,
    capacities_of,
    contender,
    present,
    ratios,
    table,
    text,
    times,
    values,
)
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
    main, side = case(scale), case(scale, batch=BATCHES[-1])
    mean = ratios(data, "mean_jct", main, ORCA, "skip-join-mlfq", load=LOAD)
    tail = ratios(data, "p95_jct", main, ORCA, "skip-join-mlfq", load=LOAD)
    parts = [
        f"""GPT-3 175B on 16 A100-40G (TP 8 × PP 2), prompt and output each Zipf(θ) over 1 … 1024
tokens, Gamma arrivals with a coefficient of variation of 1, {main.jobs} jobs of which the first {main.warmup_jobs}
are left out, {seeds} seeds; for other θ and batches {side.jobs} jobs less {side.warmup_jobs} and {SIDE_SEEDS} seeds.
A batch of {BATCH} is one of each of the two pipeline stages.
*Orca* is fcfs with `--admission reserve`: KV for 2048 tokens from the start.
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
            present(lambda load: _ratio_row(f"{load:g}", data, main, load), LOADS),
        ),
        f"\nOver θ, at load {LOAD:g}; the larger θ, the fewer of the jobs hold most of the work:\n\n",
        table(
            _ratio_head("θ"),
            present(lambda theta: _ratio_row(f"{theta:g}", data, case(scale, theta), LOAD), THETAS),
        ),
        f"\nOver the batch, at load {LOAD:g} of that batch's own capacity:\n\n",
        table(
            ("batch", "Orca saturates at", "skip-join: mean", "P95", "P99", "over paged fcfs: mean", "P95", "P99"),
            present(lambda batch: _batch_row(data, case(scale, batch=batch)), BATCHES),
        ),
        "\nOrca's saturation is a load too: below 1, reserving for the longest output keeps out jobs that would fit; "
        f"where it is below {LOAD:g}, Orca's queue only grows, so that the ratio over it is that of a finite trace.\n",
        "\n**Where preemption does not pay.** ",
        *(present(lambda part: part(data, scale), (_low_load, _large_batch, _light_tails))),
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


def _gain(
    data: Data, measure: str, which: Case, policy: str = "skip-join-mlfq", base: str = ORCA, load: float = LOAD
) -> str:
    return times(ratios(data, measure, which, base, policy, load=load))


def _low_load(data: Data, scale: Scale) -> str:
    main, low = case(scale), LOADS[0]
    return (
        f"At load {low:g} hardly anybody waits: mean {_gain(data, 'mean_jct', main, load=low)}, P95 "
        f"{_gain(data, 'p95_jct', main, load=low)}, P99 {_gain(data, 'p99_jct', main, load=low)}. P99 gains "
        "less than the mean at every load, since the longest jobs wait for all others. "
    )


def _large_batch(data: Data, scale: Scale) -> str:
    big = case(scale, batch=BATCHES[-1])
    return (
        f"In a batch of {BATCHES[-1]} short jobs find a place anyway: against paged fcfs, mean "
        f"{_gain(data, 'mean_jct', big, base='fcfs')}, P99 {_gain(data, 'p99_jct', big, base='fcfs')}. "
    )


def _light_tails(data: Data, scale: Scale) -> str:
    light = ", ".join(
        f"`{which.workload}` {_gain(data, 'mean_jct', which)} (gittins {_gain(data, 'mean_jct', which, 'gittins')})"
        for which in (case(scale, workload=workload) for workload in LIGHT)
    )
    jobs = case(scale, workload=LIGHT[0])
    return (
        f"On light tails, at load {LOAD:g} ({jobs.jobs} jobs less {jobs.warmup_jobs}), there is little to gain from "
        f"going first, and sharing delays everybody: {light}. A ratio below 1 is a loss.\n"
    )
