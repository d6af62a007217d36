"""The multi-level feedback queue, plain and with skip-join (Wu et al., arXiv 2305.05920, section 4)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from ..types import Job
from .base import Policy, charge_ahead
from .deadlines import Deadlines
from .queue import JobQueue

# Quanta are sums of floats: what is left after spending all of one may miss 0 by rounding.
SPENT: Final = 1e-9

# First quanta for a job promoted for its slowdown: it will soon be overdue again, and fewer tokens at a turn would have
# the batch change all the time. One promoted for starvation gets the paper's single one.
PROMOTED_QUANTA: Final = 8

# In place of each level's queue until there is a job for it: most of many small policies' levels never have one.
_EMPTY: Final = JobQueue()


@dataclass(slots=True)
class _Place:
    level: int
    quantum: float  # what the job was given on entering the level; what is left of it is in the level's queue


class MultiLevelFeedbackQueue(Policy):
    """Levels 0 (highest) … num_levels - 1; quantum(i) = quantum · 2^i seconds of what a job is charged.

    - Arrival: the first level whose quantum covers the job's next iteration, that is its whole prefill (skip-join), or
      level 0 (plain). The last level takes every job. What a job was served elsewhere before, and what earlier calls of
      its program were, counts as if it had spent that here: then it joins the level in which it would be by now.
    - Where the cache has some of a prompt, what is left of it says where the job joins, but its first quantum is that
      of the level in which it would join by its whole prompt: who comes first by a short prefill would otherwise be
      told to give way at once, again and again, with as much KV to be kept as anybody.
    - A job that waits and was never served moves up when less of its prefill is left to compute than when it joined;
      if it is more, its quantum will not last.
    - Charged is what service takes from the others of a full batch (see Charges): by its solo time, as in the paper, a
      decode would seem to be as much as a prefill that holds up everybody for as long. A job keeps its place in the
      level while it has quantum left. With none left it goes to the tail of the first level below whose quantum covers
      its *next* iteration, with a fresh quantum; from the last level it goes to the tail of the last level.
    - A job below level 0 that has waited too long (see Deadlines) goes to the tail of level 0 with a quantum that
      covers at least one iteration, and several where slowdowns are bounded.
    """

    def __init__(
        self,
        *,
        quantum: float,
        shared: float = 0.0,
        num_levels: int,
        starvation_limit: float | None,
        slowdown_limit: float | None = None,
        skip_join: bool,
        prefill: Callable[[int], float] | None = None,
    ) -> None:
        """`quantum`: what a decode is charged. `shared`: the rest of its solo seconds, which the others pay.

        `prefill`: the solo seconds of a prompt of so many tokens; without it, nothing is known to be in the cache.
        """
        self._shared = shared
        self._prefill = prefill
        self._quanta = [math.ldexp(quantum, level) for level in range(num_levels)]
        self._skip_join = skip_join
        self._solo = (quantum + shared) / quantum  # solo seconds of decodes that are charged one
        self._levels = [_EMPTY] * num_levels
        self._places: dict[Job, _Place] = {}
        self._work_above: dict[int, float] = {}  # by level; forgotten when a job changes its level
        self._deadlines = Deadlines(
            starvation_limit=starvation_limit, slowdown_limit=slowdown_limit, quantum=quantum + shared
        )  # of the jobs below level 0
        self._promoted_quantum = quantum if slowdown_limit is None else PROMOTED_QUANTA * quantum

    def add(self, job: Job, now: float) -> None:
        level, spent = self._joins(job)
        self._places[job] = _Place(level, self._quanta[level])
        self._join(job, level, spent, now)

    def refresh(self, job: Job, now: float) -> None:
        place = self._places[job]
        level, spent = self._joins(job)
        if level < place.level:
            self._levels[place.level].remove(job)
            if level == 0:
                self._deadlines.forget(job)
            self._join(job, level, spent, now)
        self._deadlines.sooner(job)

    def remove(self, job: Job) -> None:
        self._levels[self._places.pop(job).level].remove(job)
        self._work_above.clear()
        self._deadlines.forget(job)

    def on_service(self, job: Job, seconds: float, now: float) -> None:
        place = self._places[job]
        queue = self._levels[place.level]
        left = queue.seconds(job) - seconds
        if left > SPENT * place.quantum:
            queue.set_seconds(job, left)
        else:
            queue.remove(job)
            level = self._first_fitting(place.level + 1, charge_ahead(job, self._shared))
            self._enter(job, level, self._quanta[level], now)

    def horizon(self, job: Job) -> float:
        place = self._places[job]
        left = self._levels[place.level].seconds(job) - SPENT * place.quantum
        ahead = charge_ahead(job, self._shared)
        return left * job.next_seconds / ahead if ahead > 0.0 else 0.0  # not above 0: its prefill is yet to be told

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def deadline(self, job: Job) -> float:
        return self._deadlines.of(job)

    def move(self, job: Job, tier: int | None) -> None:
        self._levels[self._places[job].level].move(job, tier)

    def iter_best(self, now: float) -> Iterator[Job]:
        for job in self._deadlines.pop_due(now):
            self._levels[self._places[job].level].remove(job)
            self._enter(job, 0, max(self._promoted_quantum, charge_ahead(job, self._shared)), now)
        return chain.from_iterable(self._levels)

    def iter_tier(self, tier: int, worst_first: bool = False) -> Iterator[Job]:
        levels = reversed(self._levels) if worst_first else self._levels
        return chain.from_iterable(level.tier(tier, worst_first) for level in levels)

    def rank(self, job: Job) -> tuple[int, int]:
        level = self._places[job].level
        return level, self._levels[level].ticket(job)

    def work_ahead(self, job: Job, now: float) -> float:
        """T_execute of the paper's ENST, times the batch size.

        Every job above spends a quantum in each level from its own down to the one above this job's, and the jobs ahead
        in the same level what they have left.
        """
        level = self._places[job].level
        return self._solo * (self._above(level) + self._levels[level].ahead(job))

    def backlog(self, now: float) -> float:
        last = len(self._levels) - 1
        return self._solo * (self._above(last) + self._levels[last].total())

    def quanta(self) -> Sequence[float]:
        return [self._solo * quantum for quantum in self._quanta]

    def level(self, job: Job) -> int:
        return self._places[job].level

    def __len__(self) -> int:
        return len(self._places)

    def _above(self, level: int) -> float:
        """Seconds that the jobs in the levels above spend until they are down here. Asked for job after job."""
        work = self._work_above.get(level)
        if work is None:
            work = self._work_above[level] = sum(
                len(queue) * (self._quanta[level] - self._quanta[higher])  # = sum of quantum(higher … level - 1)
                for higher, queue in enumerate(self._levels[:level])
            )
        return work

    def _first_fitting(self, first: int, seconds: float) -> int:
        """The first level from `first` on whose quantum covers `seconds`; the last one if none does."""
        last = len(self._quanta) - 1
        return bisect_left(self._quanta, seconds * (1 - SPENT), min(first, last), last)

    def _joins(self, job: Job) -> tuple[int, float]:
        """The level in which a job belongs that comes now, and what it has spent there."""
        level = self._first_fitting(0, charge_ahead(job, self._shared)) if self._skip_join else 0
        spent, last = job.inherited + job.charged, len(self._quanta) - 1
        while level < last and spent >= self._quanta[level] * (1 - SPENT):
            spent -= self._quanta[level]
            level += 1
        return level, spent

    def _join(self, job: Job, level: int, spent: float, now: float) -> None:
        quantum = self._quanta[level]
        if self._skip_join and self._prefill is not None and job.cached:
            whole = self._prefill(len(job.prompt)) - self._shared
            quantum = max(quantum, self._quanta[self._first_fitting(0, whole)])
        self._enter(job, level, quantum, now)
        if spent > 0:
            self._levels[level].set_seconds(job, quantum - spent % quantum)

    def _enter(self, job: Job, level: int, quantum: float, now: float) -> None:
        place = self._places[job]
        place.level, place.quantum = level, quantum
        if self._levels[level] is _EMPTY:
            self._levels[level] = JobQueue()
        self._levels[level].append(job, quantum)
        self._work_above.clear()
        if level > 0:
            self._deadlines.watch(job, now)
