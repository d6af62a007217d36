"""How long outputs are, learned as they come: hazards over ages, with forgetting, censoring and an eye for drift.

An *age* is a number of output tokens; the outputs of bucket b have edge(b) < length <= edge(b + 1), so a job of that
many tokens that is still running is in bucket(age). The *hazard* of a bucket is the share of the jobs which reach it
that end in it. Hazards, unlike a histogram of lengths, stay right when long jobs have not ended yet (each counts as
having survived the buckets it has passed), and when a job ends for another reason than its length.
"""

from __future__ import annotations

import math
from typing import Final

# Buckets are exact up to this age, then four an octave.
_EXACT: Final = 8

# What little is known of a bucket is mixed with a prior that counts as much as this many jobs: the older a job, the
# longer it still has to go (a Lomax distribution of this shape, whose mean is that of the lengths seen), which makes
# the index order jobs as a multi-level feedback queue does. It keeps chance from making up an order of its own.
_PRIOR_WEIGHT: Final = 50.0
_PRIOR_SHAPE: Final = 2.0

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


def excess(recent: Hazards, longer: Hazards) -> tuple[float, float]:
    """How far recent ends deviate from what those before foretell: in standard deviations, and as a share of jobs.

    Those before are what `longer` remembers of the same jobs and `recent` does not. A log-rank test, cumulative: the
    largest deviation, over all ages, of the ends up to that age from those expected, by the standard deviation of the
    whole sum (ends within a bucket are binomial); like Kolmogorov and Smirnov's, but right with censored jobs. The
    second number is the largest distance between the two survival curves.
    """
    deviation = largest = variance = distance = 0.0
    alive = alive_before = 1.0
    for index in range(len(recent)):
        reached, ended = recent.counts(index)
        all_reached, all_ended = longer.counts(index)
        before = max(0.0, all_reached - reached)
        hazard = (max(0.0, all_ended - ended) + 0.5) / (before + 1)
        deviation += ended - reached * hazard
        largest = max(largest, abs(deviation))
        # What came before is known from so many jobs only.
        variance += reached * hazard * max(0.0, 1 - hazard) * (1 + reached / (before + 1))
        alive *= 1 - recent.hazard(index)
        alive_before *= 1 - min(1.0, hazard)
        distance = max(distance, abs(alive - alive_before))
    return largest / math.sqrt(max(variance, 1.0)), distance


class LengthDistribution:
    """What the policies that learn share: a table of hazards, and whether to trust it.

    It is trusted after `learn_after` completions, made anew every so often, and no longer once the lengths of late have
    drifted from those before; then all is learned again.
    """

    # Completions after which one counts 1/e of a new one.
    _SLOW, _FAST = 4000.0, 200.0
    # Completions between two tables: a tenth of those learned from, within these.
    _RENEWALS = (25, 400)
    # To be taken for drift, a deviation has this many standard deviations (chance makes it once in 10⁸) and this size.
    _DRIFT_DEVIATIONS, _DRIFT_DISTANCE = 6.0, 0.15

    # Few, for what decides until then may leave many jobs half done; the prior keeps so small a table from being taken
    # at its word.
    _ENOUGH = 64

    def __init__(self, learn_after: int = _ENOUGH) -> None:
        self._learn_after = learn_after
        self.version = 0  # of the table
        self.mean_prompt = 0.0  # tokens, of the last thousand jobs or so
        self._prompts = 0
        self._forget()

    def _forget(self) -> None:
        self.learned = False
        self.hazards: list[float] = []  # the table; see hazard() for the buckets beyond it
        self._slow, self._fast = Hazards(self._SLOW), Hazards(self._FAST)
        self._completions = 0
        self._mean = 1.0  # output tokens of a completed job, lately
        self._next_renewal = self._learn_after

    def hazard(self, index: int) -> float:
        """The table's hazard of a bucket."""
        return self.hazards[index] if index < len(self.hazards) else self._prior(index)

    def _prior(self, index: int) -> float:
        return 1 - math.pow((edge(index) + self._mean) / (edge(index + 1) + self._mean), _PRIOR_SHAPE)

    def saw_prompt(self, tokens: int) -> None:
        """A job of that many prompt tokens arrived."""
        self._prompts += 1
        self.mean_prompt += (tokens - self.mean_prompt) / min(self._prompts, 1000)

    def survived(self, first: int, last: int) -> None:
        """A live job has passed buckets first … last - 1."""
        self._slow.survived(first, last)
        self._fast.survived(first, last)

    def ended(self, first: int, length: int) -> None:
        """A job's output is complete; as far as reported, it had survived the buckets before `first`."""
        index = bucket(length - 1)
        for hazards in (self._slow, self._fast):
            hazards.survived(first, index)
            hazards.ended(index)
        self._complete(length)

    def censored(self, first: int, length: int, *, complete: bool) -> None:
        """A job ended for another reason: by max_tokens (`complete`), or aborted."""
        index = bucket(length)
        share = (length - edge(index)) / (edge(index + 1) - edge(index))
        for hazards in (self._slow, self._fast):
            hazards.survived(first, index)
            hazards.censored(index, share)
        if complete:
            self._complete(length)

    def _complete(self, length: int) -> None:
        self._completions += 1
        self._mean += (length - self._mean) / min(self._completions, self._SLOW)
        if self._completions < self._next_renewal:
            return
        deviations, distance = excess(self._fast, self._slow) if self.learned else (0.0, 0.0)
        self.version += 1
        if deviations > self._DRIFT_DEVIATIONS and distance > self._DRIFT_DISTANCE:
            self._forget()
            return
        self.learned = True
        self.hazards = [self._slow.hazard(index, self._prior(index), _PRIOR_WEIGHT) for index in range(len(self._slow))]
        low, high = self._RENEWALS
        self._next_renewal = self._completions + min(max(self._completions // 10, low), high)
