"""The multi-level feedback queue, plain and with skip-join (Wu et al., arXiv 2305.05920, section 4)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ..types import Job
from .base import Policy
from .queue import JobQueue

# A burst of jobs that arrived together starves together. Promoting a bounded number a decision keeps every decision
# quick; the others follow in the next ones, in order of their deadlines.
_PROMOTIONS_PER_DECISION: Final = 256

# Quanta are sums of floats: what is left after spending all of one may miss 0 by rounding.
_SPENT: Final = 1e-9


@dataclass(slots=True)
class _Place:
    level: int
    quantum: float  # what the job was given on entering the level; what is left of it is in the level's queue
    last_service: float  # or its arrival, for a job that has never run
    watched: bool = False  # whether the deadline heap has an entry for the job


class MultiLevelFeedbackQueue(Policy):
    """Levels 0 (highest) … num_levels - 1; quantum(i) = quantum · 2^i seconds of a job's own service.

    - Arrival: the first level whose quantum covers the job's next iteration, that is its whole prefill (skip-join), or
      level 0 (plain). The last level takes every job.
    - Service is charged at its modelled solo time. A job keeps its place in the level while it has quantum left. With
      none left it goes to the tail of the first level below whose quantum covers its *next* iteration, with a fresh
      quantum; from the last level it goes to the tail of the last level.
    - A job that has got no service for `starvation_limit` seconds, counted from its arrival when it never ran, goes to
      the tail of level 0 with a quantum that covers at least one iteration.
    """

    def __init__(self, *, quantum: float, num_levels: int, starvation_limit: float | None, skip_join: bool) -> None:
        self._quanta = [math.ldexp(quantum, level) for level in range(num_levels)]
        self._starvation_limit = starvation_limit
        self._skip_join = skip_join
        self._levels = [JobQueue() for _ in range(num_levels)]
        self._places: dict[Job, _Place] = {}
        # (deadline, index, job), at most one entry a job. An entry is a lower bound: service moves the true deadline
        # back without touching the heap, and the entry is put right when it surfaces.
        self._deadlines: list[tuple[float, int, Job]] = []

    def add(self, job: Job, now: float) -> None:
        level = self._first_fitting(0, job.next_seconds) if self._skip_join else 0
        self._places[job] = _Place(level, 0.0, job.arrival)
        self._enter(job, level, self._quanta[level])

    def remove(self, job: Job) -> None:
        self._levels[self._places.pop(job).level].remove(job)

    def on_service(self, job: Job, own_seconds: float, now: float) -> None:
        place = self._places[job]
        place.last_service = now
        queue = self._levels[place.level]
        left = queue.seconds(job) - own_seconds
        if left > _SPENT * place.quantum:
            queue.set_seconds(job, left)
        else:
            queue.remove(job)
            level = self._first_fitting(place.level + 1, job.next_seconds)
            self._enter(job, level, self._quanta[level])

    def next_deadline(self) -> float | None:
        return self._deadlines[0][0] if self._surface_deadline() else None

    def iter_best(self, now: float) -> Iterator[Job]:
        self._promote_starved(now)
        for queue in self._levels:
            yield from queue

    def rank(self, job: Job) -> tuple[int, int]:
        level = self._places[job].level
        return level, self._levels[level].ticket(job)

    def work_ahead(self, job: Job, now: float) -> float:
        """T_execute of the paper's ENST, times the batch size.

        Every job above spends a quantum in each level from its own down to the one above this job's, and the jobs ahead
        in the same level what they have left.
        """
        level = self._places[job].level
        above = sum(
            len(queue) * (self._quanta[level] - self._quanta[higher])  # = sum of quantum(higher … level - 1)
            for higher, queue in enumerate(self._levels[:level])
        )
        return above + self._levels[level].ahead(job)

    def level(self, job: Job) -> int:
        return self._places[job].level

    def __len__(self) -> int:
        return len(self._places)

    def _first_fitting(self, first: int, seconds: float) -> int:
        """The first level from `first` on whose quantum covers `seconds`; the last one if none does."""
        last = len(self._quanta) - 1
        for level in range(min(first, last), last):
            if self._quanta[level] >= seconds * (1 - _SPENT):
                return level
        return last

    def _enter(self, job: Job, level: int, quantum: float) -> None:
        place = self._places[job]
        place.level, place.quantum = level, quantum
        self._levels[level].append(job, quantum)
        if self._starvation_limit is not None and level > 0 and not place.watched:
            place.watched = True
            heapq.heappush(self._deadlines, (place.last_service + self._starvation_limit, job.index, job))

    def _promote_starved(self, now: float) -> None:
        for _ in range(_PROMOTIONS_PER_DECISION):
            if not self._surface_deadline() or self._deadlines[0][0] > now:
                return
            job = heapq.heappop(self._deadlines)[2]
            place = self._places[job]
            place.watched = False
            self._levels[place.level].remove(job)
            self._enter(job, 0, max(self._quanta[0], job.next_seconds))

    def _surface_deadline(self) -> bool:
        """Put the heap's first entry right, or drop it, until it is true; whether there is one."""
        limit = self._starvation_limit
        while self._deadlines and limit is not None:
            deadline, _, job = self._deadlines[0]
            place = self._places.get(job)
            if place is None:
                heapq.heappop(self._deadlines)
            elif place.last_service + limit > deadline:
                heapq.heapreplace(self._deadlines, (place.last_service + limit, job.index, job))
            else:
                return True
        return False
