"""What the prefix cache, programs and tenants are worth in virtual time: the real engine on a modelled device.

    python benchmarks/prefix_cache.py [trace] [agents] [flood] [--jobs 4000] [--seeds 3] [--json prefix_cache.json]

- trace: conversations written as a trace of Mooncake's and read back. How much of its prompts is found, beside what a
  cache would find that forgets nothing; and mean JCT under skip-join-mlfq, which goes by what a job must compute,
  beside one that goes by its whole prompt (and the cache works all the same), and one that only joins by it.
- agents: chains of two to twenty calls at load 0.9, where the engine knows which calls are of one program, beside one
  where each call is a job like any other. Mean completion time of programs.
- flood: several users, one of whom sends fifty times as much as each of the others. The others' P95 JCT beside that
  which they have without him, where memory is ample and, with --flood-kv-blocks 2000, where the flood would take all.

Ratios are medians over seeds, each of two runs with the same jobs.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console

from fastserve.bench.experiment import Experiment
from fastserve.bench.simulation import Point, RunSummary, Setting, capacity, run
from fastserve.bench.tables import new_table, number
from fastserve.config import SchedulerConfig
from fastserve.cost import Cost, quantum_of, shared_seconds
from fastserve.policies import POLICIES, Policy
from fastserve.policies.mlfq import MultiLevelFeedbackQueue
from fastserve.programs import Programs
from fastserve.types import Job
from fastserve.workloads import Recorded, SimJob, Synthetic, parse_load

FULL_PREFILL = "skip-join-mlfq, full prefill"
JOINS_BY_FULL_PREFILL = "skip-join-mlfq, joins by full prefill"
NORMAL = "user-"
FLOOD = "flood"


class FullPrefillQueue(MultiLevelFeedbackQueue):
    """Skip-join that sees the whole prompt of a job, whatever of it the cache holds.

    A job joins by it, and, where `charges` says so, is charged for it too, as it is where there is no cache.
    """

    def __init__(self, cost: Cost, charges: bool, **options: Any) -> None:
        super().__init__(**options)
        self._cost = cost
        self._uncharged: dict[Job, None] | None = {} if charges else None

    def add(self, job: Job, now: float) -> None:
        uncached, cached = job.next_seconds, job.cached
        job.next_seconds, job.cached = self._cost.prefill_charge(0, len(job.prompt)), 0
        super().add(job, now)
        job.next_seconds, job.cached = uncached, cached
        if self._uncharged is not None:
            self._uncharged[job] = None

    def on_service(self, job: Job, seconds: float, now: float) -> None:
        if self._uncharged is not None and job in self._uncharged:
            del self._uncharged[job]
            seconds += self._cost.prefill_charge(0, job.cached) if job.cached else 0.0
        super().on_service(job, seconds, now)

    def remove(self, job: Job) -> None:
        if self._uncharged is not None:
            self._uncharged.pop(job, None)
        super().remove(job)

    def refresh(self, job: Job, now: float) -> None:
        """It joined by its whole prompt, and stays."""


def _full_prefill(
    config: SchedulerConfig, cost: Cost, programs: Programs, *, charges: bool = True
) -> Callable[[], Policy]:
    return lambda: FullPrefillQueue(
        cost,
        charges,
        quantum=quantum_of(cost, config.max_num_seqs),
        shared=shared_seconds(cost, config.max_num_seqs),
        num_levels=config.num_levels,
        starvation_limit=config.starvation_limit,
        slowdown_limit=config.slowdown_limit,
        skip_join=True,
    )


@contextlib.contextmanager
def full_prefill_known() -> Iterator[None]:
    """For a while, and in this process, these policies have names."""
    POLICIES[FULL_PREFILL] = _full_prefill
    POLICIES[JOINS_BY_FULL_PREFILL] = partial(_full_prefill, charges=False)
    try:
        yield
    finally:
        del POLICIES[FULL_PREFILL], POLICIES[JOINS_BY_FULL_PREFILL]


@dataclass(frozen=True)
class Flooded:
    """Jobs of several users at equal rates, and those of one more who sends `times` as many, until the others are done.

    `rate` is that of the others together, so that they send the same jobs at the same times with the flood and without.
    """

    others: int
    times: float
    lengths: str

    @property
    def name(self) -> str:
        return f"{self.lengths}, {self.others} users" + (f" and one × {self.times:g}" if self.times else "")

    @property
    def longest(self) -> int:
        return self._load.longest

    def jobs(self, seed: int, count: int, rate: float) -> Iterator[SimJob]:
        """`count` of the others' jobs."""
        jobs = list(self._load.jobs(seed, count, rate))
        normal = (replace(job, user=f"{NORMAL}{number % self.others}") for number, job in enumerate(jobs))
        if not self.times:
            return normal
        flood = self._load.jobs(seed + 2**32, 10**9, rate * self.times / self.others)
        until = jobs[-1].arrival
        flooding = (replace(job, user=FLOOD) for job in _before(flood, until))
        return heapq.merge(normal, flooding, key=lambda job: job.arrival)

    @property
    def _load(self) -> Synthetic:
        load = parse_load(self.lengths, "poisson")
        assert isinstance(load, Synthetic)
        return load


def _before(jobs: Iterator[SimJob], until: float) -> Iterator[SimJob]:
    for job in jobs:
        if job.arrival > until:
            return
        yield job


def trace(options: argparse.Namespace, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """One Mooncake trace, read back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mooncake.jsonl"
        source = _experiment(options, workload=options.trace_workload, seeds=(seed,), loads=(options.load,))
        source.write_trace(source.setting(), path)
        setting = replace(_experiment(options, trace=path).setting(), warmup_jobs=0)
        setting = replace(setting, workload=Recorded(path), jobs=options.jobs)
        rate = options.load * capacity(setting, seed)
        with full_prefill_known():
            runs = {
                name: _run(setting, policy, seed, rate, tell, enable_prefix_caching=cached)
                for name, policy, cached in (
                    ("by what it must compute", "skip-join-mlfq", True),
                    ("by its whole prompt", FULL_PREFILL, True),
                    ("joins by its whole prompt", JOINS_BY_FULL_PREFILL, True),
                    ("no cache", "skip-join-mlfq", False),
                )
            }
    ours, full = runs["by what it must compute"], runs["by its whole prompt"]
    assert ours.hit_rate is not None and ours.hit_rate_bound is not None
    return {
        "runs": {name: each.as_dict() for name, each in runs.items()},
        "found_of_bound": ours.hit_rate / ours.hit_rate_bound,
        "better_than_full_prefill": full.mean_jct / ours.mean_jct,
        "better_than_joining_by_full_prefill": runs["joins by its whole prompt"].mean_jct / ours.mean_jct,
        "better_than_no_cache": runs["no cache"].mean_jct / ours.mean_jct,
    }


def agents(options: argparse.Namespace, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Agents at a load, with program ids and without."""
    experiment = _experiment(options, workload=options.agents_workload, arrivals=options.agents_arrivals)
    setting = experiment.setting()
    setting = replace(setting, config=replace(setting.config, max_num_seqs=options.agents_slots))
    rate = options.load * capacity(setting, seed)
    runs: dict[str, RunSummary] = {}
    for policy in options.policy:
        for ids in (True, False):
            own = replace(setting, program_ids=ids)
            runs[f"{policy}, {'programs' if ids else 'calls'}"] = _run(own, policy, seed, rate, tell)
    per_call = _completion(runs[f"{options.policy[0]}, calls"])
    return {"runs": {name: each.as_dict() for name, each in runs.items()}} | {
        f"better_than_calls: {policy}": per_call / _completion(runs[f"{policy}, programs"]) for policy in options.policy
    }


def flood(options: argparse.Namespace, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """The others' P95 with the flood ÷ without it, by policy."""
    blocks = options.flood_kv_blocks or options.kv_blocks
    setting = _experiment(options, kv_blocks=blocks, workload=options.flood_workload).setting()
    calm = replace(setting, workload=Flooded(options.users, 0, options.flood_workload))
    stormy = replace(setting, workload=Flooded(options.users, options.times, options.flood_workload))
    rate = options.flood_load * capacity(calm, seed)
    told: dict[str, Any] = {"runs": {}}
    for policy in options.policy:
        quiet, loud = (_run(each, policy, seed, rate, tell) for each in (calm, stormy))
        told["runs"] |= {f"{policy}, calm": quiet.as_dict(), f"{policy}, flooded": loud.as_dict()}
        after = loud.users or {}
        ratios = [after[user]["p95_jct"] / own["p95_jct"] for user, own in (quiet.users or {}).items()]
        told[f"p95_ratio, mean of the others: {policy}"] = sum(ratios) / len(ratios)
        told[f"p95_ratio, worst of them: {policy}"] = max(ratios)
    return told


SCENARIOS = {"trace": trace, "agents": agents, "flood": flood}


def _experiment(options: argparse.Namespace, kv_blocks: int | None = None, **more: Any) -> Experiment:
    scheduler = {"max_num_seqs": options.max_num_seqs}
    return Experiment(
        jobs=options.jobs,
        model=options.model,
        hardware=options.hardware,
        kv_blocks=kv_blocks if kv_blocks is not None else options.kv_blocks,
        scheduler=scheduler,
        **more,
    )


def _run(
    setting: Setting, policy: str, seed: int, rate: float, tell: Callable[[str], None], **config: Any
) -> RunSummary:
    setting = replace(setting, config=replace(setting.config, **config))
    summary = run(setting, Point(policy, rate, seed))
    text = f"{setting.workload.name}, seed {seed}, {policy}: mean JCT {number(summary.mean_jct)} s"
    if summary.mean_program_completion is not None:
        text += f", programs {number(summary.mean_program_completion)} s"
    if summary.hit_rate is not None and summary.hit_rate_bound is not None:
        text += f", cached {100 * summary.hit_rate:.1f} of {100 * summary.hit_rate_bound:.1f} %"
    tell(text)
    return summary


def _completion(summary: RunSummary) -> float:
    assert summary.mean_program_completion is not None
    return summary.mean_program_completion


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description="Prefix cache, programs and tenants in virtual time.")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)} (default: all)")
    parser.add_argument("--jobs", type=int, default=4000, help="calls in a run (default: 4000)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of everything (default: 3)")
    parser.add_argument("--load", type=float, default=0.9, help="of trace and agents (default: 0.9)")
    parser.add_argument("--policy", action="append", help="of agents and flood; repeatable, the baseline first")
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--hardware", default="a100-80g")
    parser.add_argument("--kv-blocks", type=int, help="(default: what the weights leave)")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--trace-workload", default="chat:6,64,20,512,256,2048")
    parser.add_argument("--agents-workload", default="agents:20,0.5")
    parser.add_argument("--agents-arrivals", default="poisson", help="of programs (default: poisson)")
    parser.add_argument("--agents-slots", type=int, default=2, help="max_num_seqs of agents (default: 2)")
    parser.add_argument("--flood-workload", default="sharegpt")
    parser.add_argument("--flood-kv-blocks", type=int, help="of flood (default: those of the others)")
    parser.add_argument("--flood-load", type=float, default=0.6, help="of the other users together (default: 0.6)")
    parser.add_argument("--users", type=int, default=4, help="other users (default: 4)")
    parser.add_argument("--times", type=float, default=50.0, help="what one other sends, the flood sends (default: 50)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args(arguments)
    options.scenarios = options.scenarios or list(SCENARIOS)
    options.policy = options.policy or ["skip-join-mlfq", "gittins"]
    if wrong := [name for name in options.scenarios if name not in SCENARIOS]:
        parser.error(f"there is no scenario '{wrong[0]}': {', '.join(SCENARIOS)}")
    if wrong := [name for name in options.policy if name not in POLICIES]:
        parser.error(f"--policy: must be one of {', '.join(POLICIES)}, got '{wrong[0]}'")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    options, console = parse(arguments), Console(highlight=False, width=140)
    told: dict[str, Any] = {"benchmark": "prefix_cache", "options": {k: str(v) for k, v in vars(options).items()}}
    for name in options.scenarios:
        scenario = SCENARIOS[name]
        seeds = [
            scenario(options, seed, lambda text: print(text, file=sys.stderr, flush=True))
            for seed in range(options.seeds)
        ]
        told[name] = seeds
        console.print(_table(name, seeds))
        for key in [key for key in seeds[0] if key != "runs"]:
            values = [seed[key] for seed in seeds]
            console.print(f"{key}: {median(values):.3f} ({min(values):.3f} – {max(values):.3f})")
        if options.json:
            options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0


def _table(name: str, seeds: Sequence[dict[str, Any]]) -> Any:
    """The figures of a scenario, medians over seeds."""
    table = new_table()
    table.title, table.title_justify, table.title_style = name, "left", "bold"
    for heading in ("", "mean JCT (s)", "P95 (s)", "TTFT (s)", "program (s)", "cached (%)", "others' P95 (s)"):
        table.add_column(heading, justify="right" if heading else "left")
    for run_name in seeds[0]["runs"]:
        runs = [seed["runs"][run_name] for seed in seeds]

        def of(key: str, runs: list[dict[str, Any]] = runs, scale: float = 1.0) -> str:
            values = [each[key] for each in runs]
            return "–" if None in values else number(scale * median(values))

        others = [
            mean(own["p95_jct"] for user, own in each["users"].items() if user.startswith(NORMAL))
            for each in runs
            if each["users"]
        ]
        table.add_row(
            run_name, of("mean_jct"), of("p95_jct"), of("mean_ttft"), of("mean_program_completion"),
            of("hit_rate", scale=100.0), number(median(others)) if others else "–",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
