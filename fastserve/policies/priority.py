"""A tenant's priorities before its policy: one policy a priority value."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from ..types import Job
from .base import Policy


class ByPriority(Policy):
    """Jobs of a lower `priority` value go first, whatever the policy says; among equals it decides, bounds included.

    It orders the jobs of one tenant only (see ByTenant): else whoever names the lowest value would be served first.

    A value's policy is made when its first job comes and dropped when its last leaves, but for the only one there is;
    `make` sees to it that what policies learn is shared.
    """

    def __init__(self, make: Callable[[], Policy]) -> None:
        self._make = make
        self._policies: dict[int, Policy] = {}
        self._priorities: list[int] = []  # ascending

    def add(self, job: Job, now: float) -> None:
        policy = self._policies.get(job.priority)
        if policy is not None:
            policy.add(job, now)
            return
        policy = self._make()
        policy.add(job, now)  # before anything changes: it may refuse
        if len(self._priorities) == 1 and not len(self._policies[self._priorities[0]]):
            del self._policies[self._priorities.pop()]
        self._policies[job.priority] = policy
        insort(self._priorities, job.priority)

    def remove(self, job: Job) -> None:
        policy = self._policies[job.priority]
        policy.remove(job)
        if len(self._priorities) > 1 and not len(policy):
            del self._policies[job.priority]
            self._priorities.remove(job.priority)

    def on_service(self, job: Job, seconds: float, now: float) -> None:
        self._policies[job.priority].on_service(job, seconds, now)

    def refresh(self, job: Job, now: float) -> None:
        self._policies[job.priority].refresh(job, now)

    def horizon(self, job: Job) -> float:
        return self._policies[job.priority].horizon(job)

    def settles(self) -> bool:
        return any(policy.settles() for policy in self._policies.values())

    def on_finish(self, job: Job, output_tokens: int, now: float) -> None:
        self._policies[job.priority].on_finish(job, output_tokens, now)

    def make_way(self) -> None:
        for policy in self._policies.values():
            policy.make_way()

    def close_order(self) -> None:
        for policy in self._policies.values():
            policy.close_order()

    def next_deadline(self) -> float | None:
        deadlines = (policy.next_deadline() for policy in self._policies.values())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def deadline(self, job: Job) -> float:
        return self._policies[job.priority].deadline(job)

    def move(self, job: Job, tier: int | None) -> None:
        self._policies[job.priority].move(job, tier)

    def iter_best(self, now: float) -> Iterator[Job]:
        for policy in self._policies.values():
            policy.share = self.share
        if len(self._priorities) == 1:
            return self._policies[self._priorities[0]].iter_best(now)
        self.close_order()
        self.make_way()
        return chain.from_iterable(self._policies[priority].iter_best(now) for priority in self._priorities)

    def iter_tier(self, tier: int, worst_first: bool = False) -> Iterator[Job]:
        priorities = reversed(self._priorities) if worst_first else self._priorities
        return chain.from_iterable(self._policies[priority].iter_tier(tier, worst_first) for priority in priorities)

    def rank(self, job: Job) -> tuple[float, ...]:
        return job.priority, *self._policies[job.priority].rank(job)

    def work_ahead(self, job: Job, now: float) -> float:
        before = (self._policies[priority].backlog(now) for priority in self._priorities if priority < job.priority)
        return sum(before) + self._policies[job.priority].work_ahead(job, now)

    def backlog(self, now: float) -> float:
        return sum(policy.backlog(now) for policy in self._policies.values())

    def quanta(self) -> Sequence[float]:
        # Those of jobs that have learned to do without levels and those that have not may live side by side.
        policies = self._policies.values() or (self._make(),)
        return max((policy.quanta() for policy in policies), key=len)

    def level(self, job: Job) -> int:
        return self._policies[job.priority].level(job)

    def __len__(self) -> int:
        return sum(map(len, self._policies.values()))
