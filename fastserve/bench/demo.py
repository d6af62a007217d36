"""The demo: one burst trace under several policies, on a real model, side by side: `python -m fastserve.bench.demo`.

Every job is a real prompt through the model's chat template, and every answer real text. The policies get the same
jobs at the same times on the same settings, so all that differs is who goes first. Exits with 1 when a job's tokens
depend on the policy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from ..loaders.spec import ModelError
from ..policies import ONLINE_POLICIES
from ..types import InvalidRequest, JobMetrics
from .plots import plot_runs
from .runs import Iteration, JobRun, PolicyRun, different_jobs, job_spans
from .tables import compare_policies
from .trace import BURSTS, QUESTIONS, STORIES, TraceJob, demo_trace
from .view import TraceView

if TYPE_CHECKING:
    from ..outputs import RequestOutput

DEFAULT_POLICIES = ("fcfs", "skip-join-mlfq")
# Four slots for twenty jobs a burst: scheduling matters where slots are scarce. The KV pool holds every job of the
# trace, so that a preempted job keeps its place.
SETTINGS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 256,
    "max_model_len": 1024,
    "kv_cache_memory": "512M",
}

SAMPLES = (QUESTIONS[0], STORIES[0])  # whose answers are printed
_CONTEXT = 128  # a usual position of a token in the trace
_EQUAL_SPEED = 1.15  # runs whose tokens/s differ by more were disturbed by something


def iteration_seconds(model: str) -> float:
    """What an iteration takes in which all slots decode, by the cost model of this machine."""
    from ..llm import LLM

    with LLM(model, **SETTINGS) as llm:
        return llm.cost.iteration_seconds([(_CONTEXT, 1)] * SETTINGS["max_num_seqs"])


def run_policy(model: str, policy: str, trace: Sequence[TraceJob], seed: int, console: Console) -> PolicyRun:
    """Replay the trace in real time under one policy. Raises InvalidRequest and ModelError as LLM does."""
    from ..llm import LLM

    iterations: list[Iteration] = []
    view = TraceView(console, policy, len(trace))

    def on_iteration(iteration: Iteration) -> None:
        iterations.append(iteration)
        view.iteration(iteration)

    with LLM(model, policy=policy, seed=seed, on_iteration=on_iteration, **SETTINGS) as llm:
        if llm.tokenizer is None:
            raise ModelError(f"{model} has no tokenizer; the demo needs one, and a chat template")
        prompts = [llm.tokenizer.encode_chat(job.messages) for job in trace]
        llm.generate(prompts[0], replace(trace[0].params, max_tokens=8))  # warm up: pages, threads, caches
        iterations.clear()
        titles = {job.name: job.title for job in trace}

        def on_update(output: RequestOutput) -> None:
            if output.finished:
                answer, jct = output.outputs[0], output.metrics.jct or 0.0
                view.finished(jct, titles[output.request_id], answer.text, len(answer.token_ids))

        with view:
            outputs = llm.replay(
                [(job.arrival, prompt, job.params) for job, prompt in zip(trace, prompts, strict=True)],
                on_update,
                request_ids=[job.name for job in trace],
            )
    return _policy_run(policy, trace, outputs, iterations)


def _policy_run(
    policy: str, trace: Sequence[TraceJob], outputs: Sequence[RequestOutput], iterations: Sequence[Iteration]
) -> PolicyRun:
    """The run with every time counted from the trace's start."""
    start = outputs[0].metrics.arrival - trace[0].arrival
    spans = job_spans(iterations, start)
    jobs = [
        JobRun(
            name=asked.name,
            kind=asked.kind,
            prompt=asked.prompt,
            text=output.outputs[0].text,
            token_ids=output.outputs[0].token_ids,
            finish_reason=str(output.outputs[0].finish_reason),
            metrics=_since(start, output.metrics),
            spans=spans[asked.name],
        )
        for asked, output in zip(trace, outputs, strict=True)
    ]
    makespan = max(job.metrics.finish or 0.0 for job in jobs)
    return PolicyRun(policy, jobs, makespan, len(iterations))


def _since(start: float, metrics: JobMetrics) -> JobMetrics:
    """The same metrics on a clock that began at `start`."""

    def shifted(time: float | None) -> float | None:
        return None if time is None else time - start

    return replace(
        metrics,
        arrival=metrics.arrival - start,
        first_scheduled=shifted(metrics.first_scheduled),
        first_token=shifted(metrics.first_token),
        finish=shifted(metrics.finish),
    )


def verdict(baseline: PolicyRun, other: PolicyRun) -> str:
    """One sentence: how the mean JCTs compare, better or worse, and for whom."""

    def mean(run: PolicyRun, kind: str | None = None) -> float:
        return run.summaries(kind)["jct"].mean

    ratio = mean(baseline) / mean(other)
    sooner = f"{ratio:.2f}× sooner" if ratio >= 1 else f"{1 / ratio:.2f}× later"
    kinds = sorted({job.kind for job in baseline.jobs})
    parts = ", ".join(f"{kind} {mean(baseline, kind):.1f} → {mean(other, kind):.1f} s" for kind in kinds)
    return f"{other.policy} finishes the average job {sooner} than {baseline.policy} (mean JCT by kind: {parts})."


def report(runs: Sequence[PolicyRun], console: Console) -> list[str]:
    """Print the table, a sample and the check. Return the names of jobs whose tokens differ between runs."""
    console.print(compare_policies(runs))
    for run in runs[1:]:
        console.print(f"[bold]{escape(verdict(runs[0], run))}[/]")
        speeds = runs[0].tokens_per_second, run.tokens_per_second
        if max(speeds) > _EQUAL_SPEED * min(speeds):
            console.print(
                f"[yellow]Mind that the machine was not equally fast: {speeds[0]:.0f} tokens/s under {runs[0].policy}, "
                f"{speeds[1]:.0f} under {run.policy}. Run it again with the machine to itself.[/]"
            )
    for job in (job for job in runs[-1].jobs if any(sample in job.prompt for sample in SAMPLES)):
        words = " ".join(job.text.split())
        excerpt = words if len(words) <= 300 else f"{words[:300].rsplit(' ', 1)[0]} …"
        console.print(Padding(f"[dim]{escape(job.prompt)}[/]\n[italic]{escape(excerpt)}[/]", (1, 2, 0, 2)))
    different = different_jobs(runs)
    console.print()
    if different:
        console.print(f"[bold red]Different words[/]: {len(different)} jobs, {', '.join(different[:5])} …")
    elif len(runs) > 1:
        words = f"all {len(runs[0].jobs)} jobs, {runs[0].output_tokens} tokens, identical under every policy."
        console.print(f"[bold green]Same words[/]: {words}")
    return different


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    from ..serving import EngineError

    options = _parse(arguments)
    console = Console(stderr=options.json)
    if find_spec("matplotlib") is None:
        console.print("the demo draws with matplotlib; install it with: pip install 'fastserve\\[plots]'")
        return 2
    try:
        trace = demo_trace(options.seed, iteration_seconds(options.model))
        questions = sum(job.kind == "question" for job in trace)
        title = (
            f"{options.model}, {SETTINGS['max_num_seqs']} slots: {questions} questions and "
            f"{len(trace) - questions} stories in {len(BURSTS)} bursts"
        )
        console.print(f"[bold]{escape(title)}[/]\n")
        runs = [run_policy(options.model, policy, trace, options.seed, console) for policy in options.policy]
        different = report(runs, console)
        plot_runs(runs, options.out, title)
    except (InvalidRequest, ModelError, EngineError, OSError) as error:
        console.print(f"[red]{escape(str(error))}[/]")
        return 2
    except KeyboardInterrupt:
        return 130
    console.print(f"Who ran when: [bold]{escape(str(options.out))}[/]", highlight=False)
    if options.json:
        result = {
            "model": options.model,
            "seed": options.seed,
            "settings": SETTINGS,
            "runs": [run.as_dict() for run in runs],
            "different_jobs": different,
        }
        json.dump(result, sys.stdout, indent=2)
    return 1 if different else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastserve.bench.demo", description="One trace of jobs under several policies, side by side."
    )
    parser.add_argument("--model", default="smollm2", help="with a chat template (default: smollm2)")
    parser.add_argument(
        "--policy",
        action="append",
        choices=list(ONLINE_POLICIES),
        help=f"repeatable, the baseline first (default: {' and '.join(DEFAULT_POLICIES)})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the trace and its sampling (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="where the plot goes (default: demo.png)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON; everything else goes to stderr")
    options = parser.parse_args(arguments)
    options.policy = options.policy or list(DEFAULT_POLICIES)
    return options


if __name__ == "__main__":
    sys.exit(main())
