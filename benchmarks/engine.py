"""What is around the runtime: the start, Python's share of an iteration, the second core, idling, and the gaps between
a stream's tokens while a long prompt comes. Medians of several runs in turn; nothing else should be running.

    python benchmarks/engine.py --runs 5
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from fastserve import LLM, AsyncLLM, SamplingParams
from fastserve.engine import IterationRecord

BATCH, PROMPT, OUTPUT = 32, 96, 120
STREAMS, STREAMED = 8, 400  # jobs that decode while a prompt comes, and tokens of each
SHORT, LONG = 16, 2048  # tokens of that prompt
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(";")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quantization", default="auto", choices=["auto", "int8", "none"])
    parser.add_argument("--runs", type=int, default=5, help="(default: 5)")
    parser.add_argument("--json", type=Path, help="write every run's figures to this file")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs takes numbers from 1 on")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    parts: list[Callable[[argparse.Namespace], Figures]] = [_start, _batch, _idle, _streams]
    runs: list[Figures] = []
    for run in range(options.runs):
        print(f"run {run + 1} of {options.runs}", file=sys.stderr)
        runs.append({name: value for part in parts for name, value in part(options).items()})
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"{name:62} {median(values):9.3f}   {min(values):.3f} to {max(values):.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps(runs, indent=1) + "\n")


def _start(options: argparse.Namespace) -> Figures:
    """`fastserve generate` as a user starts it."""
    command = [sys.executable, "-m", "fastserve", "generate", "--prompt", "Once upon a time", "--max-tokens", "8"]
    command += ["--model", options.model, "--quantization", options.quantization]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    peak, first = 0.0, None
    while process.stdout.read(1):
        first = first or time.perf_counter() - begin
        peak = _peak_memory(process.pid) or peak  # of a process that has ended there is none
    if process.wait() != 0 or first is None:
        raise SystemExit(f"fastserve generate ended with {process.returncode}")
    return {"start to first character, s": first, "peak RSS, MB": peak}


def _peak_memory(pid: int) -> float | None:
    """In MB. What wait4 tells counts the process that forked it, too."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM:")), None)


def _batch(options: argparse.Namespace) -> Figures:
    """Decoding a full batch with every thread, and with one."""
    figures = {threads: _decode(options, threads) for threads in (0, 1)}
    iteration, python, outside = figures[0]
    return {
        f"iteration of {BATCH} decodes, ms": iteration * 1e3,
        "Python's thread, processor ms an iteration": python * 1e3,
        "the same, % of the iteration": 100 * python / iteration,
        "time not in the runtime's pass, % of the iteration": 100 * outside / iteration,
        "speed of all threads over one": figures[1][0] / iteration,
    }


def _decode(options: argparse.Namespace, threads: int) -> tuple[float, float, float]:
    """Seconds of an iteration: on the wall, of Python's thread, and on the wall outside the runtime."""
    records: list[tuple[float, float, float]] = []

    def note(record: IterationRecord) -> None:
        if record.decode_tokens == BATCH:
            records.append((time.perf_counter(), time.thread_time(), record.seconds))

    with _loaded(LLM, options, threads=threads, max_num_seqs=BATCH, on_iteration=note) as llm:
        llm.generate(_prompts(BATCH, PROMPT), _greedy(OUTPUT))
    (begin, cpu, _), (end, last_cpu, _) = records[0], records[-1]
    passes, count = sum(seconds for *_, seconds in records[1:]), len(records) - 1
    return (end - begin) / count, (last_cpu - cpu) / count, max(0.0, end - begin - passes) / count


def _idle(options: argparse.Namespace) -> Figures:
    with _loaded(LLM, options) as llm:
        llm.generate(_prompts(1, PROMPT), _greedy(32))
        time.sleep(1)
        begin = time.process_time()
        time.sleep(3)
        return {"processor use from 1 s after work, % of a core": 100 * (time.process_time() - begin) / 3}


def _streams(options: argparse.Namespace) -> Figures:
    """Tokens of jobs as their readers get them. The short prompt shows what the machine does by itself."""
    figures: Figures = {}
    for label, prompt, limit in (("short", SHORT, "auto"), ("long", LONG, "auto"), ("long, no limit", LONG, None)):
        beside, worst, first = asyncio.run(_gaps(options, prompt, limit))
        figures[f"{label} prompt: gaps beside it over the median gap"] = beside
        figures[f"{label} prompt: largest gap over the median gap"] = worst
        figures[f"{label} prompt: its first token after, s"] = first
    return figures


async def _gaps(options: argparse.Namespace, prompt: int, limit: str | None) -> tuple[float, float, float]:
    stamps: list[list[float]] = [[] for _ in range(STREAMS + 1)]
    async with _loaded(AsyncLLM, options, max_model_len=4096, stall_limit=limit) as llm:

        async def read(index: int, tokens: list[int], output: int) -> None:
            async for _ in llm.generate(tokens, _greedy(output)):
                stamps[index].append(time.perf_counter())

        readers = [asyncio.create_task(read(i, p, STREAMED)) for i, p in enumerate(_prompts(STREAMS, 64))]
        while len(stamps[0]) < 60 and not readers[0].done():
            await asyncio.sleep(0.01)
        begin = time.perf_counter()
        (long,) = _prompts(1, prompt)
        await read(STREAMS, long, 4)
        first = stamps[STREAMS][0]
        await asyncio.gather(*readers)
    beside, worst = [], []
    for reader in stamps[:STREAMS]:
        gaps = [(b - a, b) for a, b in itertools.pairwise(reader[5:])]
        usual = median(gap for gap, _ in gaps)
        beside.append(median([gap for gap, end in gaps if begin < end < first + usual]) / usual)
        worst.append(max(gap for gap, _ in gaps) / usual)
    return median(beside), max(worst), first - begin


def _loaded(kind: Any, options: argparse.Namespace, **more: Any) -> Any:
    return kind(options.model, quantization=options.quantization, kv_cache_memory="1G", **more)


def _prompts(count: int, tokens: int) -> list[list[int]]:
    rng = random.Random(tokens)
    return [[rng.randrange(300, 48000) for _ in range(tokens)] for _ in range(count)]


def _greedy(output: int) -> SamplingParams:
    return SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)


if __name__ == "__main__":
    main()
