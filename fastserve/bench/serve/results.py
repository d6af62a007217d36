"""What a run comes to: load, latencies, errors, and how far the client itself can be trusted. All in seconds."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ...types import InvalidRequest
from .record import SHORT, UNFINISHED, JobRecord
from .replay import Replayed
from .target import Target

LATE: Final = 0.010  # seconds behind schedule that are no longer small
BUSY: Final = 0.8  # of a core: beyond, tokens wait for this client

# Of a job, by measure; None where it has none.
JOB_MEASURES: Final[dict[str, Callable[[JobRecord], float | None]]] = {
    "jct": lambda record: record.jct,
    "ttft": lambda record: record.ttft,
    "tpot": lambda record: record.tpot,
    "normalized_latency": lambda record: record.normalized_latency,
}
MEASURES: Final = ("jct", "ttft", "tpot", "itl", "normalized_latency")
STATISTICS: Final = ("mean", "p50", "p95", "p99", "max")


@dataclass(frozen=True, slots=True)
class ServeRun:
    """One run against one server."""

    target: Target
    rate: float | None  # jobs a second, as asked for; None: the trace's own, or all at once
    round: int
    summary: dict[str, Any]
    records: list[JobRecord] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {
            "target": self.target.name,
            "base_url": self.target.base_url,
            "model": self.target.model,
            "rate": self.rate,
            "round": self.round,
            "summary": self.summary,
            "warnings": warnings(self.summary),
            "jobs": [record.as_dict() for record in self.records],
        }


@dataclass(frozen=True, slots=True)
class Slo:
    """The most seconds that a job may take, by measure; `itl` is its longest gap."""

    limits: dict[str, float]

    def met(self, record: JobRecord) -> bool:
        """Never by a job that failed. A job of one token has no TPOT and no gap, and meets any limit of them."""
        return record.ok and all(
            value is None or value <= limit
            for value, limit in ((_measure(name, record), limit) for name, limit in self.limits.items())
        )

    @property
    def name(self) -> str:
        return ", ".join(f"{name} ≤ {limit:g} s" for name, limit in self.limits.items())


def parse_slo(text: str) -> Slo:
    """`ttft=0.5,tpot=0.1`. Raises InvalidRequest."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.partition("="))
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if name not in MEASURES or name in limits or not 0 < limit < math.inf:
            raise InvalidRequest(
                "slo",
                f"must be written ttft=0.5,tpot=0.1, in seconds above 0, for any of {', '.join(MEASURES)}; "
                f"got {text!r}",
            )
        limits[name] = limit
    return Slo(limits)


def summarize(run: Replayed, slo: Slo | None = None) -> dict[str, Any]:
    """A run in numbers, ready for JSON. A measure that nothing has is None."""
    done = [record for record in run.records if record.ok]
    failed = [record for record in run.records if record.error not in (None, UNFINISHED)]
    seconds = run.seconds
    tokens = sum(record.tokens for record in done)
    prompt_tokens = sum(record.prompt_tokens for record in done)
    summary: dict[str, Any] = {
        "jobs": len(run.records),
        "completed": len(done),
        "failed": len(failed),
        "unfinished": len(run.records) - len(done) - len(failed),
        "interrupted": run.interrupted,
        "seconds": seconds,
        "offered": _offered(run.records),
        "achieved": {
            "jobs_per_second": _per(len(done), seconds),
            "output_tokens_per_second": _per(tokens, seconds),
            "total_tokens_per_second": _per(tokens + prompt_tokens, seconds),
        },
        "prompt_tokens": prompt_tokens,
        "output_tokens": tokens,
        "counted_by_chunks": sum(record.usage_tokens is None for record in done),
        "other_length": sum(record.tokens != record.asked_tokens for record in done),
        "peak_open": run.peak_open,
        "latency": _latencies(done),
        "later": _latencies([record for record in done if record.call]),
        "programs": _programs(run.records),
        "users": _users(done),
        "cached_share": _cached_share(done),
        "short": _latencies([record for record in done if record.tokens <= SHORT]),
        "long": _latencies([record for record in done if record.tokens > SHORT]),
        "errors": _errors(failed),
        "client": _client(run),
    }
    if slo is not None:
        met = sum(slo.met(record) for record in run.records)
        judged = len(done) + len(failed)
        summary["goodput"] = {
            "slo": slo.limits,
            "jobs": met,
            "share": met / judged if judged else None,
            "jobs_per_second": _per(met, seconds),
        }
    return summary


def sample(measure: str, records: Iterable[JobRecord]) -> list[float]:
    """All values of a measure over answered jobs; of `itl`, those of every gap."""
    if measure == "itl":
        return [gap for record in records for gap in record.gaps]
    values = (JOB_MEASURES[measure](record) for record in records)
    return [value for value in values if value is not None]


def warnings(summary: dict[str, Any]) -> list[str]:
    """Why figures may not be what they seem, each a sentence."""
    client, told = summary["client"], []
    late = client["late"]
    if late is not None and late["p99"] > LATE:
        told.append(
            f"This client was late: {1e3 * late['p99']:.0f} ms at the 99th percentile, "
            f"{1e3 * late['max']:.0f} ms at most. "
            "Latencies include it. Give it a core of its own, or send less."
        )
    if client["cores"] is not None and client["cores"] > BUSY:
        told.append(f"This client took {client['cores']:.2f} of a core: tokens may have waited for it.")
    if summary["counted_by_chunks"]:
        told.append(f"{summary['counted_by_chunks']} answers came without usage: their tokens are counted by pieces.")
    if summary["failed"]:
        told.append(f"{summary['failed']} of {summary['jobs']} jobs failed; latencies are those of the others.")
    if summary["interrupted"]:
        told.append(f"Interrupted: {summary['unfinished']} jobs are unfinished and in none of the figures.")
    return told


def _measure(name: str, record: JobRecord) -> float | None:
    return max(record.gaps, default=None) if name == "itl" else JOB_MEASURES[name](record)


def _offered(records: Sequence[JobRecord]) -> dict[str, float | None]:
    """What was to come, over the time in which it was to. None where all came at once."""
    span = max((record.arrival for record in records), default=0.0) - min(
        (record.arrival for record in records), default=0.0
    )
    # Arrivals are the ends of gaps: the first one's is not there.
    share = (len(records) - 1) / len(records) if records else 0.0
    jobs, tokens = len(records), sum(record.asked_tokens for record in records)
    return {
        "jobs_per_second": _per(jobs * share, span),
        "output_tokens_per_second": _per(tokens * share, span),
    }


def _programs(records: Sequence[JobRecord]) -> dict[str, float] | None:
    """From the arrival of the first call to the end of the last, of programs all of whose calls were answered."""
    ends: dict[str, list[JobRecord]] = {}
    for record in records:
        if record.program is not None:
            ends.setdefault(record.program, []).append(record)
    return _statistics(
        [calls[-1].times[-1] - calls[0].arrival for calls in ends.values() if all(record.ok for record in calls)]
    )


def _users(done: Sequence[JobRecord]) -> dict[str, dict[str, float] | None] | None:
    """JCT of each user's jobs; None where jobs are nobody's."""
    users: dict[str, list[JobRecord]] = {}
    for record in done:
        if record.user is not None:
            users.setdefault(record.user, []).append(record)
    return {name: _statistics(sample("jct", own)) for name, own in users.items()} or None


def _cached_share(done: Sequence[JobRecord]) -> float | None:
    """Of prompts' tokens, those that the server says it had; None where it says nothing."""
    told = [record for record in done if record.cached_tokens is not None]
    return _per(sum(record.cached_tokens or 0 for record in told), sum(record.prompt_tokens for record in told))


def _latencies(records: Sequence[JobRecord]) -> dict[str, dict[str, float] | None]:
    summaries: dict[str, dict[str, float] | None] = {}
    for measure in MEASURES:
        summaries[measure] = _statistics(sample(measure, records))
    return summaries


def _statistics(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    array_of = np.frombuffer(array("d", values))
    p50, p95, p99 = (float(value) for value in np.percentile(array_of, (50, 95, 99)))
    return {
        "count": len(values),
        "mean": float(array_of.mean()),
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "max": float(array_of.max()),
    }


def _errors(failed: Sequence[JobRecord]) -> list[dict[str, Any]]:
    """By kind, the most frequent first, each with the first job's detail."""
    details: dict[str, str] = {}
    for record in failed:
        details.setdefault(str(record.error), record.detail)
    counts = Counter(str(record.error) for record in failed)
    return [{"error": kind, "jobs": count, "detail": details[kind]} for kind, count in counts.most_common()]


def _client(run: Replayed) -> dict[str, Any]:
    late = [record.lateness for record in run.records if record.lateness is not None]
    return {
        "late": _statistics(late),
        "cpu_seconds": run.cpu_seconds,
        "cores": _per(run.cpu_seconds, run.seconds),
        "cpu_microseconds_per_token": _per(1e6 * run.cpu_seconds, run.pieces),
    }


def _per(amount: float, of: float) -> float | None:
    return amount / of if of > 0 else None
