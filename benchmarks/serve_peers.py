"""FastServe's server beside vLLM's and llama.cpp's under one load, or its own policies beside each other.

    python benchmarks/serve_peers.py --trace sharegpt-like-300.json [--vllm-python PATH] [--llama-server PATH]
    python benchmarks/serve_peers.py --trace sharegpt-like-300.json --policies [fcfs skip-join-mlfq …] --slots 8

First every job is sent at once, to each server in turn (with --policies, under the first alone): what the best peer or
that policy then answers a second is the capacity that --rates are fractions of. Then every server gets the trace at
each of them.
Servers start before that, as their users start them, and all but the one that is measured are stopped (SIGSTOP).
Rounds repeat it all; medians are told, and of ratios the median over rounds. What was measured is written after every
run (--json), so that an end before the end loses nothing.

bfloat16 is compared with both, q8_0 and q4_0 with llama.cpp (the same file).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from peers.models import WEIGHTS, directory_of, gguf_of
from peers.processes import PeerError
from peers.servers import Running, Server
from peers.serving_report import markdown

from fastserve.bench.serve.experiment import Experiment, Watcher
from fastserve.bench.serve.plan import Plan
from fastserve.bench.serve.results import ServeRun
from fastserve.types import InvalidRequest

# With --policies: names, and the options of `fastserve serve`.
POLICIES = {
    "fcfs": ("--policy", "fcfs"),
    "skip-join-mlfq": ("--policy", "skip-join-mlfq"),
    "skip-join-mlfq, slowdown ≤ 10": ("--policy", "skip-join-mlfq", "--slowdown-limit", "10"),
    "mlfq": ("--policy", "mlfq"),
    "gittins": ("--policy", "gittins"),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked; ends with status 2 and one line where they are not right."""
    parser = argparse.ArgumentParser(description="OpenAI-compatible servers under one load, in turn.")
    parser.add_argument("--model", default="smollm2", help="smollm2, or a Hugging Face directory")
    parser.add_argument("--trace", type=Path, help="as `fastserve bench serve` reads them")
    parser.add_argument("--num-jobs", type=int, help="(default: the whole trace)")
    parser.add_argument(
        "--rated-jobs", type=int, help="of the trace's first jobs, at the rates (default: as all at once)"
    )
    parser.add_argument("--rates", type=_fractions, default=[0.5, 0.9, 1.5], help="of the capacity")
    parser.add_argument("--capacity", type=float, help="jobs a second, known already: none is sent at once")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--slots", type=int, default=32, help="jobs in a batch")
    parser.add_argument("--context", type=int, default=1088, help="tokens of the longest job")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--weights", type=_weights, default=["bfloat16", "q8_0", "q4_0"], help="sent all at once")
    parser.add_argument("--rated", type=_weights, default=["bfloat16"], help="FastServe's at the rates")
    parser.add_argument("--rated-llama", type=_weights, default=["q8_0"], help="llama.cpp's at the rates; '': none")
    parser.add_argument(
        "--policies",
        nargs="*",
        choices=POLICIES,
        metavar="NAME",
        help="FastServe's policies beside each other, no peers; the first tells the capacity (default: all)",
    )
    parser.add_argument("--vllm-python", metavar="PATH", help="a Python that has vLLM")
    parser.add_argument("--llama-server", metavar="PATH")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/fastserve/peers", help="models and logs")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--table", type=Path, help="print the tables of a file that --json wrote, and run nothing")
    options = parser.parse_args(arguments)
    for name in ("vllm_python", "llama_server"):
        given = getattr(options, name)
        if given is not None and shutil.which(given) is None:
            parser.error(f"--{name.replace('_', '-')}: there is no program '{given}'")
    if options.table is not None and not options.table.is_file():
        parser.error(f"--table: there is no file '{options.table}'")
    if options.table is None and options.trace is None:
        parser.error("--trace: name a trace")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder '{options.json.parent}'")
    return options


def contestants(options: argparse.Namespace) -> list[Server]:
    """FastServe first. Models are made where they are missing."""
    options.work.mkdir(parents=True, exist_ok=True)
    directory = directory_of(options.model, options.work)
    sizes = (options.slots, options.context, options.threads)

    def server(name: str, engine: str, weights: Any, program: str, *more: str) -> Server:
        as_directory = engine != "llama-server" and weights == "bfloat16"
        model = directory if as_directory else gguf_of(directory, weights, options.work)
        return Server(name, engine, weights, program, str(model), *sizes, more)

    if options.policies is not None:
        names = options.policies or POLICIES
        return [server(name, "fastserve", "bfloat16", sys.executable, *POLICIES[name]) for name in names]
    servers = [server(f"FastServe {weights}", "fastserve", weights, sys.executable) for weights in options.weights]
    if options.vllm_python is not None:
        servers.append(server("vLLM bfloat16", "vllm", "bfloat16", options.vllm_python))
    if options.llama_server is not None:
        servers += [
            server(f"llama-server {weights}", "llama-server", weights, options.llama_server)
            for weights in dict.fromkeys([*options.rated_llama, *options.weights])
            if weights != "bfloat16" or weights in options.rated_llama
        ]
    return servers


@dataclass
class Comparison:
    """What has been measured so far."""

    options: argparse.Namespace
    running: list[Running]
    runs: list[tuple[float | None, ServeRun]] = field(
        default_factory=list
    )  # the fraction of the capacity; None: at once
    capacity: float | None = None

    def measure(self) -> None:
        """Everything there is to measure, in turn."""
        self.capacity = self.options.capacity
        for number in range(self.options.rounds):
            if self.options.capacity is None:
                for each in self.running[: None if self.options.policies is None else 1]:
                    self._run(each, number, None)
            if self.capacity is None:
                self.capacity = self._best()
                _tell(f"capacity: {self.capacity:.3f} jobs a second")
            for fraction in self.options.rates:
                for each in self.running:
                    if self._takes_rates(each.server):
                        self._run(each, number, fraction)

    def _run(self, running: Running, number: int, fraction: float | None) -> None:
        options, rate = self.options, None
        if fraction is not None:
            assert self.capacity is not None
            rate = fraction * self.capacity
        arrival = "all-at-once" if rate is None else None
        level = 0 if fraction is None else 1 + options.rates.index(fraction)
        seed = number * (1 + len(options.rates)) + level  # no prompt comes twice: prefix caches help nobody
        num_jobs = options.num_jobs if rate is None or options.rated_jobs is None else options.rated_jobs
        plan = Plan(options.trace, None, num_jobs, arrival, None, seed)
        experiment = Experiment([(running.server.name, running.url)], plan, rates=() if rate is None else (rate,))
        with running.awake():
            (run,) = asyncio.run(experiment.run(Watcher()))
        if run.summary["interrupted"]:
            raise KeyboardInterrupt
        run = replace(run, round=number)
        self.runs.append((fraction, run))
        latency, short = run.summary["latency"], run.summary["short"]
        _tell(
            f"{running.server.name}, {'at once' if fraction is None else f'{fraction:g} × capacity'}: "
            f"{run.summary['achieved']['jobs_per_second']:.3f} jobs/s, JCT mean {latency['jct']['mean']:.2f}, "
            f"P95 {latency['jct']['p95']:.2f}, short {short['jct']['mean'] if short['jct'] else 0:.2f}; TTFT "
            f"{latency['ttft']['mean']:.3f}; failed {run.summary['failed']}"
        )
        if options.json is not None:
            options.json.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")

    def _best(self) -> float:
        """Jobs a second that the best peer answers when all are sent at once."""
        names = self._peers() or [self.running[0].server.name]
        return max(
            float(median(run.summary["achieved"]["jobs_per_second"] for _, run in self.runs if run.target.name == name))
            for name in names
        )

    def _peers(self) -> list[str]:
        return [each.server.name for each in self.running if each.server.engine != "fastserve"]

    def _takes_rates(self, server: Server) -> bool:
        if server.engine == "fastserve":
            return self.options.policies is not None or server.weights in self.options.rated
        return server.engine == "vllm" or server.weights in self.options.rated_llama

    def as_dict(self) -> dict[str, Any]:
        return {
            "benchmark": "serve_peers",
            "model": self.options.model,
            "trace": self.options.trace.name,
            "slots": self.options.slots,
            "threads": self.options.threads,
            "rounds": self.options.rounds,
            "capacity": self.capacity,
            "peers": self._peers(),
            "servers": [
                {"name": each.server.name, "start_seconds": each.start_seconds, "options": each.server.options}
                for each in self.running
            ],
            "runs": [
                {
                    "fraction": fraction,
                    "rate": run.rate,
                    "round": run.round,
                    "server": run.target.name,
                    "summary": run.summary,
                    "jobs": [[job.prompt_tokens, job.tokens, job.jct, job.ttft] for job in run.records if job.ok],
                }
                for fraction, run in self.runs
            ],
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    options = parse(arguments)
    if options.table is not None:
        print(markdown(json.loads(options.table.read_text(encoding="utf-8"))), end="")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended
    running: list[Running] = []
    try:
        for server in contestants(options):
            _tell(f"starting {server.name}")
            try:
                running.append(Running(server, options.work / f"{server.engine}-{server.name.replace(' ', '-')}.log"))
            except PeerError as error:
                if server.engine == "fastserve":
                    raise
                _tell(f"{server.name} is left out: {error}")
        comparison = Comparison(options, running)
        try:
            comparison.measure()
        finally:
            if comparison.runs:
                print(markdown(comparison.as_dict()), end="")
    except (InvalidRequest, PeerError) as error:
        print(f"serve_peers: {error}", file=sys.stderr)
        return 1
    finally:
        for each in running:
            each.close()
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _weights(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if wrong := [name for name in names if name not in WEIGHTS]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(WEIGHTS)}, got '{wrong[0]}'")
    return list(dict.fromkeys(names))


def _fractions(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part]
    except ValueError:
        found = [-1.0]
    if any(not 0 < each < 100 for each in found):
        raise argparse.ArgumentTypeError(f"must be numbers above 0, got '{text}'")
    return found


if __name__ == "__main__":
    sys.exit(main())
