"""FastServe beside whichever of vLLM, transformers, CTranslate2 and llama.cpp is there: one model, one run, one table.

    python benchmarks/compare_peers.py [--model llama-1b] [--weights bfloat16,q8_0,q4_0]
        [--vllm-python PATH] [--llama-bench PATH] [--json peers.json]

Prefill is one prompt and its first token. A decode rate is that of a batch after its first tokens: the time of prompts
and N + 1 tokens each less that of other prompts and one. Every engine sits in a process of its own, and all but the one
that is measured are stopped (SIGSTOP): none of them spins or computes beside it. All engines have their turn at a
measure before the next one, and after the last the next round begins; medians are told, and of ratios the median over
rounds. Prompts are the same random tokens for all but llama-bench, which draws its own and samples nothing.

bfloat16 weights are compared with every engine, q8_0 with llama.cpp (the same file) and CTranslate2's int8, q4_0 with
llama.cpp (the same file). An engine that fails is named with its last line and left out. Exits with 1 when FastServe
itself fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peers.models import NAMED, WEIGHTS, Weights, directory_of, gguf_of
from peers.processes import Candidate, Measure, Peer, PeerError, start
from peers.report import NAMES, OURS, markdown

from fastserve.loaders import ModelError

# The weights an engine takes part with, and what it reads.
GROUPS: dict[str, tuple[str, ...]] = {
    "fastserve": WEIGHTS,
    "vllm": ("bfloat16",),
    "transformers": ("bfloat16",),
    "ctranslate2": ("bfloat16", "q8_0"),
    "llama-bench": WEIGHTS,
    "llama-server": WEIGHTS,
}
PYTHONS = ("vllm", "transformers", "ctranslate2")
BINARIES = ("llama-bench", "llama-server")
Start = Callable[[Candidate, Path], Peer]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked; ends with status 2 and one line where they are not right."""
    parser = argparse.ArgumentParser(description="FastServe beside other engines, interleaved, on this machine.")
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(NAMED)} (random weights) or a directory")
    parser.add_argument("--weights", type=_names(WEIGHTS), default=["bfloat16"], help=f"of {', '.join(WEIGHTS)}")
    parser.add_argument("--prefill", type=_counts, default=[512, 2048], help="prompt tokens (default: 512,2048)")
    parser.add_argument("--batch", type=_counts, default=[1, 8, 32], help="jobs that decode (default: 1,8,32)")
    parser.add_argument("--prompt", type=_count, default=96, help="prompt tokens of each of those (default: 96)")
    parser.add_argument("--tokens", type=_count, default=32, help="tokens each decodes (default: 32)")
    parser.add_argument("--rounds", type=_count, default=5, help="(default: 5)")
    parser.add_argument("--threads", type=_count, default=len(os.sched_getaffinity(0)), help="(default: one a core)")
    parser.add_argument("--only", type=_names(NAMES), help=f"of {', '.join(NAMES)}; FastServe always runs")
    for name in PYTHONS:
        parser.add_argument(f"--{name}-python", metavar="PATH", help=f"a Python that has {NAMES[name]}")
    parser.add_argument("--llama-bench", metavar="PATH", help="with llama-batched-bench beside it")
    parser.add_argument("--llama-server", metavar="PATH")
    parser.add_argument(
        "--option", action="append", type=_option, default=[], metavar="ENGINE.NAME=VALUE",
        help="an engine's own option, as its constructor takes it; VALUE is JSON or text; repeatable",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, default=_cache(), help="keeps models and logs (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--table", type=Path, help="print the table of a file that --json wrote, and run nothing")
    options = parser.parse_args(arguments)
    for name in (*(f"{name}_python" for name in PYTHONS), "llama_bench", "llama_server"):
        given = getattr(options, name)
        if given is not None and shutil.which(given) is None:
            parser.error(f"--{name.replace('_', '-')}: there is no program '{given}'")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder '{options.json.parent}'")
    if options.table is not None and not options.table.is_file():
        parser.error(f"--table: there is no file '{options.table}'")
    return options


def programs(options: argparse.Namespace) -> dict[str, str]:
    """The engines that are there, and what starts them. llama-server runs when named, or when llama-bench is not there:
    it is the same engine, measured from outside."""
    found = {OURS: sys.executable}
    for name in PYTHONS:
        named = getattr(options, f"{name}_python")
        # transformers brings no torch of its own
        needed = (name, "torch") if name == "transformers" else (name,)
        if named is not None:
            found[name] = named
        elif all(importlib.util.find_spec(module) for module in needed):
            found[name] = sys.executable
    for name in BINARIES:
        named = getattr(options, name.replace("-", "_"))
        program = shutil.which(named or name)
        if program and (named or name == "llama-bench" or "llama-bench" not in found):
            found[name] = program
    return {name: found[name] for name in found if name == OURS or not options.only or name in options.only}


def measures(options: argparse.Namespace) -> list[Measure]:
    prefills = [Measure(f"prefill {length}", 1, length, 0) for length in options.prefill]
    return prefills + [Measure(f"batch {batch}", batch, options.prompt, options.tokens) for batch in options.batch]


def candidates(options: argparse.Namespace, found: dict[str, str]) -> list[Candidate]:
    """Every engine with every kind of weights it takes; models are made where they are missing."""
    options.work.mkdir(parents=True, exist_ok=True)
    directory = directory_of(options.model, options.work)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    longest = max(max(options.prefill) + 1, options.prompt + options.tokens + 1)
    settings = {
        "threads": options.threads,
        "vocab_size": config["vocab_size"],
        "max_num_seqs": max(options.batch),
        "max_model_len": -(-longest // 256) * 256,
        "work": str(options.work),
        "python": sys.executable,
    }
    made = []
    for weights in options.weights:
        for engine, program in found.items():
            if weights not in GROUPS[engine]:
                continue
            model = directory if _reads_directory(engine, weights) else gguf_of(directory, weights, options.work)
            own = {name: value for owner, name, value in options.option if owner == engine}
            made.append(Candidate(engine, weights, program, str(model), settings, own))
    return made


def compare(
    options: argparse.Namespace, all_candidates: Sequence[Candidate], tell: Callable[[str], None], start: Start = start
) -> dict[str, Any]:
    """Starts every engine, measures them in turn and stops them. The result is ready for JSON."""
    wanted = measures(options)
    running: dict[Candidate, Peer] = {}
    samples: dict[Candidate, dict[str, list[float | None]]] = {}
    failed = []

    def leave_out(candidate: Candidate, error: PeerError) -> None:
        tell(f"{candidate.label} is left out: {error}")
        failed.append({"engine": candidate.engine, "weights": candidate.weights, "reason": str(error)})
        if candidate in running:
            running.pop(candidate).close()

    try:
        load = os.getloadavg()
        for candidate in all_candidates:
            tell(f"starting {candidate.label}")
            try:
                running[candidate] = start(candidate, options.work / f"{candidate.engine}-{candidate.weights}.log")
                samples[candidate] = {measure.name: [] for measure in wanted}
            except PeerError as error:
                leave_out(candidate, error)
        for number in range(options.rounds):
            for index, measure in enumerate(wanted):
                for candidate in list(running):
                    try:
                        speed = running[candidate].sample(measure, seed=1000 * number + 10 * index)
                    except PeerError as error:
                        leave_out(candidate, error)
                        continue
                    samples[candidate][measure.name].append(speed)
                    known = "too noisy to tell" if speed is None else f"{speed:.1f} tokens/s"
                    tell(f"round {number + 1}, {measure.name}, {candidate.label}: {known}")
        return {
            "benchmark": "compare_peers",
            "model": options.model,
            "threads": options.threads,
            "rounds": options.rounds,
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load_average": load,  # before anything was started
            "measures": [vars(measure) for measure in wanted],
            "engines": [
                {
                    "engine": candidate.engine,
                    "weights": candidate.weights,
                    "version": peer.version,
                    "options": dict(candidate.options),
                    "samples": samples[candidate],
                }
                for candidate, peer in running.items()
            ],
            "failed": failed,
        }
    finally:
        for peer in running.values():
            peer.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    options = parse(arguments)
    if options.table:
        print(markdown(json.loads(options.table.read_text(encoding="utf-8"))), end="")
        return 0

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines are ended
    found = programs(options)
    if len(found) == 1:
        tell("no other engine is installed here; name one, for instance with --llama-bench PATH")
    try:
        result = compare(options, candidates(options, found), tell)
    except ModelError as error:
        print(f"compare_peers: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(markdown(result), end="")
    return 1 if any(each["engine"] == OURS for each in result["failed"]) else 0


def _reads_directory(engine: str, weights: Weights) -> bool:
    return engine not in BINARIES and (engine != OURS or weights == "bfloat16")


def _names(allowed: Sequence[str] | dict[str, str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        names = text.split(",")
        if wrong := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(allowed)}, got '{wrong[0]}'")
        return list(dict.fromkeys(names))

    return read


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got '{text}'")
    return int(text)


def _counts(text: str) -> list[int]:
    return list(dict.fromkeys(_count(part) for part in text.split(",")))


def _option(text: str) -> tuple[str, str, Any]:
    name, equals, value = text.partition("=")
    engine, dot, option = name.partition(".")
    if not equals or not dot or engine not in (OURS, *PYTHONS):
        raise argparse.ArgumentTypeError(f"must be ENGINE.NAME=VALUE for one of {OURS}, {', '.join(PYTHONS)}")
    try:
        return engine, option, json.loads(value)
    except ValueError:
        return engine, option, value


def _cache() -> Path:
    root = os.environ.get("FASTSERVE_CACHE")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(root) if root else Path(cache) / "fastserve") / "peers"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
