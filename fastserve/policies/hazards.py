"""How long outputs are, as hazards over ages, with forgetting and censoring.

An *age* is a number of output tokens; the outputs of bucket b have edge(b) < length <= edge(b + 1), so a job of that
many tokens that is still running is in bucket(age). The *hazard* of a bucket is the share of the jobs which reach it
that end in it. Hazards, unlike a histogram of lengths, stay right when long jobs have not ended yet (each counts as
having survived the buckets it has passed), and when a job ends for another reason than its length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

# Buckets are exact up to this age, then four an octave.
_EXACT: Final = 8

_LARGEST_SCALE: Final = 1e100


def bucket(age: int) -> int:
    """The bucket of a job that has emitted `age` tokens."""
    if age < _EXACT:
        return age
    octave = age.bit_length() - 1
    return _EXACT + 4 * (octave - 3) + ((age >> (octave - 2)) & 3)


def edge(index: int) -> int:
    """The smallest age in a bucket."""
    if index < _EXACT:
        return index
    octave, quarter = divmod(index - _EXACT, 4)
    return (4 + quarter) << (octave + 1)


class Hazards:
    """Jobs that reached each bucket, and jobs that ended in it, forgotten exponentially: a completion counts
    1 - 1/memory times as much after each later one."""

    def __init__(self, memory: float) -> None:
        self._growth = 1 / (1 - 1 / memory)
        self._scale = 1.0  # what a job counts now; the past shrinks relative to it
        self._reached: list[float] = []
        self._ended: list[float] = []

    def __len__(self) -> int:
        """Buckets of which something is known."""
        return len(self._reached)

    def survived(self, first: int, last: int) -> None:
        """A job passed buckets first … last - 1; where last is less, it has not passed last … first - 1 after all."""
        self._reach(last)
        for index in range(first, last):
            self._reached[index] += self._scale
        for index in range(last, first):
            self._reached[index] -= self._scale

    def ended(self, index: int) -> None:
        """A job ended in the bucket."""
        self._reach(index + 1)
        self._reached[index] += self._scale
        self._ended[index] += self._scale
        self._scale *= self._growth
        if self._scale > _LARGEST_SCALE:
            self._reached = [value / self._scale for value in self._reached]
            self._ended = [value / self._scale for value in self._ended]
            self._scale = 1.0

    def censored(self, index: int, share: float) -> None:
        """A job left, for another reason than its length, after this share of the bucket."""
        self._reach(index + 1)
        self._reached[index] += self._scale * share

    def counts(self, index: int) -> tuple[float, float]:
        """How many jobs reached the bucket, and how many ended in it, as far as remembered."""
        if index >= len(self._reached):
            return 0.0, 0.0
        return self._reached[index] / self._scale, self._ended[index] / self._scale

    def hazard(self, index: int, prior: float = 0.5, weight: float = 1.0) -> float:
        """The share of the jobs reaching the bucket that end in it, as if `weight` more had, `prior` of them ending."""
        reached, ended = self.counts(index)
        return (ended + weight * prior) / (reached + weight)

    def _reach(self, buckets: int) -> None:
        missing = buckets - len(self._reached)
        if missing > 0:
            self._reached += [0.0] * missing
            self._ended += [0.0] * missing


def deviation(sample: Hazards, others: Callable[[int], tuple[float, float]]) -> tuple[float, float]:
    """How far the ends of a sample deviate from what others foretell: in standard deviations, and as a share of jobs.

    `others(b)` are the counts of bucket b (see Hazards.counts). A log-rank test, cumulative: the largest deviation,
    over all ages, of the ends up to that age from those expected, by the standard deviation of the whole sum (ends
    within a bucket are binomial); like Kolmogorov and Smirnov's, but right with censored jobs. The second number is the
    largest distance between the two survival curves.
    """
    total = largest = variance = distance = 0.0
    alive = alive_others = 1.0
    for index in range(len(sample)):
        reached, ended = sample.counts(index)
        before, ended_before = others(index)
        hazard = (ended_before + 0.5) / (before + 1)
        total += ended - reached * hazard
        largest = max(largest, abs(total))
        # The others are so many jobs only.
        variance += reached * hazard * max(0.0, 1 - hazard) * (1 + reached / (before + 1))
        alive *= 1 - sample.hazard(index)
        alive_others *= 1 - min(1.0, hazard)
        distance = max(distance, abs(alive - alive_others))
    return largest / math.sqrt(max(variance, 1.0)), distance


# To be taken for drift, a deviation has this many standard deviations (chance makes it once in 10⁸) and this size.
_DRIFT_DEVIATIONS: Final = 6.0
_DRIFT_DISTANCE: Final = 0.15


def drifted(recent: Hazards, longer: Hazards) -> bool:
    """Whether outputs are of other lengths of late than they were before."""
    deviations, distance = excess(recent, longer)
    return deviations > _DRIFT_DEVIATIONS and distance > _DRIFT_DISTANCE


def excess(recent: Hazards, longer: Hazards) -> tuple[float, float]:
    """The deviation of recent ends from those before: what `longer` remembers of the same jobs and `recent` not."""

    def before(index: int) -> tuple[float, float]:
        reached, ended = recent.counts(index)
        all_reached, all_ended = longer.counts(index)
        return max(0.0, all_reached - reached), max(0.0, all_ended - ended)

    return deviation(recent, before)
