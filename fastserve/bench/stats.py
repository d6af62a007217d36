"""Statistics of streams in bounded memory, and confidence intervals over repeated runs."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

EXACT_VALUES: Final = 2**17  # percentiles of so many values are exact
RELATIVE_ERROR: Final = 1e-3  # of percentiles of more

# Beyond, a value is its bucket: a bucket's edges are a factor apart that puts all of it within the error of its middle.
_SMALLEST: Final = 1e-12
_LARGEST: Final = 1e12
_LOG_WIDTH: Final = 2 * math.log1p(RELATIVE_ERROR)
_BUCKETS: Final = math.ceil(math.log(_LARGEST / _SMALLEST) / _LOG_WIDTH)


class Stream:
    """Count, mean, extremes and percentiles of values of at least 0, each seen once.

    Mean and extremes are exact, to rounding. Percentiles interpolate linearly between neighbours, as NumPy's do; they
    are exact up to EXACT_VALUES values and within RELATIVE_ERROR beyond, for values of 1e-12 … 1e12.
    """

    def __init__(self) -> None:
        self._values = array("d")  # those not yet in the histogram
        self._histogram: npt.NDArray[np.int64] | None = None
        self._folded = 0
        self._total = 0.0
        self._rounding = 0.0  # what adding to _total has lost (Neumaier)
        self._low, self._high = math.inf, -math.inf

    def __len__(self) -> int:
        return self._folded + len(self._values)

    def add(self, value: float) -> None:
        """Raises ValueError for a value below 0 or not finite."""
        if not 0.0 <= value < math.inf:
            raise ValueError(f"must be a finite number of at least 0, got {value!r}")
        self._values.append(value)
        if len(self._values) > EXACT_VALUES:
            self._fold()

    @property
    def mean(self) -> float:
        """NaN without values."""
        return math.fsum((self._total, self._rounding, *self._values)) / len(self) if len(self) else math.nan

    @property
    def maximum(self) -> float:
        """NaN without values."""
        return max(self._high, max(self._values, default=-math.inf)) if len(self) else math.nan

    def percentiles(self, *percents: float) -> list[float]:
        """NaN without values."""
        if not len(self):
            return [math.nan] * len(percents)
        if self._histogram is None:
            return [float(value) for value in np.percentile(np.frombuffer(self._values), percents)]
        self._fold()
        cumulative = np.cumsum(self._histogram)
        return [self._interpolate(cumulative, percent / 100 * (len(self) - 1)) for percent in percents]

    def _interpolate(self, cumulative: npt.NDArray[np.int64], rank: float) -> float:
        lower = math.floor(rank)
        below, above = (self._ranked(cumulative, min(each, len(self) - 1)) for each in (lower, lower + 1))
        return below + (above - below) * (rank - lower)

    def _ranked(self, cumulative: npt.NDArray[np.int64], rank: int) -> float:
        """About the value that is number `rank` of all, counted from 0 at the smallest."""
        bucket = int(np.searchsorted(cumulative, rank, side="right"))
        return min(max(_SMALLEST * math.exp((bucket + 0.5) * _LOG_WIDTH), self._low), self._high)

    def _fold(self) -> None:
        """Move the values into the histogram."""
        if not self._values:
            return
        values = np.frombuffer(self._values)
        self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
        own = math.fsum(self._values)
        total = self._total + own
        self._rounding += (self._total - total) + own if abs(self._total) >= abs(own) else (own - total) + self._total
        self._total = total
        logarithms = np.log(np.clip(values, _SMALLEST, _LARGEST) / _SMALLEST)
        buckets = np.minimum((logarithms / _LOG_WIDTH).astype(np.int64), _BUCKETS - 1)
        if self._histogram is None:
            self._histogram = np.zeros(_BUCKETS, np.int64)
        self._histogram += np.bincount(buckets, minlength=_BUCKETS)
        self._folded += len(self._values)
        self._values = array("d")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over independent runs, and how far the true one may be from it."""

    mean: float
    half_width: float | None  # of the 95 % confidence interval; None: one run tells nothing of it
    runs: int


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean of at least one value, with Student's interval. Raises ValueError for none."""
    count = len(values)
    if not count:
        raise ValueError("cannot estimate from no value")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Estimate(mean, student_quantile((1 + confidence) / 2, count - 1) * deviation / math.sqrt(count), count)


@lru_cache(maxsize=256)
def student_quantile(probability: float, degrees: int) -> float:
    """t that a Student variable of so many degrees of freedom stays below with this probability, 0.5 … 1."""
    low, high = 0.0, math.pi / 2
    for _ in range(100):  # t = √degrees · tan(angle), so that every t is in reach of a bisection
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, degrees) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _central(angle: float, degrees: int) -> float:
    """P(|t| ≤ √degrees · tan(angle)): the finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
