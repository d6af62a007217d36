"""A real model with a quarter of the KV memory its jobs would take, under each swap mode.

    python benchmarks/memory_pressure.py [--runs 3] [--json pressure.json]

Long jobs come first and short ones after them, under skip-join-mlfq: whoever is long gives way to whoever is short,
so that nearly every job holds KV at once. A run with memory for all tells how much that takes and what the tokens are;
then the pool is cut to a quarter. Arrivals are spread over a share of the time that the work takes by the measured cost
model, so that a slower machine sees the same crowd. Runs are interleaved and medians taken. The last two are on a link
slowed down until a median upload takes about two iterations: on a CPU both tiers are one memory, and copies that nobody
slows take no time worth hiding.

The share of swap time that is hidden is 1 - S / C, with C the sum of all copies' seconds on their streams, and S the
seconds in which the device stood still for KV: the spans of iterations without rows while jobs were alive, each from
its submission (or the end of the iteration before it, if that is later) to its end (fastserve/bench/watch.py).

Exits with 1 when a token differs or a job does not finish.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import numpy as np
from command import parse
from cpu_clock import CpuTimed
from rich.console import Console

from fastserve import LLM, CostModel, SamplingParams
from fastserve.bench.tables import new_table
from fastserve.bench.watch import OtherLoad, Watch, summarize_swapping
from fastserve.engine import IterationRecord

LONG, SHORT = 14, 30  # jobs
SPAN = 0.45  # of the time that all work takes: the short ones arrive within it,
LONG_SPAN = 0.06  # and the long ones within this
ITERATIONS_PER_UPLOAD = 2.0  # what the slow link is slowed down to
LIMITS: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 256, "max_model_len": 1024}
AMPLE = "1G"
# Rows of the table, and the order within a round. The slow link's speed comes from the first proactive run.
MODES: dict[str, tuple[str, bool]] = {
    "proactive": ("proactive", False),
    "reactive": ("reactive", False),
    "recompute": ("recompute", False),
    "proactive, slow link": ("proactive", True),
    "reactive, slow link": ("reactive", True),
}

Entry = tuple[float, list[int], SamplingParams]


def trace(seed: int, vocab_size: int, cost: CostModel) -> list[Entry]:
    """(arrival, prompt, parameters) of every job; half of them are sampled, half greedy."""
    draw = random.Random(seed)
    shapes = [(draw.uniform(0, LONG_SPAN), draw.randrange(150, 300), draw.randrange(200, 300)) for _ in range(LONG)]
    shapes += [
        (draw.uniform(LONG_SPAN / 2, SPAN), draw.randrange(100, 250), draw.randrange(4, 12)) for _ in range(SHORT)
    ]
    rows = LIMITS["max_num_seqs"]
    decode = cost.plan_seconds(np.full(rows, 300, np.int32), np.ones(rows, np.int32)) / rows
    work = sum(cost.prefill_charge(0, prompt) + output * decode for _, prompt, output in shapes)
    return [
        (
            work * arrival,
            [draw.randrange(3, vocab_size) for _ in range(prompt)],
            SamplingParams(max_tokens=output, ignore_eos=True, seed=number, temperature=0.8 * (number % 2)),
        )
        for number, (arrival, prompt, output) in enumerate(sorted(shapes))
    ]


def run(model: str, cost: CostModel, entries: Sequence[Entry], **options: Any) -> dict[str, Any]:
    """One replay of the trace; seconds, and what swapping was."""
    records: list[IterationRecord] = []
    with LLM(
        model,
        policy="skip-join-mlfq",
        cost=cost,
        skip_tokenizer=True,
        on_iteration=records.append,
        **LIMITS,
        **options,
    ) as llm:
        llm.generate([5] * 8, SamplingParams(max_tokens=4))  # warm up: pages, threads, caches
        records.clear()
        engine = llm._engine
        assert engine is not None
        watch = engine._executor = Watch(engine._executor)  # tells the direction of copies, which records do not
        others = OtherLoad()
        outputs = llm.replay(entries)
        busy = others.cores()
        engine.check_integrity()
        info = llm.info
    metrics = [output.metrics for output in outputs]
    return {
        "swap_mode": info["swap_mode"],
        "swap_bandwidth": info["swap_bandwidth"],
        "num_blocks": info["num_blocks"],
        "num_host_blocks": info["num_host_blocks"],
        "block_bytes": info["kv_cache_bytes"] // info["num_blocks"],
        "link": info["link"],
        "peak_blocks": info["num_blocks"] - min(record.free_blocks for record in records),
        "unfinished": sum(output.finish_reason != "length" for output in outputs),
        "mean_jct": mean(each.jct or 0.0 for each in metrics),
        "makespan": max(each.finish or 0.0 for each in metrics) - min(each.arrival for each in metrics),
        "preemptions": sum(each.preemptions for each in metrics),
        "recomputed_tokens": sum(each.recomputed_tokens for each in metrics),
        "other_cores": busy,
        "swap": summarize_swapping(records, watch).as_dict(),
        "tokens": [output.token_ids for output in outputs],
    }


def measure(model: str, seed: int, runs: int, threads: int, cpu_clock: bool, console: Console) -> dict[str, Any]:
    """All runs, and how many jobs of each differed from the run with ample memory."""
    with LLM(model, policy="fcfs", skip_tokenizer=True, threads=threads, swap_space=0, **LIMITS) as llm:
        assert llm._calibration is not None
        if cpu_clock:
            llm._calibration._executor = CpuTimed(llm._calibration._executor)
        cost = llm.profile(full=False)
        entries = trace(seed, llm.spec.vocab_size, cost)
    ample = run(model, cost, entries, kv_cache_memory=AMPLE, swap_space=0, threads=threads)
    quarter = ample["peak_blocks"] // 4
    console.print(f"ample memory: {ample['peak_blocks']} blocks at the peak, mean JCT {ample['mean_jct']:.2f} s")
    pressed: dict[str, Any] = {"kv_cache_memory": quarter * ample["block_bytes"], "swap_space": "1G"}
    results: dict[str, list[dict[str, Any]]] = {}
    slow = 0
    for number in range(runs):
        for name, (mode, throttled) in MODES.items():
            if throttled and cpu_clock:
                continue  # it waits on the wall
            options = {"swap_mode": mode, "swap_bandwidth": slow if throttled else None}
            result = run(model, cost, entries, threads=threads, **pressed, **options)
            result["different"] = sum(a != b for a, b in zip(result.pop("tokens"), ample["tokens"], strict=True))
            results.setdefault(name, []).append(result)
            slow = slow or _slow_link(result)
            _tell(console, number, name, result)
    ample.pop("tokens")
    return {
        "benchmark": "memory_pressure",
        "model": model,
        "seed": seed,
        "jobs": len(entries),
        "policy": "skip-join-mlfq",
        "clock": "cpu" if cpu_clock else "wall",
        **LIMITS,
        "load_average": os.getloadavg(),
        "ample": ample,
        "runs": results,
    }


def _slow_link(proactive: dict[str, Any]) -> int:
    """Bytes a second at which this run's median upload would have taken two of its iterations."""
    swap = proactive["swap"]
    seconds = ITERATIONS_PER_UPLOAD * swap["median_iteration_seconds"]
    return max(2**20, int(swap["median_upload_blocks"] * proactive["block_bytes"] / seconds))


def _tell(console: Console, number: int, name: str, result: dict[str, Any]) -> None:
    others = result["other_cores"]
    beside = "" if others is None else f", others took {others:.1f} cores"
    console.print(f"run {number + 1}, {name}: mean JCT {result['mean_jct']:.2f} s{beside}", style="dim")


def _print(result: dict[str, Any], console: Console) -> None:
    table = new_table()
    for heading in ("", "mean JCT", "makespan", "uploads", "copies", "hidden", "upload", "recomputed", "preempted"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, runs in {"ample memory": [result["ample"]], **result["runs"]}.items():

        def of(read: Any, runs: list[dict[str, Any]] = runs) -> float:
            return float(median(read(each) for each in runs))

        hidden = [each["swap"]["hidden"] for each in runs if each["swap"]["hidden"] is not None]
        iteration = of(lambda each: each["swap"]["median_iteration_seconds"])
        table.add_row(
            name,
            f"{of(lambda each: each['mean_jct']):.2f} s",
            f"{of(lambda each: each['makespan']):.1f} s",
            f"{of(lambda each: each['swap']['uploads']):.0f}",
            f"{of(lambda each: each['swap']['copy_seconds']):.2f} s",
            f"{100 * median(hidden):.1f} %" if hidden else "–",
            f"{of(lambda each: each['swap']['median_upload_seconds']) / iteration:.2f} iterations" if hidden else "–",
            f"{of(lambda each: each['recomputed_tokens']):.0f} tokens",
            f"{of(lambda each: each['preemptions']):.0f}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    description = "A real model under memory pressure, in every swap mode."
    options, console = parse(description, "of each mode, interleaved", arguments)
    result = measure(options.model, options.seed, options.runs, options.threads, options.cpu_clock, console)
    _print(result, console)
    runs = [each for several in result["runs"].values() for each in several]
    different, unfinished = (sum(each[what] for each in runs) for what in ("different", "unfinished"))
    console.print(
        f"{len(runs)} runs of {result['jobs']} jobs on {runs[0]['num_blocks']} blocks, a quarter of the "
        f"{result['ample']['peak_blocks']} they would hold: {unfinished} jobs unfinished, {different} with other tokens"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if different or unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
