"""The real engine on a GPU with a KV pool that holds a quarter of what the jobs of a trace would.

    python benchmarks/gpu_jct.py [--preset llama-8b] [--seconds 120] [--json jct.json]

Long jobs come first and short ones after them, so that under skip-join-mlfq nearly every job holds KV at once. A run
with memory for all tells how much that takes, and what the tokens are; then the pool is cut to a quarter of it.
Policies are compared at the same arrivals, and the two ways of swapping by the rate that each sustains at a mean
normalized latency (JCT over output tokens) of --slo seconds a token: the paper's is 0.3. A rate is found by halving,
for which there are --seconds in all; a run that can no longer meet the limit is ended early. Each run's tokens are
compared with those of the undisturbed one.

Exits with 1 when a token differs or a job does not finish. Needs NumPy and a build with the CUDA backend, nothing else;
without a GPU it says so and exits with 0, unless FASTSERVE_CUDA_PLUGIN names an emulated one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from gpu_models import SHAPES, RandomLlama

from fastserve import InvalidRequest, SamplingParams
from fastserve.config import RuntimeConfig, SchedulerConfig
from fastserve.cost import CostModel, Link
from fastserve.engine import Engine, IterationRecord
from fastserve.native import NativeRuntime
from fastserve.profiler import measure, measure_link

POLICIES = ("fcfs", "skip-join-mlfq", "gittins")
MODES = ("proactive", "reactive")
BLOCK_SIZE = 16
LONG_SHARE, SEARCH_LONG_SHARE = 0.3, 0.1  # of the jobs, where policies are compared and where a rate is looked for
SPAN, LONG_SPAN = 0.45, 0.06  # of the time that all work takes: jobs arrive within these, short ones and long ones
SEARCH_START, SEARCH_STEPS = 2.0, 8  # arrivals so many times as fast, and runs at most
NEARLY_AT_ONCE = 50  # times as long as jobs keep coming does their work take
FINE = 1.06  # between a rate that meets the limit and one that misses it
PATIENCE = 0.05  # seconds of one wait


@dataclass(frozen=True)
class Entry:
    """A job that is to come."""

    arrival: float  # seconds after the start
    prompt: list[int]
    params: SamplingParams


@dataclass
class Run:
    """What one replay was."""

    tokens: list[list[int]]
    jct: list[float]
    seconds: float
    unfinished: int = 0
    preemptions: int = 0
    recomputed: int = 0
    least_free: int = 0
    copied_blocks: int = 0
    ended_early: bool = False

    @property
    def normalized(self) -> float:
        return mean(jct / len(tokens) for jct, tokens in zip(self.jct, self.tokens, strict=True))

    def as_dict(self) -> dict[str, Any]:
        return {
            "mean_jct": mean(self.jct),
            "p95_jct": float(np.percentile(self.jct, 95)),
            "mean_normalized_latency": self.normalized,
            "seconds": self.seconds,
            "unfinished": self.unfinished,
            "preemptions": self.preemptions,
            "recomputed_tokens": self.recomputed,
            "copied_blocks": self.copied_blocks,
        }


class Bench:
    """One runtime, and as many engines over it one after another."""

    clock = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)

    def __init__(self, options: argparse.Namespace) -> None:
        self._source = RandomLlama(options.preset)
        self.vocab_size = self._source.spec.vocab_size
        self.config = SchedulerConfig(
            max_num_seqs=options.rows,
            max_num_batched_tokens=options.batched_tokens,
            max_model_len=options.context,
            block_size=BLOCK_SIZE,
            max_in_flight=2,
            num_blocks=options.blocks,
            num_host_blocks=options.blocks,
        )
        begin = time.perf_counter()
        self.runtime = NativeRuntime(
            self._source,
            RuntimeConfig(
                device=options.device,
                dtype="bfloat16",
                block_size=BLOCK_SIZE,
                num_blocks=options.blocks,
                num_host_blocks=options.blocks,
                max_num_batched_tokens=options.batched_tokens,
            ),
        )
        self.load_seconds = time.perf_counter() - begin
        self.cost: CostModel = measure(self.runtime, self.config, vocab_size=self.vocab_size)
        self.link: Link | None = measure_link(self.runtime, options.blocks, options.blocks)

    def replay(self, entries: Sequence[Entry], *, slo: float = math.inf, **changes: Any) -> Run:
        """An open loop. `slo`: end it once the mean normalized latency is above this whatever comes."""
        records: list[IterationRecord] = []
        engine = Engine(
            replace(self.config, **changes),
            self.runtime,
            self.cost,
            link=self.link,
            clock=self.clock,
            on_iteration=records.append,
        )
        start = self.clock()
        due = sorted(range(len(entries)), key=lambda i: entries[i].arrival, reverse=True)
        jobs: dict[int, Any] = {}
        late = checked = 0.0
        while due or engine.has_work:
            now = self.clock() - start
            while due and entries[due[-1]].arrival <= now:
                i = due.pop()
                entry = entries[i]
                jobs[i] = engine.add_job(
                    str(i),
                    entry.prompt,
                    entry.params,
                    seed=i,
                    vocab_size=self.vocab_size,
                    arrival=start + entry.arrival,
                )
            if not engine.has_work:
                self.sleep(max(0.0, entries[due[-1]].arrival - now))
                continue
            engine.step(PATIENCE)
            if slo < math.inf and now > checked + PATIENCE:
                checked = now
                late = sum(_latency_so_far(job, start + now) for job in jobs.values())
                if late > slo * len(entries):
                    break
        early = bool(due or engine.has_work)
        for job in list(engine.jobs):
            engine.abort(job.job_id)
        while engine.has_work:
            engine.step(PATIENCE)
        seconds = self.clock() - start
        engine.check_integrity()
        done = [jobs[i] for i in sorted(jobs)]
        return Run(
            tokens=[list(job.output) for job in done],
            jct=[job.metrics.jct or math.inf for job in done],
            seconds=seconds,
            unfinished=0 if early else sum(len(job.output) != job.params.max_tokens for job in done),
            preemptions=sum(job.metrics.preemptions for job in done),
            recomputed=sum(job.metrics.recomputed_tokens for job in done),
            least_free=min(record.free_blocks for record in records),
            copied_blocks=sum(record.copied_blocks for record in records),
            ended_early=early,
        )


def _latency_so_far(job: Any, now: float) -> float:
    """At least what it will be, of jobs whose output's length is known."""
    jct: float = job.metrics.jct if job.finished else now - job.arrival
    return jct / float(job.params.max_tokens)


def trace(options: argparse.Namespace, bench: Bench, jobs: int, long_share: float, seed: int) -> list[Entry]:
    """Half of the jobs are sampled, half greedy; arrivals are spread over a share of the time that all work takes."""
    draw, scale = random.Random(seed), options.context / 1024
    shapes = []
    for number in range(jobs):
        if number < long_share * jobs:
            sizes = (150, 300), (200, 300), (0.0, LONG_SPAN)
        else:
            sizes = (100, 250), (4, 12), (LONG_SPAN / 2, SPAN)
        prompt, output = (max(1, round(scale * draw.uniform(*size))) for size in sizes[:2])
        shapes.append((draw.uniform(*sizes[2]), prompt, output))
    rows = options.rows
    decode = bench.cost.plan_seconds(np.full(rows, round(300 * scale), np.int32), np.ones(rows, np.int32)) / rows
    work = sum(bench.cost.prefill_charge(0, prompt) + output * decode for _, prompt, output in shapes)
    return [
        Entry(
            work * arrival,
            [draw.randrange(bench.vocab_size) for _ in range(prompt)],
            SamplingParams(max_tokens=output, ignore_eos=True, seed=number, temperature=0.8 * (number % 2)),
        )
        for number, (arrival, prompt, output) in enumerate(sorted(shapes))
    ]


def sustained(
    bench: Bench, entries: Sequence[Entry], expected: list[list[int]], slo: float, deadline: float, **changes: Any
) -> dict[str, Any]:
    """The highest rate found at which the mean normalized latency is at most `slo`, and the lowest that misses it."""
    different = 0
    span = max(entry.arrival for entry in entries)
    meets, misses, points = 0.0, math.inf, []
    speed = SEARCH_START
    for _ in range(SEARCH_STEPS):
        if bench.clock() > deadline:
            break
        faster = [replace(entry, arrival=entry.arrival / speed) for entry in entries]
        run = bench.replay(faster, slo=slo, **changes)
        met = not run.ended_early and run.normalized <= slo
        rate = len(entries) / (span / speed)
        if not run.ended_early:
            different += run.unfinished + sum(a != b for a, b in zip(run.tokens, expected, strict=True))
        points.append(
            {"rate": rate, "met": met, "mean_normalized_latency": None if run.ended_early else run.normalized}
        )
        if met:
            meets = speed
            if math.isinf(misses) and run.seconds > NEARLY_AT_ONCE * span / speed:  # faster arrivals change nothing
                break
        else:
            misses = speed
        if meets and misses / meets < FINE:
            break
        speed = meets * 2 if math.isinf(misses) else misses / 2 if meets == 0 else math.sqrt(meets * misses)
    to_rate = len(entries) / span
    return {
        "rate": meets * to_rate,
        "missed_at": None if math.isinf(misses) else misses * to_rate,
        "different": different,
        "points": points,
    }


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(options)
    entries = trace(options, bench, options.jobs, LONG_SHARE, options.seed)
    bench.replay(entries[: options.rows], policy="fcfs")  # warms up
    ample = bench.replay(entries, policy="skip-join-mlfq", num_host_blocks=0, swap_mode="recompute")
    if ample.least_free == 0:
        raise SystemExit(f"the undisturbed run has filled its {options.blocks} blocks; raise --blocks")
    longest = max(len(entry.prompt) + (entry.params.max_tokens or 0) for entry in entries)
    need = options.blocks - ample.least_free
    quarter = max(need // 4, -(-longest // BLOCK_SIZE))
    print(f"loaded in {bench.load_seconds:.1f} s; the trace needs {need} blocks, the pool has {quarter}", flush=True)
    result: dict[str, Any] = {
        "benchmark": "gpu_jct",
        "device": bench.runtime.instruction_set,
        "preset": options.preset,
        "jobs": len(entries),
        "rows": options.rows,
        "needed_blocks": need,
        "num_blocks": quarter,
        "ample": ample.as_dict(),
        "slo": options.slo,
        "runs": {},
        "sustained": {},
    }

    def save() -> None:
        if options.json is not None:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    cases: list[tuple[str, dict[str, Any]]] = [(f"{policy}, proactive", {"policy": policy}) for policy in POLICIES]
    cases += [("skip-join-mlfq, reactive", {"policy": "skip-join-mlfq", "swap_mode": "reactive"})]
    for name, changes in cases:
        run = bench.replay(entries, num_blocks=quarter, **changes)
        different = sum(a != b for a, b in zip(run.tokens, ample.tokens, strict=True))
        result["runs"][name] = {**run.as_dict(), "different": different}
        print(
            f"{name:26} mean JCT {mean(run.jct):7.3f} s, P95 {np.percentile(run.jct, 95):7.3f} s, "
            f"{run.preemptions} preemptions, {run.copied_blocks} blocks copied; {run.unfinished} unfinished, "
            f"{different} differ",
            flush=True,
        )
        save()
    longer = trace(options, bench, options.search_jobs, SEARCH_LONG_SHARE, options.seed + 1)
    undisturbed = bench.replay(longer, policy="skip-join-mlfq", num_host_blocks=0, swap_mode="recompute")
    for mode in MODES:
        deadline = bench.clock() + options.seconds / len(MODES)
        limits: dict[str, Any] = {"policy": "skip-join-mlfq", "swap_mode": mode, "num_blocks": quarter}
        found = sustained(bench, longer, undisturbed.tokens, options.slo, deadline, **limits)
        result["sustained"][mode] = found
        missed = "none missed" if found["missed_at"] is None else f"{found['missed_at']:.2f} missed"
        print(f"{mode:26} {found['rate']:.2f} jobs/s at {options.slo} s/token ({missed})", flush=True)
        save()
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="llama-8b", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--jobs", type=int, default=120, help="of the runs that compare policies (default: 120)")
    parser.add_argument("--search-jobs", type=int, default=800, help="of those that look for a rate (default: 800)")
    parser.add_argument("--rows", type=int, default=16, help="of an iteration; the paper's batch (default: 16)")
    parser.add_argument("--batched-tokens", type=int, default=2048, help="tokens of an iteration (default: 2048)")
    parser.add_argument("--context", type=int, default=1024, help="lengths are scaled to it (default: 1024)")
    parser.add_argument("--blocks", type=int, default=4096, help="of 16 tokens, of the undisturbed run (default: 4096)")
    parser.add_argument("--slo", type=float, default=0.3, help="seconds a token (default: the paper's 0.3)")
    parser.add_argument("--seconds", type=float, default=120.0, help="for the search of rates (default: 120)")
    parser.add_argument("--seed", type=int, default=0, help="of the trace (default: 0)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args(arguments)
    try:
        result = measure_all(options)
    except InvalidRequest as error:
        if error.field != "device" or os.environ.get("FASTSERVE_CUDA_PLUGIN"):
            raise
        print(f"skipped: {error}")
        return 0
    wrong = sum(run["different"] + run["unfinished"] for run in result["runs"].values())
    wrong += sum(found["different"] for found in result["sustained"].values())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
