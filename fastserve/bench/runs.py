"""What one policy did with one trace: every job's times and words, and when each job ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..types import JobMetrics
from .summary import Summary, summarize_jobs

Span = tuple[float, float]


@dataclass(slots=True)
class JobRun:
    """One finished job. `metrics` holds seconds since the start of the run."""

    name: str
    kind: str
    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: str
    metrics: JobMetrics
    spans: list[Span] = field(default_factory=list)  # when it was part of an iteration, seconds since the start

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "prompt": self.prompt,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "metrics": self.metrics.as_dict(len(self.token_ids)),
        }


@dataclass(slots=True)
class PolicyRun:
    """All jobs of a trace under one policy, in the trace's order."""

    policy: str
    jobs: list[JobRun]
    makespan: float  # seconds from the start to the last token
    iterations: int

    @property
    def output_tokens(self) -> int:
        return sum(len(job.token_ids) for job in self.jobs)

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.makespan

    def summaries(self, kind: str | None = None) -> dict[str, Summary]:
        """Summaries of JCT, TTFT and normalized latency, over all jobs or those of one kind."""
        return summarize_jobs((job.metrics, len(job.token_ids)) for job in self.jobs if kind in (None, job.kind))

    def as_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "makespan": self.makespan,
            "iterations": self.iterations,
            "output_tokens": self.output_tokens,
            "tokens_per_second": self.tokens_per_second,
            "preemptions": sum(job.metrics.preemptions for job in self.jobs),
            "summary": {measure: summary.as_dict() for measure, summary in self.summaries().items()},
            "jobs": [job.as_dict() for job in self.jobs],
        }


class Iteration(Protocol):
    """The part of an engine's IterationRecord that the benches read. Times are on the engine's clock."""

    @property
    def submitted(self) -> float: ...
    @property
    def completed(self) -> float: ...
    @property
    def job_ids(self) -> tuple[str, ...]: ...
    @property
    def prefill_tokens(self) -> int: ...
    @property
    def decode_tokens(self) -> int: ...
    @property
    def waiting(self) -> int: ...


def wall_spans(iterations: Sequence[Iteration]) -> list[Span]:
    """When each iteration had the device, on the engine's clock.

    A plan may be queued behind the running one; its own time begins when that one is done.
    """
    spans: list[Span] = []
    free = float("-inf")
    for iteration in iterations:
        spans.append((max(iteration.submitted, free), iteration.completed))
        free = iteration.completed
    return spans


def job_spans(iterations: Sequence[Iteration], origin: float = 0.0, gap: float = 2e-3) -> dict[str, list[Span]]:
    """When each job ran, in seconds since `origin`; iterations closer than `gap` seconds merge into one span."""
    spans: dict[str, list[Span]] = {}
    for iteration, (start, end) in zip(iterations, wall_spans(iterations), strict=True):
        for job_id in iteration.job_ids:
            own = spans.setdefault(job_id, [])
            if own and start - origin - own[-1][1] <= gap:
                own[-1] = (own[-1][0], end - origin)
            else:
                own.append((start - origin, end - origin))
    return spans


def different_jobs(runs: Sequence[PolicyRun]) -> list[str]:
    """Names of the jobs whose tokens are not the same in every run, in the first run's order."""
    tokens: list[Mapping[str, list[int]]] = [{job.name: job.token_ids for job in run.jobs} for run in runs]
    return [name for name, first in tokens[0].items() if any(other.get(name) != first for other in tokens[1:])]
