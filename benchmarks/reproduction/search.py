"""The rate at which a latency crosses a limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from .cases import Case, rounded, simulate

SLO: Final = 0.3  # seconds a token: what the paper calls sustained
MEAN: Final = "mean_normalized_latency"
TAIL: Final = "p95_normalized_latency"
PRECISION: Final = 0.03  # of a sustained rate


@dataclass(frozen=True)
class Crossing:
    """Where a rising function meets the limit: `rate`, or None where it does not below the highest rate tried."""

    rate: float | None
    tried: list[tuple[float, float]]  # every (rate, value) looked at, in that order


def crossing(
    value: Callable[[float], float], limit: float, start: float, *, most: float, precision: float = PRECISION
) -> Crossing:
    """The rate below `most` at which `value`, which rises with the rate, reaches `limit`, to the relative precision.

    Brackets by doubling or halving from `start`, then halves the bracket on a logarithmic scale.
    """
    tried: list[tuple[float, float]] = []

    def exceeds(rate: float) -> bool:
        tried.append((rounded(rate), rounded(value(rate))))
        return tried[-1][1] > limit

    low = high = start
    if exceeds(start):
        while exceeds(low := low / 2):
            high = low
            if low < start / 2**20:
                raise ValueError(f"is above {limit} at any rate")
    else:
        while not exceeds(high := min(high * 2, most)):
            low = high
            if high >= most:
                return Crossing(None, tried)
    while high / low > 1 + 2 * precision:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if exceeds(middle) else (middle, high)
    return Crossing(rounded((low * high) ** 0.5), tried)


def lasting(case: Case, rate: float, seconds: float) -> Case:
    """The case with as many jobs as come in that time, if it has fewer."""
    return replace(case, jobs=max(case.jobs, math.ceil(rate * seconds)))


def sustained(
    case: Case, policy: str, seed: int, start: float, most: float, measure: str = MEAN, seconds: float = 0.0
) -> dict[str, Any]:
    """The rate up to which the normalized latency of one seed's jobs stays within SLO; None: at any up to most.

    With it, what the last run within the SLO was like. Jobs come for `seconds` at least.
    """
    runs: dict[float, dict[str, Any]] = {}

    def latency(rate: float) -> float:
        runs[rounded(rate)] = simulate(lasting(case, rate, seconds), policy, rate, seed)
        value: float = runs[rounded(rate)][measure]
        return value

    found = crossing(latency, SLO, start, most=most)
    within = max((rate for rate, value in found.tried if value <= SLO), default=None)
    kept = {} if within is None else {name: runs[within][name] for name in ("swapped_blocks", "recomputed_tokens")}
    return {"rate": found.rate, "tried": found.tried, **kept}
