"""An ordered queue of jobs that knows how many seconds lie ahead of each."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from ..types import Job

_FAN: Final = 6  # log2 of the children of a node of the tree of sums
_SPARSE: Final = 8  # tickets are handed out until they are this many times the jobs ...
_FEW: Final = 1024  # ... and these
_FEW_LEFT: Final = 16


class JobQueue:
    """First in, first out, with removal anywhere, the jobs of a tier in order, and sums of the seconds ahead.

    A job's place is a ticket, handed out in order. When the tickets run out, the jobs still here are renumbered from 0,
    which amortises to O(1) an append. Only memory pressure asks for sums, so what changes them is written down and
    worked in when one is asked for: many changes have undone each other by then.
    """

    def __init__(self) -> None:
        self._jobs: OrderedDict[Job, tuple[int, float]] = OrderedDict()  # job → (ticket, seconds)
        self._tiers = (_Tier(), _Tier())  # by Job.tier
        self._sums = _Sums()
        self._next_ticket = 0
        self._tickets = _FEW

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def __contains__(self, job: Job) -> bool:
        return job in self._jobs

    def move(self, job: Job, tier: int | None) -> None:
        """The job's KV is now in another tier, or gone."""
        ticket = self._jobs[job][0]
        if job.tier is not None:
            self._tiers[job.tier].discard(ticket)
        if tier is not None:
            self._tiers[tier].add(ticket, job)

    def tier(self, tier: int, last_first: bool = False) -> Iterator[Job]:
        """The jobs whose KV is in a tier, in order or against it."""
        return self._tiers[tier].jobs(last_first)

    def append(self, job: Job, seconds: float) -> None:
        """Put the job at the tail."""
        if self._next_ticket == self._tickets:
            self._renumber()
        ticket = self._next_ticket
        self._next_ticket = ticket + 1
        self._jobs[job] = (ticket, seconds)
        self._sums.changed[ticket] = seconds
        if job.tier is not None:
            self._tiers[job.tier].add(ticket, job)

    def remove(self, job: Job) -> None:
        ticket, _ = self._jobs.pop(job)
        if job.tier is not None:
            self._tiers[job.tier].discard(ticket)
        if self._jobs:
            self._sums.changed[ticket] = 0.0
        else:  # start from exact zeros, so that rounding does not pile up over a day
            self._sums, self._next_ticket, self._tickets = _Sums(), 0, _FEW

    def seconds(self, job: Job) -> float:
        return self._jobs[job][1]

    def set_seconds(self, job: Job, seconds: float) -> None:
        """Change what the job counts for; its place stays."""
        ticket = self._jobs[job][0]
        self._jobs[job] = (ticket, seconds)
        self._sums.changed[ticket] = seconds

    def ticket(self, job: Job) -> int:
        """Its place: larger than those of the jobs before it; good until the next append."""
        return self._jobs[job][0]

    def ahead(self, job: Job) -> float:
        """Sum of the seconds of the jobs before this one."""
        return self._sums.before(self._jobs[job][0])

    def total(self) -> float:
        """Sum of the seconds of all jobs."""
        return self._sums.before(self._next_ticket)

    def _renumber(self) -> None:
        self._sums, self._tiers = _Sums(), (_Tier(), _Tier())
        for ticket, (job, (_, seconds)) in enumerate(self._jobs.items()):
            self._jobs[job] = (ticket, seconds)
            self._sums.changed[ticket] = seconds
            if job.tier is not None:
                self._tiers[job.tier].add(ticket, job)
        self._next_ticket = len(self._jobs)
        self._tickets = _SPARSE * len(self._jobs) + _FEW


class _Tier:
    """Jobs in the order of their tickets.

    Most come with a ticket beyond the others', and leave from the front. One that does not moves those behind it: for
    the thousands of jobs that can hold KV at all, a microsecond.
    """

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._tickets: list[int] = []  # ascending; there may be some of jobs that left, never the first nor most

    def add(self, ticket: int, job: Job) -> None:
        tickets = self._tickets
        if not tickets or ticket > tickets[-1]:
            tickets.append(ticket)
        elif tickets[place := bisect_left(tickets, ticket)] != ticket:
            tickets.insert(place, ticket)
        self._jobs[ticket] = job
        if len(tickets) > 2 * len(self._jobs) + _FEW_LEFT:
            self._tickets = sorted(self._jobs)

    def discard(self, ticket: int) -> None:
        jobs, tickets = self._jobs, self._tickets
        if jobs.pop(ticket, None) is not None and ticket == tickets[0]:  # as most: what runs first leaves first
            gone = 1
            while gone < len(tickets) and tickets[gone] not in jobs:
                gone += 1
            del tickets[:gone]

    def jobs(self, last_first: bool) -> Iterator[Job]:
        if not self._jobs:
            return iter(())
        return filter(None, map(self._jobs.get, reversed(self._tickets) if last_first else self._tickets))


class _Sums:
    """Prefix sums over numbered values that change often: a tree of 2^_FAN children a node, caught up when asked."""

    def __init__(self) -> None:
        self.changed: dict[int, float] = {}  # new values that the tree does not have
        self._levels: tuple[list[float], ...] = ([], [], [])  # values, sums of 2^_FAN of them, sums of those

    def before(self, number: int) -> float:
        """Sum of the values 0 … number - 1."""
        if self.changed:
            self._catch_up()
        total, end = 0.0, number
        for sums in self._levels:
            start = end >> _FAN << _FAN if sums is not self._levels[-1] else 0
            total += sum(sums[start:end])
            end >>= _FAN
        return total

    def _catch_up(self) -> None:
        values, sums, sums_of_sums = self._levels
        last = max(self.changed)
        for shift, level in enumerate(self._levels):
            level.extend([0.0] * ((last >> _FAN * shift) + 1 - len(level)))
        for number, value in self.changed.items():
            change = value - values[number]
            values[number] = value
            sums[number >> _FAN] += change
            sums_of_sums[number >> 2 * _FAN] += change
        self.changed.clear()
