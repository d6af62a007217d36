"""Conversations, agents and a flood on a real model and real servers, in turn, under one client.

    python benchmarks/conversations.py cache [--rounds 3] [--json cache.json]
    python benchmarks/conversations.py peers --vllm-python PATH --llama-server PATH [--workload chat:8,16,1] [--slots 8]
    python benchmarks/conversations.py agents [--load 0.9]
    python benchmarks/conversations.py flood [--times 50]

- cache: FastServe with the prefix cache and without, 16 users with conversations of 8 turns each. TTFT of the turns
  after the first; and whether all answers are the same to the byte.
- peers: FastServe beside vLLM and llama.cpp, whose prefix caches are on. Mean JCT.
- agents: FastServe told of programs, under gittins, and one that is not told, under skip-join-mlfq. Mean completion
  time of programs, at a share of the calls a second that the first answers when all come at once and never think.
- flood: FastServe with several users, and with one more who sends fifty times as much as each of them until they are
  done. P95 JCT of the others. The model leaves one core to this client and the API server.

A call comes when the one before has been answered and thought about, and repeats all that was said, as the client has
it. Servers start before the first run, and all but the one that is measured are stopped (SIGSTOP). Rounds repeat all
runs, with other prompts; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conversation_session import Session, Summary, print_table, tell
from peers.models import WEIGHTS, directory_of, gguf_of
from peers.processes import PeerError
from peers.servers import Server
from prefix_cache import FLOOD, Flooded

from fastserve.bench.serve.prompts import Asking
from fastserve.bench.serve.record import JobRecord
from fastserve.bench.serve.replay import Replayed
from fastserve.bench.serve.results import summarize
from fastserve.types import InvalidRequest
from fastserve.workloads import SimJob, calls_of, parse_load

# By scenario: the workload, calls in a run, and calls a second.
DEFAULTS: dict[str, tuple[str, int, float]] = {
    "cache": ("chat:8,16,6,48,48,768", 128, 8.0),
    "peers": ("chat:8,16,1,48,128,256", 128, 16.0),
    "agents": ("agents:20,0.2,64,32,512,64", 1500, 0.0),
    "flood": ("lognormal:60,1,60,1,256", 160, 0.0),
}
_AT_ONCE = 600  # calls, at most, that tell how many a second a server answers

# --- scenarios --------------------------------------------------------------------------------------------------------


def cache(session: Session, options: argparse.Namespace, number_: int) -> Summary:
    """With the cache and without."""
    with_cache, without = session.running
    jobs = _jobs(options, number_, options.rate)
    on, off = (session.run(each, "conversations", jobs, (number_,)) for each in (with_cache, without))
    pairs = list(zip(on.records, off.records, strict=True))
    return {
        "TTFT of later turns, better": _mean_later(off) / _mean_later(on),
        "mean JCT, better": _mean_jct(off) / _mean_jct(on),
        "answers that differ": sum(one.text != other.text or not one.ok or not other.ok for one, other in pairs),
        "answers": len(pairs),
    }


def peers(session: Session, options: argparse.Namespace, number_: int) -> Summary:
    """FastServe's mean JCT ÷ that of the best peer."""
    jobs = _jobs(options, number_, options.rate)
    means = {
        each.server.name: _mean_jct(session.run(each, "conversations", jobs, (number_,))) for each in session.running
    }
    ours = [each.server.name for each in session.running if each.server.engine == "fastserve"]
    best = min(mean for name, mean in means.items() if name not in ours)
    return {f"mean JCT of {name} ÷ the best peer's": means[name] / best for name in ours}


def agents(session: Session, options: argparse.Namespace, number_: int) -> Summary:
    """Programs' completion times where the server knows of programs, and where it does not."""
    running, per_call = session.running
    if not options.rate:
        few = _jobs(options, 10**6, 1.0, min(options.jobs, _AT_ONCE))
        at_once = [replace(job, arrival=0.0) for job in _thoughtless(few)]
        told = session.run(running, "all at once", at_once, (number_, 10**6))
        done = sorted(record.times[-1] for record in told.records if record.ok)
        middle = done[: max(1, int(0.8 * len(done)))]  # the last agents do not fill a batch
        options.rate = options.load * len(middle) / middle[-1]
        tell(f"{options.rate:.3f} calls a second are a load of {options.load:g}")
    jobs = _jobs(options, number_, options.rate)
    told, untold = (
        _programs(session.run(each, name, jobs, (number_,), Asking(options.endpoint, program_ids=ids)))
        for each, name, ids in ((running, "programs", True), (per_call, "calls", False))
    )
    return {"mean completion, better": untold["mean"] / told["mean"], "P95, better": untold["p95"] / told["p95"]}


def flood(session: Session, options: argparse.Namespace, number_: int) -> Summary:
    """The others' P95 with the flood ÷ without it."""
    (running,) = session.running
    calm, stormy = (Flooded(options.users, times, options.workload) for times in (0.0, options.times))
    if not options.rate:
        at_once = [replace(job, arrival=0.0) for job in calm.jobs(10**6, options.jobs, 1.0)]
        told = session.run(running, "all at once", at_once, (number_, 10**6))
        options.rate = options.flood_load * len(told.records) / told.seconds
        tell(f"{options.rate:.3f} jobs a second of the others are a load of {options.flood_load:g}")

    def enough(records: Sequence[JobRecord]) -> bool:
        return all(record.user == FLOOD or record.end is not None for record in records)

    quiet, loud = (
        session.run(running, name, list(load.jobs(number_, options.jobs, options.rate)), (number_, own), enough=enough)
        for own, (name, load) in enumerate((("calm", calm), ("flooded", stormy)))
    )
    before, after = (summarize(each)["users"] for each in (quiet, loud))
    ratios = [after[user]["p95"] / before[user]["p95"] for user in before]
    everybody = [_p95([r for r in each.records if r.user != FLOOD and r.ok]) for each in (quiet, loud)]
    ratio, answered = everybody[1] / everybody[0], sum(r.user == FLOOD and r.ok for r in loud.records)
    tell(f"P95 of all others {everybody[0]:.3f} s, beside the flood {everybody[1]:.3f} s: {ratio:.3f} ×")
    tell(f"of the flood's {sum(r.user == FLOOD for r in loud.records)} jobs {answered} were answered meanwhile")
    return {"worst user's P95, times": max(ratios), "P95 of all others, times": ratio}


SCENARIOS = {"cache": cache, "peers": peers, "agents": agents, "flood": flood}


def _jobs(options: argparse.Namespace, seed: int, rate: float, count: int | None = None) -> list[SimJob]:
    return list(parse_load(options.workload, "poisson").jobs(seed, count or options.jobs, rate))


def _thoughtless(jobs: Sequence[SimJob]) -> list[SimJob]:
    """The same programs, and nobody thinks."""
    told = []
    for job in jobs:
        following: SimJob | None = None
        for call in reversed(list(calls_of(job))):
            following = replace(call, then=following, think_time=0.0)
        assert following is not None
        told.append(following)
    return told


def _mean_jct(run: Replayed) -> float:
    return float(summarize(run)["latency"]["jct"]["mean"])


def _mean_later(run: Replayed) -> float:
    return float(summarize(run)["later"]["ttft"]["mean"])


def _programs(run: Replayed) -> dict[str, float]:
    found: dict[str, float] | None = summarize(run)["programs"]
    if found is None:
        raise PeerError("no program was answered to its end")
    return found


def _p95(records: Sequence[JobRecord]) -> float:
    ordered = sorted(record.jct for record in records)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


# --- servers and options ----------------------------------------------------------------------------------------------


def servers(options: argparse.Namespace) -> list[Server]:
    """Those of the scenario, FastServe first. Models are made where they are missing."""
    options.work.mkdir(parents=True, exist_ok=True)
    directory = directory_of(options.model, options.work)

    def server(name: str, engine: str, weights: Any, program: str, *more: str) -> Server:
        as_directory = engine != "llama-server" and weights == "bfloat16"
        model = directory if as_directory else gguf_of(directory, weights, options.work)
        sizes = (options.slots, options.context, options.threads)
        return Server(name, engine, weights, program, str(model), *sizes, more, caching=True)

    ours = [
        server(f"FastServe {weights}", "fastserve", weights, sys.executable, "--policy", options.policy,
               *options.serve_options)
        for weights in options.weights
    ]  # fmt: skip
    if options.scenario == "agents":
        (told,) = ours
        untold = (*("--policy", options.calls_policy), *options.serve_options)
        return [told, replace(told, name=f"{told.name}, {options.calls_policy}", options=untold)]
    if options.scenario == "cache":
        (with_cache,) = ours
        bare = (*with_cache.options, "--no-enable-prefix-caching")
        return [with_cache, replace(with_cache, name=f"{with_cache.name}, no cache", options=bare)]
    if options.scenario == "peers":
        if options.vllm_python is not None:
            ours.append(server("vLLM bfloat16", "vllm", "bfloat16", options.vllm_python))
        if options.llama_server is not None:
            ours += [
                server(f"llama-server {weights}", "llama-server", weights, options.llama_server)
                for weights in options.llama_weights
            ]
    return ours


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked; ends with status 2 and one line where they are not right."""
    parser = argparse.ArgumentParser(description="Conversations, agents and a flood on real servers.")
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--model", default="smollm2", help="smollm2, or a Hugging Face directory")
    parser.add_argument("--workload", help="chat:…, agents:… or lengths, as `fastserve simulate` has them")
    parser.add_argument("--jobs", type=int, help="calls in a run; of flood, the other users'")
    parser.add_argument("--rate", type=float, help="calls a second; 0: measure a capacity first")
    parser.add_argument("--load", type=float, default=0.9, help="of agents: share of the capacity (default: 0.9)")
    parser.add_argument("--flood-load", type=float, default=0.5, help="of the other users together (default: 0.5)")
    parser.add_argument("--users", type=int, default=4, help="of flood: other users (default: 4)")
    parser.add_argument("--times", type=float, default=50.0, help="what one other sends, the flood sends (default: 50)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    parser.add_argument("--slots", type=int, help="jobs in a batch (default: 8; of agents, 2)")
    parser.add_argument("--context", type=int, default=4096, help="tokens of the longest job (default: 4096)")
    parser.add_argument("--threads", type=int, help="of each server (default: all cores; of flood, all but one)")
    parser.add_argument("--policy", help="FastServe's (default: skip-join-mlfq; of agents, gittins)")
    parser.add_argument("--calls-policy", default="skip-join-mlfq", help="of agents: where nothing is told of programs")
    parser.add_argument("--weights", type=_weights, default=["bfloat16"], help="FastServe's; of peers, several")
    parser.add_argument("--llama-weights", type=_weights, default=["q8_0"])
    parser.add_argument("--serve-options", type=str.split, default=[], help="more options of `fastserve serve`")
    parser.add_argument("--vllm-python", metavar="PATH", help="a Python that has vLLM")
    parser.add_argument("--llama-server", metavar="PATH")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/fastserve/peers", help="models and logs")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args(arguments)
    workload, jobs, rate = DEFAULTS[options.scenario]
    options.workload = options.workload or workload
    options.jobs = options.jobs or jobs
    options.slots = options.slots or (2 if options.scenario == "agents" else 8)
    cores = len(os.sched_getaffinity(0))
    # Thousands of requests are work for the client and the API server, too, which would slow the model down by itself.
    options.threads = options.threads or (max(1, cores - 1) if options.scenario == "flood" else cores)
    options.policy = options.policy or ("gittins" if options.scenario == "agents" else "skip-join-mlfq")
    options.rate = rate if options.rate is None else options.rate
    if options.scenario != "peers" and len(options.weights) != 1:
        parser.error("--weights: several go with peers")
    for name in ("vllm_python", "llama_server"):
        given = getattr(options, name)
        if given is not None and shutil.which(given) is None:
            parser.error(f"--{name.replace('_', '-')}: there is no program '{given}'")
    if options.scenario == "peers" and options.vllm_python is None and options.llama_server is None:
        parser.error("--vllm-python, --llama-server: name a peer")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder '{options.json.parent}'")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended
    session: Session | None = None
    ratios: list[Summary] = []
    try:
        session = Session(servers(options), options.endpoint, options.work)
        for number_ in range(options.rounds):
            ratios.append(SCENARIOS[options.scenario](session, options, number_))
            tell(json.dumps(ratios[-1]))
            if options.json is not None:
                told = {k: str(v) for k, v in vars(options).items() if "/" not in str(v)}  # no paths of this machine
                result = {"benchmark": "conversations", "options": told, "ratios": ratios, "runs": session.runs}
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except (InvalidRequest, PeerError) as error:
        print(f"conversations: {error}", file=sys.stderr)
        return 1
    finally:
        if session is not None:
            session.close()
            print_table(session.runs, ratios)
    return 0


def _weights(text: str) -> list[Any]:
    names = [name for name in text.split(",") if name]
    if wrong := [name for name in names if name not in WEIGHTS]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(WEIGHTS)}, got '{wrong[0]}'")
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(main())
