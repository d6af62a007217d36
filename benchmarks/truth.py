"""Whether the simulator tells the truth: one trace run for real and in virtual time, and a recorded run replayed.

    python benchmarks/truth.py [--runs 3] [--jobs 200] [--json truth.json]

Bursts of short questions and long stories go through a real model (LLM.replay) under fcfs and skip-join-mlfq. The same
jobs, with the output lengths of the real run, go through the simulator with the cost model that the machine was
measured to have (LLM.profile): the mean of a profile just before the run and one just after, since a shared machine
changes its speed meanwhile. Rounds are interleaved: profile, fcfs, profile, skip-join-mlfq, profile, and again. Mean
and P95 JCT are compared by their medians over the rounds, and round by round; the goal is 10 %. Where the cost model
errs is told by the shape of iterations, and by a third simulation, whose cost model is fitted to the iterations of the
real run itself: it tells the simulator's error from that of the profile, and from what other programs did to the
machine meanwhile.

The second part records a run on too little memory, KV swapping included, and replays it with the recorded times: every
plan must come out identical, to the last bit.

Exits with 1 when a plan does not; a difference of JCTs is only told, since other programs on the machine change it.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import numpy as np
from command import parse
from cpu_clock import CpuTimed
from rich.console import Console

from fastserve import LLM, CostModel, SamplingParams
from fastserve.assembly import assemble
from fastserve.bench.tables import new_table
from fastserve.bench.trace import QUESTIONS, STORIES
from fastserve.bench.watch import OtherLoad, Watch, WatchedIteration, by_shape, modelled_ratio
from fastserve.config import SchedulerConfig
from fastserve.engine import Engine, IterationRecord
from fastserve.simulator import Recorder, ReplayDiverged, replay, simulate
from fastserve.types import Job
from fastserve.workloads.job import SimJob

POLICIES = ("fcfs", "skip-join-mlfq")
BURSTS = 8
LOAD = 0.7  # the work by the cost model over the time in which it arrives
STORY_SHARE = 0.2
QUESTION_TOKENS, STORY_TOKENS = 24, (60, 200)  # the most; stories draw theirs
LIMITS: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 256}
CONTEXT = 1024
TIGHT = "14M"  # of KV for the run that is recorded: some 40 blocks, and its jobs would hold a few times that
TOLERANCE = 0.10
_PARTS = ("per_iteration", "per_row", "per_token", "per_read", "per_pair")


@dataclass(frozen=True, slots=True)
class Entry:
    arrival: float  # seconds
    prompt: list[int]
    params: SamplingParams


def trace(llm: LLM, jobs: int, seed: int, cost: CostModel) -> list[Entry]:
    """Questions and stories through the chat template, in bursts, ordered by arrival."""
    draw = random.Random(seed)
    stories = round(jobs * STORY_SHARE)
    asked: list[tuple[list[int], SamplingParams]] = []
    assert llm.tokenizer is not None
    for number in range(jobs):
        story = number < stories
        text = f"Tell me a story about {draw.choice(STORIES)}." if story else draw.choice(QUESTIONS)
        prompt = llm.tokenizer.encode_chat([{"role": "user", "content": text}])
        most = draw.randint(*STORY_TOKENS) if story else QUESTION_TOKENS
        asked.append((prompt, SamplingParams(max_tokens=most, seed=number, temperature=0.8 if story else 0.0)))
    draw.shuffle(asked)
    rows = LIMITS["max_num_seqs"]
    decode = cost.plan_seconds(np.full(rows, 100, np.int32), np.ones(rows, np.int32)) / rows
    work = sum(cost.prefill_charge(0, len(prompt)) / 2 + (params.max_tokens or 0) * decode for prompt, params in asked)
    gap = work / LOAD / BURSTS
    arrivals = sorted(gap * (number % BURSTS + draw.uniform(0, 0.4)) for number in range(jobs))
    return [Entry(arrival, prompt, params) for arrival, (prompt, params) in zip(arrivals, asked, strict=True)]


def run_real(model: str, policy: str, cost: CostModel, entries: Sequence[Entry], threads: int) -> dict[str, Any]:
    """One run: its JCTs and output lengths, and how the cost model fits its iterations."""
    with LLM(
        model, policy=policy, cost=cost, threads=threads, max_model_len=CONTEXT, kv_cache_memory="1G", swap_space=0,
        on_iteration=_ignore, **LIMITS,
    ) as llm:  # fmt: skip
        llm.generate([5] * 8, SamplingParams(max_tokens=8))  # warm up: pages, threads, caches
        engine = llm._engine
        assert engine is not None
        watch = engine._executor = Watch(engine._executor)
        others = OtherLoad()
        outputs = llm.replay([(each.arrival, each.prompt, each.params) for each in entries])
        busy = others.cores()
        config = engine.config
    shapes = {
        name: {
            "iterations": len(group),
            "measured_seconds": sum(each.seconds for each in group),
            "modelled_over_measured": modelled_ratio(group, cost),
        }
        for name, group in by_shape(watch.iterations).items()
    }
    return {
        **_summary([output.metrics.jct or 0.0 for output in outputs]),
        "lengths": [len(output.token_ids) for output in outputs],
        "config": config,
        "other_cores": busy,
        "modelled_over_measured": modelled_ratio(watch.iterations, cost),
        "shapes": shapes,
        "own_cost": _own_cost(watch.iterations),
    }


def _mean_cost(one: CostModel, other: CostModel) -> CostModel:
    return replace(one, **{part: (getattr(one, part) + getattr(other, part)) / 2 for part in _PARTS})


def _own_cost(iterations: Sequence[WatchedIteration]) -> CostModel:
    """The cost model that this very run had: fitted to its iterations, and scaled to take as long as they did."""
    samples = [
        (list(zip(each.starts.tolist(), each.tokens.tolist(), strict=True)), each.seconds) for each in iterations
    ]
    fitted = CostModel.fit(samples)
    ratio = modelled_ratio(iterations, fitted) or 1.0
    return replace(fitted, **{part: getattr(fitted, part) / ratio for part in _PARTS})


def run_simulated(
    config: SchedulerConfig, cost: CostModel, entries: Sequence[Entry], lengths: Sequence[int]
) -> dict[str, float]:
    """The same jobs in virtual time."""
    jobs = [
        SimJob(each.arrival, len(each.prompt), length, max_tokens=each.params.max_tokens)
        for each, length in zip(entries, lengths, strict=True)
    ]
    ended: list[Job] = []
    simulate(jobs, config, cost, on_finish=ended.append)
    return _summary([job.metrics.jct or 0.0 for job in ended])


def measured(llm: LLM, cpu_clock: bool) -> CostModel:
    """The cost model of this machine, by either clock."""
    assert llm._calibration is not None
    if cpu_clock:
        llm._calibration._executor = CpuTimed(llm._calibration._executor)
    return llm.profile(full=True)


def compare(
    model: str, jobs: int, seed: int, runs: int, threads: int, cpu_clock: bool, console: Console
) -> dict[str, Any]:
    """All rounds."""
    options: dict[str, Any] = {"max_model_len": CONTEXT, "kv_cache_memory": "1G", "swap_space": 0}
    options |= {"threads": threads, **LIMITS}
    with LLM(model, policy=POLICIES[0], **options) as llm:
        after = measured(llm, cpu_clock)
        entries = trace(llm, jobs, seed, after)
    rounds: dict[str, list[dict[str, Any]]] = {policy: [] for policy in POLICIES}
    for number in range(runs):
        for policy in POLICIES:
            before = after
            real = run_real(model, policy, before, entries, threads)
            with LLM(model, policy=policy, **options) as llm:
                after = measured(llm, cpu_clock)
            cost = _mean_cost(before, after)
            config, lengths, own = real.pop("config"), real.pop("lengths"), real.pop("own_cost")
            simulated = run_simulated(config, cost, entries, lengths)
            fitted = run_simulated(config, own, entries, lengths)
            rounds[policy].append({"real": real, "simulated": simulated, "fitted": fitted})
            console.print(
                f"round {number + 1}, {policy}: mean JCT {real['mean_jct']:.2f} s, simulated "
                f"{simulated['mean_jct']:.2f} s, at the run's own speed {fitted['mean_jct']:.2f} s; "
                f"others took {real['other_cores'] or 0.0:.1f} cores",
                style="dim",
            )
    return {"jobs": len(entries), "seconds_of_arrivals": entries[-1].arrival, "policies": rounds}


def record_and_replay(model: str, jobs: int, seed: int, threads: int) -> dict[str, Any]:
    """Run on too little memory, and again from the recording. Raises ReplayDiverged at a plan that differs."""
    assembly = assemble(
        model,
        scheduler={"policy": "skip-join-mlfq", "block_size": 16, **LIMITS},
        runtime={"dtype": "bfloat16", "device": "cpu", "threads": threads},
        max_model_len=CONTEXT,
        kv_cache_memory=TIGHT,
        swap_space="256M",
        swap_bandwidth=None,
        skip_tokenizer=False,
        cost=None,
    )
    draw = random.Random(seed)
    recorder = Recorder(assembly.runtime)
    records: list[IterationRecord] = []

    def on_iteration(record: IterationRecord) -> None:
        records.append(record)
        recorder.on_iteration(record)

    config, cost, link = assembly.scheduling, assembly.cost, assembly.link
    engine = Engine(config, recorder, cost, link=link, clock=recorder.clock, on_iteration=on_iteration)
    due = sorted((draw.uniform(0, 0.03 * jobs), number) for number in range(jobs))
    start = time.monotonic()
    while due or engine.has_work:
        while due and start + due[0][0] <= time.monotonic():
            _, number = due.pop(0)
            prompt = [draw.randrange(3, assembly.spec.vocab_size) for _ in range(draw.randrange(10, 60))]
            output = draw.randrange(60, 120) if number % 5 == 0 else draw.randrange(2, 16)
            params = SamplingParams(max_tokens=output, temperature=0.7)
            vocabulary, stops = assembly.spec.vocab_size, assembly.spec.eos_token_ids
            recorder.entered(
                engine.add_job(
                    str(number), prompt, params, seed=number, vocab_size=vocabulary, eos_token_ids=stops
                )
            )  # fmt: skip
        until_next = max(0.0, start + due[0][0] - time.monotonic()) if due else 0.25
        if not engine.has_work:
            time.sleep(until_next)
        engine.step(until_next)
    recording = recorder.recording()
    replay(recording, config, cost, link=link)
    return {
        "jobs": jobs,
        "num_blocks": config.num_blocks,
        "plans": len(recording.outcomes),
        "plans_identical": len(recording.outcomes),  # else ReplayDiverged was raised
        "plans_with_copies": sum(record.copied_blocks > 0 for record in records),
        "copied_blocks": sum(record.copied_blocks for record in records),
        "preemptions": sum(entry.job.metrics.preemptions for entry in recording.entries),
    }


def _ignore(record: IterationRecord) -> None:
    """Levels are looked up where somebody listens; this run does, as the ones that are recorded do."""


def _summary(jcts: Sequence[float]) -> dict[str, float]:
    return {"mean_jct": mean(jcts), "p95_jct": float(np.percentile(jcts, 95))}


def differences(rounds: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of mean and P95 JCT: the medians over the rounds, how far the simulated one is off, and the median of how far
    each round's simulation is off its run, which a machine that changes its speed between rounds does not move."""
    found = {}
    for measure in ("mean_jct", "p95_jct"):
        kinds = ("real", "simulated", "fitted")
        real, simulated, fitted = (median(each[kind][measure] for each in rounds) for kind in kinds)
        paired = median(each["simulated"][measure] / each["real"][measure] - 1 for each in rounds)
        found[measure] = {"real": real, "simulated": simulated, "fitted": fitted, "paired_difference": paired}
        found[measure] |= {"difference": simulated / real - 1, "fitted_difference": fitted / real - 1}
    return found


def _print(result: dict[str, Any], console: Console) -> None:
    table = new_table()
    headings = (
        "policy",
        "JCT",
        "real",
        "simulated",
        "difference",
        "round by round",
        "at the run's own speed",
        "difference",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("policy", "JCT") else "right")
    for policy, rounds in result["policies"].items():
        for measure, found in differences(rounds).items():
            off = [
                f"[{'green' if abs(found[each]) <= TOLERANCE else 'red'}]{100 * found[each]:+.1f} %[/]"
                for each in ("difference", "paired_difference", "fitted_difference")
            ]
            real, simulated, fitted = (f"{found[each]:.2f} s" for each in ("real", "simulated", "fitted"))
            table.add_row(policy, measure.split("_")[0], real, simulated, *off[:2], fitted, off[2])
    console.print(table)
    shapes = new_table()
    for heading in ("iterations of the last round", "policy", "how many", "measured", "modelled ÷ measured"):
        shapes.add_column(heading, justify="right" if heading[0] in "hm" else "left")
    for policy, rounds in result["policies"].items():
        for name, shape in rounds[-1]["real"]["shapes"].items():
            seconds, ratio = f"{shape['measured_seconds']:.2f} s", f"{shape['modelled_over_measured']:.2f}"
            shapes.add_row(name, policy, str(shape["iterations"]), seconds, ratio)
    console.print(shapes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    description = "The simulator against a real run, and a recorded run replayed."
    options, console = parse(description, "rounds; 0: only record and replay", arguments, jobs=200)
    result: dict[str, Any] = {"benchmark": "truth", "model": options.model, "seed": options.seed, **LIMITS}
    result["clock"] = "cpu" if options.cpu_clock else "wall"
    if options.runs > 0:
        result |= compare(
            options.model, options.jobs, options.seed, options.runs, options.threads, options.cpu_clock, console
        )
        result["differences"] = {policy: differences(rounds) for policy, rounds in result["policies"].items()}
        _print(result, console)
    try:
        replayed = result["replay"] = record_and_replay(options.model, options.jobs, options.seed, options.threads)
        console.print(
            f"recorded on {replayed['num_blocks']} KV blocks and replayed: {replayed['plans_identical']} of "
            f"{replayed['plans']} plans identical, {replayed['plans_with_copies']} of them with copies of "
            f"{replayed['copied_blocks']} blocks in all; {replayed['preemptions']} preemptions"
        )
    except ReplayDiverged as error:
        result["replay"] = {"error": str(error)}
        console.print(f"[red]the replay diverged: {error}[/]")
    result["load_average"] = os.getloadavg()
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if "error" in result["replay"] else 0


if __name__ == "__main__":
    sys.exit(main())
