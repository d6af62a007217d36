"""Shortest remaining processing time: the oracle that knows how long every output will be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from heapq import merge
from typing import Final

from sortedcontainers import SortedDict

from ..cost import Cost
from ..types import InvalidRequest, Job
from .base import Policy

# Remaining seconds are sums of floats; what differs by less than a nanosecond is a tie, and ties break by arrival.
_DIGITS: Final = 9

# Work ahead is summed over buckets of remaining seconds, this many to a factor of 2 ...
_PER_OCTAVE: Final = 4
# ... between 2^-20 and 2^28 seconds.
_LOWEST, _HIGHEST = -20 * _PER_OCTAVE, 28 * _PER_OCTAVE

_Key = tuple[float, int]


class ShortestRemainingTime(Policy):
    """The job with the fewest modelled solo seconds left goes first; nothing else counts, no bound on waiting either.

    It is an oracle of jobs, not of programs: how many calls a program has left, nobody tells it.

    Remaining seconds are those of the prefill not yet done and of the decodes not yet done, each taken to cost the mean
    of the first and the last, which is exact for a cost linear in the context. Jobs without `known_output` are refused.

    A running job's remaining time only shrinks, so a stale one harms nobody until a job arrives that might fit in
    between, or jobs of other priorities take places. Hence service is not asked for (the horizon is infinite); in these
    cases those that ran are looked at again before anyone is chosen. Who gives way for want of memory is chosen by
    times as they were looked at last. Those whose time changes at every look, a batch of them, are kept apart from the
    many that wait: sorting a few hundred anew is quicker than finding a new place among all for each.
    """

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self._keys: dict[Job, _Key] = {}
        self._order: SortedDict = SortedDict()  # (remaining seconds, index) → job, of those that wait
        self._tiers: tuple[SortedDict, SortedDict] = (SortedDict(), SortedDict())  # the same, by Job.tier
        self._running: dict[Job, None] = {}  # the others: they ran when they were last looked at
        self._sorted: list[tuple[_Key, Job]] = []  # those; empty: to be sorted
        self._running_sums: list[float] = []  # of them, as _sums; empty: to be summed
        self._ran: dict[Job, None] = {}  # those whose key may be out of date
        self._stale = False
        self._sums = [0.0] * (_HIGHEST - _LOWEST + 1)  # of those that wait
        self._counts = [0] * len(self._sums)

    def add(self, job: Job, now: float) -> None:
        """Raises InvalidRequest for a job whose output length nobody knows."""
        if job.known_output is None:
            raise InvalidRequest("policy", "srpt needs output lengths: simulator and replay only")
        self._insert(job)
        self._stale = True

    def remove(self, job: Job) -> None:
        self._delete(job)
        self._ran.pop(job, None)

    def on_service(self, job: Job, seconds: float, now: float) -> None:
        self._refresh(job)

    def refresh(self, job: Job, now: float) -> None:
        self._refresh(job)
        self._stale = True  # it may fit in between now

    def horizon(self, job: Job) -> float:
        return math.inf

    def make_way(self) -> None:
        self._stale = True

    def move(self, job: Job, tier: int | None) -> None:
        if job in self._running:
            return
        key = self._keys[job]
        if job.tier is not None:
            self._tiers[job.tier].pop(key, None)
        if tier is not None:
            self._tiers[tier][key] = job

    def iter_best(self, now: float) -> Iterator[Job]:
        if self._stale:
            self._stale = False
            for job in list(self._ran):
                waits = job.waiting_since is not None
                if waits or job not in self._running:
                    self._delete(job)
                    self._insert(job, running=not waits)
                else:
                    self._keys[job] = self._key(job)
                if waits:
                    del self._ran[job]
            self._forget()
        return self._best()

    def _best(self) -> Iterator[Job]:
        ran = self._ran
        for _, job in merge(self._by_key(), self._order.items()):
            ran[job] = None
            yield job

    def iter_tier(self, tier: int, worst_first: bool = False) -> Iterator[Job]:
        jobs, running = self._tiers[tier], (entry for entry in self._by_key(worst_first) if entry[1].tier == tier)
        waiting = ((key, jobs[key]) for key in (reversed(jobs) if worst_first else jobs))
        return (job for _, job in merge(running, waiting, reverse=worst_first))

    def _by_key(self, worst_first: bool = False) -> Iterator[tuple[_Key, Job]]:
        """Those that run, by their keys as they are."""
        if not self._sorted:
            self._sorted = sorted((self._keys[job], job) for job in self._running)
        return reversed(self._sorted) if worst_first else iter(self._sorted)

    def rank(self, job: Job) -> _Key:
        return self._keys[job]

    def work_ahead(self, job: Job, now: float) -> float:
        """Everything better jobs have left; those in the same bucket count as half of it."""
        own = self._keys[job][0]
        bucket = _bucket(own)
        if not self._running_sums:
            self._running_sums = [0.0] * len(self._sums)
            for other in self._running:
                seconds = self._keys[other][0]
                self._running_sums[_bucket(seconds)] += seconds
        before = sum(self._sums[:bucket]) + sum(self._running_sums[:bucket])
        return before + max(0.0, self._sums[bucket] + self._running_sums[bucket] - own) / 2

    def backlog(self, now: float) -> float:
        return sum(self._sums) + sum(self._keys[job][0] for job in self._running)

    def __len__(self) -> int:
        return len(self._keys)

    def _remaining(self, job: Job) -> float:
        """Modelled solo seconds left. `known_output` is there: add saw to it."""
        prompt = len(job.prompt)
        # The token of an iteration is appended after its service is reported.
        emitted = max(len(job.output), job.served - prompt + 1)
        known = job.known_output or 0
        seconds = 0.0
        if job.served < prompt:
            seconds, emitted = job.next_seconds, max(emitted, 1)  # a prefill ends with the first token
        left = known - emitted
        if left > 0:
            # The decode that emits token k attends to prompt + k - 1 positions.
            first, last = prompt + emitted, prompt + known - 1
            seconds += left * (self._cost.decode_seconds(first) + self._cost.decode_seconds(last)) / 2
        return seconds

    def _forget(self) -> None:
        """Somebody runs, or does no longer, or for less time."""
        self._sorted, self._running_sums = [], []

    def _key(self, job: Job) -> _Key:
        return round(self._remaining(job), _DIGITS), job.index

    def _refresh(self, job: Job) -> None:
        if self._key(job) != self._keys[job]:
            running = job in self._running
            self._delete(job)
            self._insert(job, running=running)

    def _insert(self, job: Job, *, running: bool = False) -> None:
        key = self._keys[job] = self._key(job)
        if running:
            self._running[job] = None
            self._forget()
            return
        self._order[key] = job
        if job.tier is not None:
            self._tiers[job.tier][key] = job
        bucket = _bucket(key[0])
        self._sums[bucket] += key[0]
        self._counts[bucket] += 1

    def _delete(self, job: Job) -> None:
        key = self._keys.pop(job)
        if job in self._running:
            del self._running[job]
            self._forget()
            return
        del self._order[key]
        if job.tier is not None:
            self._tiers[job.tier].pop(key, None)
        bucket = _bucket(key[0])
        self._counts[bucket] -= 1
        # From an exact zero again when it can be, so that rounding does not pile up.
        self._sums[bucket] = self._sums[bucket] - key[0] if self._counts[bucket] else 0.0


def _bucket(seconds: float) -> int:
    """The bucket of that many remaining seconds."""
    if seconds <= 0:
        return 0
    return min(max(math.floor(math.log2(seconds) * _PER_OCTAVE), _LOWEST), _HIGHEST) - _LOWEST
