"""A tenant's priorities before its policy: one policy a priority value."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from ..types import Job
from .base import Policy


@dataclass(slots=True, eq=False)
class _Value:
    """What has one priority."""

    priority: int
    policy: Policy
    made_way: int  # up to which of the calls of make_way its policy was told


class ByPriority(Policy):
    """Jobs of a lower `priority` value go first, whatever the policy says; among equals it decides, bounds included.

    It orders the jobs of one tenant only (see ByTenant): else whoever names the lowest value would be served first.

    A value's policy is made when its first job comes and dropped when its last leaves, but for the only one there is;
    `make` sees to it that what policies learn is shared.

    However many values there are, an order asks those policies only whose jobs are looked at, and only their deadlines
    count: whoever of the others goes first among its equals comes after those.
    """

    def __init__(self, make: Callable[[], Policy]) -> None:
        self._make = make
        self._values: dict[int, _Value] = {}
        self._priorities: list[int] = []  # ascending
        self._backlogs: list[float] = []  # theirs, but for those that are stale
        self._before: list[float] = []  # what is ahead of each, and all of it; empty: to be summed
        self._stale: set[int] = set()  # whose backlog may have changed
        self._holding: tuple[dict[int, int], dict[int, int]] = ({}, {})  # by tier: priority → jobs in it
        self._jobs = 0
        self._opened: dict[int, _Value] = {}  # for the latest order, as far as it was looked at
        self._latest: Policy | None = None  # to which a job came
        self._ways = 0  # calls of make_way: each policy is told before the next of its own orders

    # --- events ------------------------------------------------------------------------------------------------------

    def add(self, job: Job, now: float) -> None:
        priority = job.priority
        value = self._values.get(priority)
        if value is not None:
            value.policy.add(job, now)
        else:
            value = _Value(priority, self._make(), self._ways)
            value.policy.add(job, now)  # before anything changes: it may refuse
            if self._values and not self._jobs:
                self._drop(self._priorities[0])
            place = bisect_left(self._priorities, priority)
            self._priorities.insert(place, priority)
            self._backlogs.insert(place, 0.0)
            self._values[priority] = value
        self._latest = value.policy
        self._jobs += 1
        if job.tier is not None:
            self._hold(priority, job.tier, 1)
        self._stale.add(priority)

    def remove(self, job: Job) -> None:
        priority = job.priority
        policy = self._values[priority].policy
        policy.remove(job)
        self._jobs -= 1
        if job.tier is not None:
            self._hold(priority, job.tier, -1)
        if len(self._priorities) > 1 and not len(policy):
            self._drop(priority)
        else:
            self._stale.add(priority)

    def on_service(self, job: Job, seconds: float, now: float) -> None:
        policy = self._values[job.priority].policy
        policy.share = self.share  # it may run for an order that is over
        policy.on_service(job, seconds, now)
        self._stale.add(job.priority)

    def refresh(self, job: Job, now: float) -> None:
        self._values[job.priority].policy.refresh(job, now)
        self._stale.add(job.priority)

    def on_finish(self, job: Job, output_tokens: int, now: float) -> None:
        self._values[job.priority].policy.on_finish(job, output_tokens, now)

    def make_way(self) -> None:
        self._ways += 1

    def close_order(self) -> None:
        for value in self._opened.values():
            value.policy.close_order()
        self._opened.clear()

    def move(self, job: Job, tier: int | None) -> None:
        self._values[job.priority].policy.move(job, tier)
        if job.tier is not None:
            self._hold(job.priority, job.tier, -1)
        if tier is not None:
            self._hold(job.priority, tier, 1)

    # --- answers -----------------------------------------------------------------------------------------------------

    def settles(self) -> bool:
        return self._latest is not None and self._latest.settles()

    def horizon(self, job: Job) -> float:
        return self._values[job.priority].policy.horizon(job)

    def next_deadline(self) -> float | None:
        values = self._values if len(self._values) == 1 else self._opened
        deadlines = (value.policy.next_deadline() for value in values.values())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def deadline(self, job: Job) -> float:
        return self._values[job.priority].policy.deadline(job)

    def iter_best(self, now: float) -> Iterator[Job]:
        self.close_order()
        if len(self._priorities) == 1:
            return self._open(self._priorities[0], now)
        self.make_way()
        return chain.from_iterable(self._open(priority, now) for priority in self._priorities)

    def _open(self, priority: int, now: float) -> Iterator[Job]:
        value = self._opened[priority] = self._values[priority]
        value.policy.share = self.share
        if value.made_way < self._ways:
            value.made_way = self._ways
            value.policy.make_way()
        self._stale.add(priority)  # jobs are promoted, and keys looked at anew
        return value.policy.iter_best(now)

    def iter_tier(self, tier: int, worst_first: bool = False) -> Iterator[Job]:
        priorities = sorted(self._holding[tier], reverse=worst_first)
        return chain.from_iterable(self._values[each].policy.iter_tier(tier, worst_first) for each in priorities)

    def rank(self, job: Job) -> tuple[float, ...]:
        return job.priority, *self._values[job.priority].policy.rank(job)

    def work_ahead(self, job: Job, now: float) -> float:
        self._catch_up(now)
        if not self._before:
            self._before = list(accumulate(self._backlogs, initial=0.0))
        before = self._before[bisect_left(self._priorities, job.priority)]
        return before + self._values[job.priority].policy.work_ahead(job, now)

    def backlog(self, now: float) -> float:
        self._catch_up(now)
        return self._before[-1] if self._before else sum(self._backlogs)

    def quanta(self) -> Sequence[float]:
        # Those of jobs that have learned to do without levels and those that have not may live side by side.
        policies = (value.policy for value in self._values.values()) if self._values else iter((self._make(),))
        return next((quanta for policy in policies if (quanta := policy.quanta())), ())

    def level(self, job: Job) -> int:
        return self._values[job.priority].policy.level(job)

    def __len__(self) -> int:
        return self._jobs

    # --- inside ------------------------------------------------------------------------------------------------------

    def _catch_up(self, now: float) -> None:
        """Look at the backlogs that may have changed. Sums are made of all of them, as floats lose by differences."""
        if not self._stale:
            return
        for priority in self._stale:
            place = bisect_left(self._priorities, priority)
            self._backlogs[place] = self._values[priority].policy.backlog(now)
        self._stale.clear()
        self._before.clear()

    def _drop(self, priority: int) -> None:
        """Nothing has the priority any more."""
        place = bisect_left(self._priorities, priority)
        del self._priorities[place], self._backlogs[place]
        value = self._values.pop(priority)
        self._opened.pop(priority, None)
        self._stale.discard(priority)
        self._before.clear()
        if self._latest is value.policy:
            self._latest = None

    def _hold(self, priority: int, tier: int, more: int) -> None:
        holding = self._holding[tier]
        jobs = holding.get(priority, 0) + more
        if jobs:
            holding[priority] = jobs
        else:
            del holding[priority]
