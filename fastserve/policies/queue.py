"""An ordered queue of jobs that knows how many seconds lie ahead of each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from sortedcontainers import SortedDict

from ..types import Job

_SMALLEST = 64


class JobQueue:
    """First in, first out, with removal anywhere and prefix sums of the jobs' seconds, each in O(log n).

    A job's place is a ticket, handed out in order. A Fenwick tree over the tickets holds the sums; when the tickets run
    out, the jobs still here are renumbered from 1, which amortises to O(1) an append.
    """

    def __init__(self) -> None:
        self._jobs: OrderedDict[Job, tuple[int, float]] = OrderedDict()  # job → (ticket, seconds)
        self._tiers: tuple[SortedDict, SortedDict] = (SortedDict(), SortedDict())  # ticket → job, by Job.tier
        self._tree = [0.0] * (_SMALLEST + 1)
        self._last_ticket = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def move(self, job: Job, tier: int | None) -> None:
        """The job's KV is now in another tier, or gone."""
        ticket = self._jobs[job][0]
        if job.tier is not None:
            self._tiers[job.tier].pop(ticket, None)
        if tier is not None:
            self._tiers[tier][ticket] = job

    def tier(self, tier: int, last_first: bool = False) -> Iterator[Job]:
        """The jobs whose KV is in a tier, in order or against it."""
        jobs = self._tiers[tier]
        return map(jobs.__getitem__, reversed(jobs) if last_first else jobs)

    def __contains__(self, job: Job) -> bool:
        return job in self._jobs

    def append(self, job: Job, seconds: float) -> None:
        """Put the job at the tail."""
        if self._last_ticket == len(self._tree) - 1:
            self._renumber()
        self._last_ticket += 1
        self._jobs[job] = (self._last_ticket, seconds)
        self._add(self._last_ticket, seconds)
        if job.tier is not None:
            self._tiers[job.tier][self._last_ticket] = job

    def remove(self, job: Job) -> None:
        ticket, seconds = self._jobs.pop(job)
        if job.tier is not None:
            del self._tiers[job.tier][ticket]
        if self._jobs:
            self._add(ticket, -seconds)
        else:  # start from exact zeros, so that rounding does not pile up over a day
            self._tree, self._last_ticket = [0.0] * (_SMALLEST + 1), 0

    def seconds(self, job: Job) -> float:
        return self._jobs[job][1]

    def set_seconds(self, job: Job, seconds: float) -> None:
        """Change what the job counts for; its place stays."""
        ticket, before = self._jobs[job]
        self._jobs[job] = (ticket, seconds)
        self._add(ticket, seconds - before)

    def ticket(self, job: Job) -> int:
        """Its place: larger than those of the jobs before it; good until the next append."""
        return self._jobs[job][0]

    def ahead(self, job: Job) -> float:
        """Sum of the seconds of the jobs before this one."""
        return self._before(self._jobs[job][0])

    def total(self) -> float:
        """Sum of the seconds of all jobs."""
        return self._before(self._last_ticket + 1)

    def _before(self, ticket: int) -> float:
        tree, ticket, total = self._tree, ticket - 1, 0.0
        while ticket > 0:
            total += tree[ticket]
            ticket &= ticket - 1
        return total

    def _add(self, ticket: int, seconds: float) -> None:
        tree, size = self._tree, len(self._tree)
        while ticket < size:
            tree[ticket] += seconds
            ticket += ticket & -ticket

    def _renumber(self) -> None:
        size = _SMALLEST
        while size < 2 * (len(self._jobs) + 1):
            size *= 2
        self._tree = tree = [0.0] * (size + 1)
        self._last_ticket = len(self._jobs)
        for ticket, (job, (_, seconds)) in enumerate(list(self._jobs.items()), start=1):
            self._jobs[job] = (ticket, seconds)
            tree[ticket] = seconds
        for jobs in self._tiers:
            renumbered = [(self._jobs[job][0], job) for job in jobs.values()]
            jobs.clear()
            jobs.update(renumbered)
        for ticket in range(1, size + 1):  # every node passes its sum to its parent: O(n)
            parent = ticket + (ticket & -ticket)
            if parent <= size:
                tree[parent] += tree[ticket]
