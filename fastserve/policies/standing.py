"""How tenants stand: what each was served, by its weight, and whether that is beyond its share."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from sortedcontainers import SortedDict, SortedList

from .average import Average
from .base import Policy

# A tenant is small while it has jobs for no more batches than this, and while it has no more of them than its rows, or
# less than so many times what is usual, by weight. The times are for who keeps a few batches of jobs beside others that
# have one or two; fewer, and tenants of equal loads would hold each other up in ordinary bursts.
_FEW_BATCHES: Final = 4
_MANY_TIMES: Final = 8

# Slices by which a tenant may be ahead of the average, as ordinary bursts have it, and within its share; and by which
# it can be at most ahead of the average, or behind others.
_BURST: Final = 4
_MOST_APART: Final = 64


@dataclass(slots=True, eq=False)
class Tenant:
    name: str
    weight: float
    number: int  # breaks ties
    policy: Policy
    service: float = 0.0  # seconds that its jobs were served, by its weight, and what it was lifted by
    counter: float = 0.0  # the same seconds, beside the average
    slices: int = 0  # whole ones of its service, as of late: by these tenants are compared
    size: float = 0.0  # its jobs, by its weight, as of late
    small: bool = False  # as of late
    beyond: bool = False  # as of late
    returns: bool = False  # it is known when it may not be
    held: list[int] = field(default_factory=lambda: [0, 0])  # jobs with KV, by Job.tier
    backlog: float = 0.0  # as of late


class Standing:
    """The tenants that have jobs, in the order of their service.

    A tenant that has many jobs is beyond its share once it was served more than tenants are on average. So whoever has
    little to ask is never beyond, whatever others do, and whoever asks for all there is gets no less than the others.
    All is in slices, so that nobody's standing changes at every token.
    """

    def __init__(self, slice_: float, rows: float) -> None:
        """`slice_`: seconds; `rows`: of a batch that they have to share."""
        self.slice = slice_
        self.rows = rows
        self.smalls = 0  # how many are small
        self.average = Average(_MOST_APART * slice_)
        self._sizes: SortedList = SortedList()  # of all tenants
        self._order: SortedDict = SortedDict()  # (beyond, slices, number) → tenant
        self._returning: list[tuple[float, int, Tenant]] = []  # heap: when each that is beyond its share may not be

    def __len__(self) -> int:
        return len(self._order)

    def enter(self, tenant: Tenant) -> None:
        """It has jobs."""
        tenant.counter = max(tenant.counter, self.average.seconds)  # nobody saves up
        self.average.wakes(tenant.name, tenant.weight)
        tenant.size = len(tenant.policy) / tenant.weight
        self._sizes.add(tenant.size)
        self.place(tenant)

    def leave(self, tenant: Tenant) -> None:
        """It has none any more."""
        self.displace(tenant)
        self.smalls -= tenant.small
        self._sizes.remove(tenant.size)
        self.average.rests(tenant.name, tenant.weight)

    def serve(self, tenant: Tenant, seconds: float) -> None:
        """Its jobs were served."""
        tenant.service += seconds / tenant.weight
        tenant.counter = self.average.serve(tenant.counter, seconds, tenant.weight)
        if tenant.service >= (tenant.slices + 1) * self.slice:
            self.displace(tenant)
            self.place(tenant)

    def lift(self, waking: Sequence[Tenant], opened: Sequence[Tenant], waiting: Sequence[Tenant]) -> None:
        """Some have jobs, or more of them, and nobody has saved up what it did not ask for.

        waking   had no jobs when the latest order was made: they have been served as much as those that wait, at least
        opened   all that had rows then: they have been served not much less
        waiting  of whose jobs some had none. Where nobody waits, everybody has what it asks for and nobody is owed
                 anything: then what whoever has been served most was served counts

        That is the lift of VTC, which is of who has nothing waiting to the least of those that have. Start-time fair
        queueing has all jobs of a burst go behind what others have begun, so that whoever asks for little waits. So who
        had jobs all the time keeps what an ordinary burst takes, in seconds, whatever its weight.
        """
        for tenant in waking:
            self.displace(tenant)
        if waiting:
            level = min(tenant.service for tenant in waiting)
        else:
            level = max(tenant.service for tenant in (self._most() or waking))
        for tenant in waking:
            tenant.service = max(tenant.service, level)
            self.place(tenant)
        for tenant in opened:
            least = level - _MOST_APART * self.slice / tenant.weight
            if tenant.service < least:
                self.displace(tenant)
                tenant.service = least
                self.place(tenant)

    def look(self, tenant: Tenant) -> None:
        """It has another job, or one less."""
        self._sizes.remove(tenant.size)
        tenant.size = len(tenant.policy) / tenant.weight
        self._sizes.add(tenant.size)
        if self._is_beyond(tenant) != tenant.beyond:
            self.displace(tenant)
            self.place(tenant)

    def displace(self, tenant: Tenant) -> None:
        """Take it out of the order: what it was served is about to change."""
        del self._order[tenant.beyond, tenant.slices, tenant.number]

    def place(self, tenant: Tenant) -> None:
        """Put it where it belongs."""
        tenant.slices = math.floor(tenant.service / self.slice)
        beyond = self._is_beyond(tenant)
        if beyond and not tenant.beyond and not tenant.returns:
            tenant.returns = True
            returns = tenant.counter - _BURST * self.slice / tenant.weight
            heapq.heappush(self._returning, (returns, tenant.number, tenant))
        tenant.beyond = beyond
        self._order[beyond, tenant.slices, tenant.number] = tenant

    def pass_time(self, now: float) -> None:
        """Tenants that rest do not count for ever; those that others have caught up with are beyond no longer."""
        self.average.forget(now)
        due: list[Tenant] = []
        while self._returning and self._returning[0][0] <= self.average.seconds:
            due.append(heapq.heappop(self._returning)[2])
            due[-1].returns = False
        for tenant in due:  # rounding may have them be beyond still
            if self._order.get((tenant.beyond, tenant.slices, tenant.number)) is tenant:
                self.displace(tenant)
                tenant.beyond = False
                self.place(tenant)

    def least(self) -> Tenant:
        """Who has been served least."""
        order = self._order
        places = {0, order.bisect_left((True,))}
        first: list[Tenant] = [order.peekitem(place)[1] for place in places if place < len(order)]
        return min(first, key=lambda tenant: tenant.slices)

    def _most(self) -> list[Tenant]:
        """Who has been served most, of those beyond their shares and of the others; none where there are none."""
        order = self._order
        places = {len(order), order.bisect_left((True,))}
        return [order.peekitem(place - 1)[1] for place in places if place > 0]

    def in_order(self, sheltered: bool) -> Iterator[Tenant]:
        """By their service; where smaller ones are `sheltered`, those beyond their shares last."""
        order: SortedDict = self._order
        if sheltered:
            return iter(order.values())
        runs = (map(order.__getitem__, order.irange((beyond,), (beyond, math.inf))) for beyond in (False, True))
        return heapq.merge(*runs, key=lambda tenant: (tenant.slices, tenant.number))

    def rows_of(self, tenant: Tenant) -> float:
        """Its share of a batch."""
        return self.rows * tenant.weight / self.average.weight

    def rows_within(self, tenant: Tenant) -> float:
        """How many rows of one batch are within its share."""
        if tenant.small:
            return math.inf
        return 0 if tenant.beyond else min(math.ceil(self.rows_of(tenant)), _BURST - math.floor(self._ahead(tenant)))

    def _is_beyond(self, tenant: Tenant) -> bool:
        small = self._is_small(tenant)
        self.smalls += small - tenant.small
        tenant.small = small
        return not small and self._ahead(tenant) >= _BURST

    def _is_small(self, tenant: Tenant) -> bool:
        jobs, sizes = len(tenant.policy), self._sizes
        if jobs > _FEW_BATCHES * self.rows:
            return False
        lately = len(sizes) + self.average.resting
        if lately < 3 or len(sizes) < 2 or jobs <= self.rows_of(tenant):  # of two, nobody is the usual one
            return True
        return tenant.size < _MANY_TIMES * sizes[(len(sizes) - 1) // 2]

    def _ahead(self, tenant: Tenant) -> float:
        """Slices that it was served more than the average."""
        return (tenant.counter - self.average.seconds) * tenant.weight / self.slice
