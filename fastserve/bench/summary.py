"""Numbers of many jobs condensed to a few: mean, P50, P95, P99."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..types import JobMetrics

STATISTICS = ("mean", "p50", "p95", "p99")
MEASURES = {"jct": "JCT", "ttft": "TTFT", "normalized_latency": "Normalized latency"}


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and percentiles of a sample, in the sample's unit. Percentiles interpolate linearly, as NumPy's do."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def summarize(values: Sequence[float]) -> Summary:
    """Summarize at least one finite value. Raises ValueError for an empty or non-finite sample."""
    sample = np.asarray(values, np.float64)
    if sample.size == 0:
        raise ValueError("cannot summarize an empty sample")
    if not np.isfinite(sample).all():
        raise ValueError("cannot summarize a sample with values that are not finite")
    p50, p95, p99 = (float(p) for p in np.percentile(sample, (50, 95, 99)))
    return Summary(sample.size, float(sample.mean()), p50, p95, p99)


def summarize_jobs(jobs: Iterable[tuple[JobMetrics, int]]) -> dict[str, Summary]:
    """JCT and TTFT in seconds and normalized latency in seconds per token, over jobs given as (metrics, output tokens).

    A job that produced no token has no TTFT and no normalized latency and an unfinished one has no JCT; each counts
    where it has a value. Raises ValueError when a measure has no value at all.
    """
    values: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for metrics, output_tokens in jobs:
        derived = metrics.as_dict(output_tokens)
        for measure, sample in values.items():
            if derived[measure] is not None:
                sample.append(derived[measure])
    return {measure: summarize(sample) for measure, sample in values.items()}
