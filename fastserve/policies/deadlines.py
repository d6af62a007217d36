"""How long a job may wait before it goes to the front, whatever the policy thinks of it."""

from __future__ import annotations

import heapq
import math
from typing import Final

from ..types import Job

# A burst of jobs that arrived together is overdue together. Promoting a bounded number a decision keeps every decision
# quick; the others follow in the next ones, in order of their deadlines.
_PROMOTIONS_PER_DECISION: Final = 256

# Entries of jobs that are gone are dropped when they surface, or all at once when they are most of the heap.
_FEW_ENTRIES: Final = 64


class Deadlines:
    """The jobs that may wait, by the time at which each has waited enough: a heap, never a scan.

    A job is overdue when it has been waiting, since it arrived or last ran, for `starvation_limit` seconds, or when all
    its waits together exceed `slowdown_limit` times its own service, its next iteration included (so that one that
    never ran may wait that many times its prefill). A running job is never overdue.

    Who is promoted late, because many were overdue at once, is not overdue again as soon as it stops running: the
    waiting it had in excess is excused, and it waits `slowdown_limit` times what its promotion gave it before the
    next. That keeps an overload from promoting every job at every decision; they take turns instead.

    A policy may bound what promoted jobs take to a `share` of the device's time: then they are promoted one by one, the
    longest overdue first, each when what those before it took (see `charge`) makes up no more than that since. Nothing
    is saved up while nobody is overdue, and nothing is owed once all have left: whoever comes then may be others.

    A heap entry is a lower bound: a job's service and the end of its waits move its deadline back, never forward,
    without touching the heap, and the entry is put right when it surfaces. What moves it forward is told (`sooner`) and
    gets another entry.
    """

    def __init__(
        self,
        *,
        starvation_limit: float | None,
        slowdown_limit: float | None,
        quantum: float,
        share: float | None = None,
    ) -> None:
        """`quantum`: seconds of own service that no job that runs gets less of; `share`: None is no bound."""
        self._starvation = math.inf if starvation_limit is None else starvation_limit
        self._slowdown = math.inf if slowdown_limit is None else slowdown_limit
        self._least = self._slowdown * quantum  # what a run adds to a job's slack
        self._enabled = min(self._starvation, self._slowdown) < math.inf
        self._heap: list[tuple[float, int, Job]] = []  # (no later than the deadline, index, job), one a watched job
        self._watched: set[Job] = set()
        self._promoted: dict[Job, float] = {}  # own seconds at the promotion, of jobs at the front
        self._excused: dict[Job, float] = {}  # seconds of waiting that do not count any more
        self._now = -math.inf  # the latest time heard of
        self._share = share
        self._paid = -math.inf  # when what promoted jobs took will be no more than their share

    def watch(self, job: Job, now: float) -> None:
        """The job is not, or no longer, at the front. No effect on one that is watched already."""
        if not self._enabled or job in self._watched:
            return
        self._now = max(self._now, now)
        self._watched.add(job)
        own = self._promoted.pop(job, None)
        if own is not None and self._slowdown < math.inf and (late := job.waited - self._slowdown * own) > 0:
            self._excused[job] = max(late, self._excused.get(job, 0.0))
        heapq.heappush(self._heap, (self._bound(job), job.index, job))

    def forget(self, job: Job) -> None:
        """The job left."""
        if not self._enabled:
            return
        self._watched.discard(job)
        self._promoted.pop(job, None)
        self._excused.pop(job, None)
        if not (self._watched or self._promoted):
            self._paid = -math.inf
        self._prune()

    def sooner(self, job: Job) -> None:
        """The job's next iteration takes less than it did, and so it may be overdue earlier."""
        if job in self._watched:
            heapq.heappush(self._heap, (self._bound(job), job.index, job))
            self._prune()

    def pop_due(self, now: float) -> list[Job]:
        """The jobs to promote now, a bounded number, the longest overdue first; they are watched no longer.

        With a share, at most one, to be charged for before the next.
        """
        due: list[Job] = []
        self._now = max(self._now, now)
        most = _PROMOTIONS_PER_DECISION if self._share is None else int(self._paid <= now)
        while self._surface() and self._heap[0][0] <= now and len(due) < most:
            job = heapq.heappop(self._heap)[2]
            self._watched.remove(job)
            self._promoted[job] = job.attained + job.next_seconds
            due.append(job)
        return due

    def charge(self, seconds: float) -> None:
        """Promoted jobs take that much of the device's time."""
        if self._share is not None:
            self._paid = max(self._paid, self._now) + seconds / self._share

    def next(self) -> float | None:
        """No later than the next promotion of any job; None: there is none."""
        return max(self._heap[0][0], self._paid) if self._surface() else None

    def of(self, job: Job) -> float:
        """When the job is promoted if it goes on waiting, or if it is left out from now on; infinity at the front.

        O(1). Where promotions run late, it is taken to be promoted as late as the next one is.
        """
        if job not in self._watched:
            return math.inf
        return self._bound(job) + max(0.0, self._paid - self._heap[0][0])

    def _prune(self) -> None:
        if len(self._heap) > 2 * len(self._watched) + _FEW_ENTRIES:
            self._heap = [(self._bound(job), job.index, job) for job in self._watched]
            heapq.heapify(self._heap)

    def _surface(self) -> bool:
        """Put the first entry right, or drop it, until it is true; whether there is one."""
        while self._heap:
            entry, _, job = self._heap[0]
            if job not in self._watched:
                heapq.heappop(self._heap)
            elif (bound := self._bound(job)) > entry:
                heapq.heapreplace(self._heap, (bound, job.index, job))
            else:
                return True
        return False

    def _bound(self, job: Job) -> float:
        """The deadline of a waiting job; of a running one, the earliest it can have."""
        slack = math.inf
        if self._slowdown < math.inf:
            slack = self._slowdown * (job.attained + job.next_seconds) - job.waited + self._excused.get(job, 0.0)
        if job.waiting_since is not None:
            return job.waiting_since + min(self._starvation, max(slack, 0.0))
        # A row of it is under way: at its end the slack is larger. (Not after a part of a prompt: then the promotion
        # comes late by this much.)
        return self._now + min(self._starvation, max(slack, self._least))
