"""What the engine's process costs beside LLM in one's own: a full batch of decodes in both, in turn. Medians.

    python benchmarks/worker_loop.py --runs 5

`python` is the processor time of the thread that runs the engine, per token: planning and, for LLM, turning tokens into
text; for the worker, writing and sending messages. `socket` is that of ZeroMQ's own thread. `idle` is what a worker
without work takes.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import msgspec
import zmq

from fastserve import LLM, SamplingParams
from fastserve.engine import IterationRecord
from fastserve.engine_options import EngineOptions
from fastserve.ipc import Add, FromEngine, Ready, Step, Stop

Figures = dict[str, float]
SECONDS_IDLE = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batch", type=int, default=32, help="jobs (default: 32)")
    parser.add_argument("--output", type=int, default=120, help="tokens of each (default: 120)")
    parser.add_argument("--runs", type=int, default=5, help="(default: 5)")
    given = parser.parse_args()
    options = EngineOptions(
        model=given.model, max_num_seqs=given.batch, kv_cache_memory="512M", swap_space=0, stall_limit=None
    )
    prompts = _prompts(given.batch)
    runs: list[Figures] = []
    for run in range(given.runs):
        print(f"run {run + 1} of {given.runs}", file=sys.stderr)
        runs.append({**_in_process(options, prompts, given.output), **_worker(options, prompts, given.output)})
        wall = [runs[-1][f"{name}, ms an iteration"] for name in ("worker", "LLM")]
        runs[-1]["worker's iteration over LLM's"] = wall[0] / wall[1]
    for name in runs[0]:
        values = [figures[name] for figures in runs]
        print(f"{name:40} {median(values):9.3f}   {min(values):.3f} to {max(values):.3f}")


def _in_process(options: EngineOptions, prompts: list[list[int]], output: int) -> Figures:
    full: list[tuple[float, float]] = []

    def note(record: IterationRecord) -> None:
        if record.decode_tokens == len(prompts):
            full.append((time.perf_counter(), time.thread_time()))

    with LLM(
        options.model,
        max_num_seqs=options.max_num_seqs,
        kv_cache_memory=options.kv_cache_memory,
        swap_space=options.swap_space,
        on_iteration=note,
    ) as llm:
        llm.generate(prompts, _params(output))
    (begin, cpu), (end, last_cpu) = full[0], full[-1]
    iterations = len(full) - 1
    return {
        "LLM, ms an iteration": (end - begin) / iterations * 1e3,
        "LLM, python, µs a token": (last_cpu - cpu) / iterations / len(prompts) * 1e6,
    }


def _worker(options: EngineOptions, prompts: list[list[int]], output: int) -> Figures:
    decode = msgspec.msgpack.Decoder(FromEngine).decode
    encode = msgspec.msgpack.Encoder().encode
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        address = f"ipc://{folder}/engine"
        socket.bind(address)
        command = [sys.executable, "-m", "fastserve.worker", "--options", options.to_json(), "--address", address]
        with subprocess.Popen(command) as process:
            if not isinstance(decode(socket.recv()), Ready):
                raise SystemExit("the worker did not start")
            for key, prompt in enumerate(prompts):
                socket.send(encode(Add(key, prompt, _params(output), key, 0, time.monotonic(), [])))
            full: list[tuple[float, float, float]] = []
            ended = 0
            while ended < len(prompts):
                message = decode(socket.recv())
                if isinstance(message, Step) and message.updates:
                    ended += sum(update.finish_reason is not None for update in message.updates)
                    if len(message.updates) == len(prompts):
                        full.append((time.perf_counter(), *_cpu_seconds(process.pid)))
            time.sleep(1)
            before = sum(_cpu_seconds(process.pid))
            time.sleep(SECONDS_IDLE)
            idle = (sum(_cpu_seconds(process.pid)) - before) / SECONDS_IDLE
            socket.send(encode(Stop()))
    (begin, cpu, io), (end, last_cpu, last_io) = full[0], full[-1]
    iterations = len(full) - 1
    return {
        "worker, ms an iteration": (end - begin) / iterations * 1e3,
        "worker, python, µs a token": (last_cpu - cpu) / iterations / len(prompts) * 1e6,
        "worker, socket, µs a token": (last_io - io) / iterations / len(prompts) * 1e6,
        "worker, idle, % of a core": 100 * idle,
    }


def _cpu_seconds(pid: int) -> tuple[float, float]:
    """Of the process's first thread, and of ZeroMQ's."""
    first, others = 0.0, 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
        if task.name == str(pid):
            first = seconds
        elif (task / "comm").read_text().startswith("ZMQ"):
            others += seconds
    return first, others


def _prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(300, 48_000) for _ in range(64)] for _ in range(count)]


def _params(output: int) -> SamplingParams:
    return SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)


if __name__ == "__main__":
    main()
