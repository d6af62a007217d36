"""How far completion times are from what hindsight could have made of them: regret against preemptive SRPT.

Of the jobs that ended lately it is known how long iterations worked on each. SRPT (shortest remaining processing time
first) with that knowledge, with as many slots as the engine has rows and with preemption for free is simulated on them,
and regret is the mean completion time that they had over the mean that they would have had then: 1 is as good as it.

It is a yardstick, not a bound. A job's seconds are taken as they were, with as many neighbours as it had, so a batch
that would have been emptier is not made faster; jobs that have not ended yet took time, too, and are not in it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Final, NamedTuple

from ..types import JobMetrics

WINDOW: Final = 300.0  # seconds in which an ended job counts
_MOST: Final = 2000  # jobs, the latest: they take some milliseconds
_FRESH: Final = 5.0  # seconds for which an answer is good


class Ended(NamedTuple):
    """A job that is over. Seconds, on one clock."""

    arrival: float
    finish: float
    needed: float  # in iterations that worked on it


class Regret:
    """Fed with every job that ended and asked now and then. Belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: the one that jobs' metrics are on."""
        self._clock = clock
        self._ended: deque[Ended] = deque(maxlen=_MOST)
        self._answer: float | None = None
        self._asked = float("-inf")

    def ended(self, metrics: JobMetrics) -> None:
        """A job that ended by itself."""
        if metrics.finish is not None:
            needed = metrics.prefill_seconds + metrics.decode_seconds
            self._ended.append(Ended(metrics.arrival, metrics.finish, needed))

    def value(self, slots: int) -> float | None:
        """Of the jobs that ended in the window; None where there are none. O(n log n), once in some seconds."""
        now = self._clock()
        if now - self._asked >= _FRESH:
            lately = [job for job in self._ended if job.finish >= now - WINDOW]
            self._answer = regret(lately, slots)
            self._asked = now
        return self._answer


def regret(jobs: Sequence[Ended], slots: int) -> float | None:
    """Mean completion time over that under SRPT; None where nothing took time."""
    best = sum(srpt([(job.arrival, job.needed) for job in jobs], slots))
    return sum(job.finish - job.arrival for job in jobs) / best if best > 0.0 else None


def srpt(jobs: Sequence[tuple[float, float]], slots: int) -> list[float]:
    """Completion times, from arrival, of jobs (arrival, seconds needed) under preemptive SRPT, in the order given.

    At every moment the `slots` jobs with the least left to do run, each as fast as alone; ties go to who runs, then to
    who came first. O(n log n): an arrival preempts one job at most.
    """
    times = [0.0] * len(jobs)
    # Those that run, by the time at which they will end: the first to, and the last to, which is the one to preempt.
    # An entry of either heap is void when its job does not run with that end any more.
    ends: dict[int, float] = {}
    soonest: list[tuple[float, int]] = []
    latest: list[tuple[float, int]] = []
    waiting: list[tuple[float, int]] = []  # what each has left

    def start(job: int, end: float) -> None:
        ends[job] = end
        heappush(soonest, (end, job))
        heappush(latest, (-end, job))

    def finish_until(now: float) -> None:
        """Let the jobs end that do by then, and others take their slots."""
        while soonest and soonest[0][0] <= now:
            end, job = heappop(soonest)
            if ends.get(job) != end:
                continue
            del ends[job]
            times[job] = end - jobs[job][0]
            if waiting:
                left, other = heappop(waiting)
                start(other, end + left)

    for job in sorted(range(len(jobs)), key=lambda job: jobs[job][0]):
        now, needed = jobs[job]
        finish_until(now)
        if len(ends) < slots:
            start(job, now + needed)
            continue
        while ends.get(latest[0][1]) != -latest[0][0]:
            heappop(latest)
        end, last = -latest[0][0], latest[0][1]
        if now + needed < end:
            heappop(latest)
            del ends[last]
            heappush(waiting, (end - now, last))
            start(job, now + needed)
        else:
            heappush(waiting, (needed, job))
    finish_until(float("inf"))
    return times
