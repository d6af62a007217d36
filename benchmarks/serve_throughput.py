"""What serving takes of the throughput that LLM.generate has: the same jobs offline and streamed by a server, in turn.

    python benchmarks/serve_throughput.py --runs 5

As many jobs as the batch has rows, all sent at once, so that both run the same iterations. The server's clients are on
the same cores, and what they take counts as the server's: `clients` tells how much of one core that is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from served import Server

from fastserve import LLM, SamplingParams
from fastserve.bench.serve.experiment import Experiment, Watcher
from fastserve.bench.serve.plan import Plan


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quantization", default="auto", choices=["auto", "int8", "none"])
    parser.add_argument("--batch", type=int, default=32, help="jobs, and rows of the batch (default: 32)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (default: 64)")
    parser.add_argument("--tokens", type=int, default=256, help="of each answer (default: 256)")
    parser.add_argument("--runs", type=int, default=5, help="of both (default: 5)")
    parser.add_argument("--json", type=Path, help="write every run's figures to this file")
    parser.add_argument("--offline", action="store_true", help=argparse.SUPPRESS)  # the process that generates
    options = parser.parse_args()
    if min(options.batch, options.prompt, options.tokens, options.runs) < 1:
        parser.error("--batch, --prompt, --tokens and --runs take numbers from 1 on")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    if options.offline:
        print(json.dumps(_generate(options)))
        return
    runs = []
    for run in range(options.runs):
        print(f"run {run + 1} of {options.runs}", file=sys.stderr)
        command = [sys.executable, *sys.argv, "--offline"]
        offline = float(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        streamed, client = asyncio.run(_serve(options))
        runs.append({"generate": offline, "streamed": streamed, "lost": 1 - streamed / offline, "clients": client})
    for name, label, unit in (
        ("generate", "LLM.generate, tokens/s", 1),
        ("streamed", "streamed by the server, tokens/s", 1),
        ("lost", "lost, %", 100),
        ("clients", "clients, % of a core", 100),
    ):
        values = [unit * each[name] for each in runs]
        print(f"{label:34} {median(values):8.1f}   {min(values):.1f} to {max(values):.1f}")
    if options.json is not None:
        options.json.write_text(json.dumps(runs, indent=1) + "\n")


def _generate(options: argparse.Namespace) -> float:
    """Tokens a second, the prefill included."""
    rng = random.Random(0)
    prompts = [[rng.randrange(300, 48000) for _ in range(options.prompt)] for _ in range(options.batch)]
    params = SamplingParams(max_tokens=options.tokens, ignore_eos=True, temperature=0)
    with LLM(options.model, quantization=options.quantization, max_num_seqs=options.batch) as llm:
        llm.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True))
        begin = time.perf_counter()
        llm.generate(prompts, params)
        return float(options.batch * options.tokens / (time.perf_counter() - begin))


async def _serve(options: argparse.Namespace) -> tuple[float, float]:
    """Tokens a second, and processor seconds a second of the clients."""
    sizes = ["--max-num-seqs", str(options.batch), "--quantization", options.quantization]
    workload = f"constant:{options.prompt},{options.tokens}"
    async with Server(["--model", options.model, *sizes]) as server:
        plan = Plan(workload=workload, num_jobs=options.batch, arrival="all-at-once")
        experiment = Experiment([("server", f"http://{server.host}:{server.port}")], plan)
        (run,) = await experiment.run(Watcher())
    summary: dict[str, Any] = run.summary
    if summary["failed"]:
        raise SystemExit(f"{summary['failed']} jobs failed")
    return summary["achieved"]["output_tokens_per_second"], summary["client"]["cores"]


if __name__ == "__main__":
    main()
