"""Tenants share the device by their weights: one policy a tenant. API keys do first, and then each key's users."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from ..types import Job
from .base import Policy
from .standing import Standing, Tenant

# What a row is given of service before tenants' shares are looked at again, in decodes. The fewer, the more evenly they
# share; with one, batches would change at every token.
_SLICE: Final = 16

# Tenants without jobs whose service is remembered, and policies without jobs that are kept for the next tenant.
_MOST_IDLE: Final = 4096
_MOST_SPARE: Final = 64

# Of an order: whether the next row is beyond the tenant's share, the service to be reckoned with for it, the tenant's
# number, its rows within the share, the tenant, its order, and its next job.
_Started = tuple[bool, float, int, float, Tenant, Iterator[Job], Job]


class ByTenant(Policy):
    """Rows go to the tenants by their weights, and among a tenant's jobs its policy decides, bounds included.

    Virtual counters, as in VTC (Sheng et al., OSDI 2024): every tenant has one, of the seconds its jobs were served
    over its weight, seconds being what a job takes from the others in a full batch (see Charges). Who has less goes
    first, and counts for that row as if it had been served a slice, or its job's whole prefill where that is more. So
    with equal counters rows are shared by the weights, and with others as it takes to make them equal. Nobody saves up:
    see Standing.lift. No row stays empty while anybody has a job for it, but for those that a Shelter leaves empty.

    Counters are compared in whole slices, or the last row of a batch would change hands at every token, and service is
    asked for as often. A lone tenant's is not: it is told before another's jobs are chosen (see `settles`).

    Of an order made of many tenants' only the beginning is ever looked at, and only that has ranks one by one. The jobs
    behind it rank by tenant: who has been served most gives way first.

    Where `name` gives several tenants one name, as that of their API key, they share as one, and what they get they
    share among themselves in the same way: naming more users brings a key no more.

    While some have little to ask, rows of those beyond their shares (see Standing) come last, and whoever chooses a
    batch is told which they are: they would make its iterations longer.
    """

    def __init__(
        self,
        make: Callable[[], Policy],
        *,
        quantum: float,
        rows: float = math.inf,
        weights: Mapping[str, float],
        name: Callable[[str], str] = str,
    ) -> None:
        """`quantum`: seconds that a decode is charged in a full batch, which is of `rows`.

        `weights`: of tenants and of `name`'s names; 1 for those not there. What policies learn, `make` has shared.
        """
        self._make = make
        self._name = name
        self._quantum = quantum
        self._weights = weights
        self._slice = _SLICE * quantum
        self._tenants: dict[str, Tenant] = {}  # with jobs, but for the only one there is
        self._only: Tenant | None = None
        self._standing = Standing(self._slice, rows)
        self._beyond = False  # see `beyond`
        self._weight = 0.0  # of all of them
        self._jobs = 0
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # service and counter of those without jobs
        self._spare: list[Policy] = []
        self._number = 0
        self._waking: list[Tenant] = []  # had no jobs when the latest order was made
        self._grew = False  # whether anybody has had more since then
        self._holding: tuple[dict[Tenant, None], dict[Tenant, None]] = ({}, {})  # by tier: tenants with jobs in it
        self._places: dict[Job, int] = {}  # in the latest order, as far as it was looked at
        self._opened: list[Tenant] = []  # for it
        self._had: list[Tenant] = []  # the same, for the latest of those that are over
        self._started: list[_Started] = []  # heap: those of them of whose jobs some are left, ...
        self._upcoming: Tenant | None = None  # ... and the first that was not opened
        self._stale: dict[Tenant, None] = {}  # whose backlog may have changed
        self._backlog = 0.0

    # --- events ------------------------------------------------------------------------------------------------------

    def add(self, job: Job, now: float) -> None:
        name = self._name(job.tenant)
        tenant = self._tenants.get(name)
        if tenant is not None:
            tenant.policy.add(job, now)
            self._standing.look(tenant)
        else:
            policy = self._policy(job.tenant, name)
            policy.add(job, now)  # before anything changes: it may refuse
            tenant = self._enter(name, policy)
        self._jobs += 1
        self._grew = True
        if job.tier is not None:
            self._hold(tenant, job.tier, 1)
        self._stale[tenant] = None

    def remove(self, job: Job) -> None:
        tenant = self._tenants[self._name(job.tenant)]
        tenant.policy.remove(job)
        self._jobs -= 1
        self._places.pop(job, None)
        if job.tier is not None:
            self._hold(tenant, job.tier, -1)
        self._stale[tenant] = None
        if not len(tenant.policy) and self._only is None:
            self._leave(tenant)
        else:
            self._standing.look(tenant)

    def on_service(self, job: Job, seconds: float, now: float) -> None:
        tenant = self._tenants[self._name(job.tenant)]
        tenant.policy.on_service(job, seconds, now)
        self._standing.serve(tenant, seconds)
        self._stale[tenant] = None

    def refresh(self, job: Job, now: float) -> None:
        tenant = self._tenants[self._name(job.tenant)]
        tenant.policy.refresh(job, now)
        self._stale[tenant] = None

    def on_finish(self, job: Job, output_tokens: int, now: float) -> None:
        self._tenants[self._name(job.tenant)].policy.on_finish(job, output_tokens, now)

    def make_way(self) -> None:
        if self._only is not None:  # where there are several, all of them always do
            self._only.policy.make_way()

    def move(self, job: Job, tier: int | None) -> None:
        tenant = self._tenants[self._name(job.tenant)]
        tenant.policy.move(job, tier)
        if job.tier is not None:
            self._hold(tenant, job.tier, -1)
        if tier is not None:
            self._hold(tenant, tier, 1)

    def close_order(self) -> None:
        for tenant in self._opened:
            tenant.policy.close_order()
        if self._opened:
            self._had, self._opened = self._opened, []
        self._places.clear()

    # --- answers -----------------------------------------------------------------------------------------------------

    def settles(self) -> bool:
        if self._waking and len(self._tenants) - len(self._waking) == 1:
            return True
        # Where there are several, what a job gets is told slice by slice anyway.
        return self._only is not None and self._only.policy.settles()

    def horizon(self, job: Job) -> float:
        tenant = self._tenants[self._name(job.tenant)]
        horizon = tenant.policy.horizon(job)
        return horizon if self._only is not None else min(horizon, _SLICE * job.next_seconds)

    def next_deadline(self) -> float | None:
        tenants = self._opened if self._only is None else (self._only,)
        # The jobs of others come after those that were looked at, whichever of them comes first.
        deadlines = (tenant.policy.next_deadline() for tenant in tenants)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def deadline(self, job: Job) -> float:
        return self._tenants[self._name(job.tenant)].policy.deadline(job)

    def iter_best(self, now: float) -> Iterator[Job]:
        self._standing.pass_time(now)
        self.close_order()
        self._lift()
        self._beyond = False
        return self._merged(now) if self._only is None else self._open(self._only, now)

    def _open(self, tenant: Tenant, now: float) -> Iterator[Job]:
        policy = tenant.policy
        policy.share = self.share * tenant.weight / self._weight
        if isinstance(policy, ByTenant):
            policy._standing.rows = self._standing.rows_of(tenant)
        self._opened.append(tenant)
        return policy.iter_best(now)

    def _merged(self, now: float) -> Iterator[Job]:
        places, standing, slice_, started = self._places, self._standing, self._slice, self._started
        sheltered = standing.smalls > 0
        started.clear()
        unopened = standing.in_order(sheltered)
        self._upcoming = next(unopened, None)
        while started or self._upcoming is not None:
            best: Job | None = None
            upcoming = self._upcoming
            if upcoming is not None and (
                not started
                or (sheltered and upcoming.beyond, upcoming.slices * slice_, upcoming.number) < started[0][:3]
            ):
                tenant, service = upcoming, upcoming.slices * slice_
                rows = standing.rows_within(tenant) if sheltered else math.inf
                tenant.policy.make_way()
                jobs = self._open(tenant, now)
                self._upcoming = next(unopened, None)
            else:
                self._beyond, service, _, rows, tenant, jobs, best = heapq.heappop(started)
                places[best] = len(places)
                prefill = best.next_seconds if best.served < len(best.prompt) else 0.0
                service += max(slice_, prefill) / tenant.weight
                rows -= 1
            following = next(jobs, None)
            if following is not None:
                beyond = sheltered and (rows <= 0 or tenant.policy.beyond)
                heapq.heappush(started, (beyond, service, tenant.number, rows, tenant, jobs, following))
            if best is not None:  # last, so that it is known who has jobs left when no more are asked for
                yield best

    @property
    def several(self) -> bool:
        return len(self._tenants) > 1 if self._only is None else self._only.policy.several

    @property
    def beyond(self) -> bool:
        return self._beyond if self._only is None else self._only.policy.beyond

    def is_small(self, job: Job) -> bool:
        tenant = self._tenants[self._name(job.tenant)]
        return (self._only is not None or tenant.small) and tenant.policy.is_small(job)

    def is_sheltered(self, job: Job) -> bool:
        tenant = self._tenants[self._name(job.tenant)]
        return (self._only is None and tenant.small) or tenant.policy.is_sheltered(job)

    def shares(self, job: Job) -> tuple[float, ...]:
        tenant = self._tenants[self._name(job.tenant)]
        share = tenant.weight / self._weight
        return share, *(share * within for within in tenant.policy.shares(job))

    def iter_tier(self, tier: int, worst_first: bool = False) -> Iterator[Job]:
        if self._only is not None:
            return self._only.policy.iter_tier(tier, worst_first)
        orders = [tenant.policy.iter_tier(tier, worst_first) for tenant in self._holding[tier]]
        return heapq.merge(*orders, key=self.rank, reverse=worst_first)

    def rank(self, job: Job) -> tuple[float, ...]:
        tenant = self._tenants[self._name(job.tenant)]
        if self._only is not None:
            return tenant.policy.rank(job)
        place = self._places.get(job)
        if place is not None:
            return 0, place
        return 1, tenant.beyond, tenant.slices, tenant.number, *tenant.policy.rank(job)

    def work_ahead(self, job: Job, now: float) -> float:
        """What is ahead of a job within its tenant, and what others are served meanwhile: by weight, at most all."""
        tenant = self._tenants[self._name(job.tenant)]
        own = tenant.policy.work_ahead(job, now)
        if self._only is not None:
            return own
        ahead = own / tenant.weight + (tenant.slices - self._standing.least().slices) * self._slice
        others = max(0.0, self.backlog(now) - tenant.backlog)
        return own + min(others, ahead * max(0.0, self._weight - tenant.weight))

    def backlog(self, now: float) -> float:
        for tenant in self._stale:
            backlog = tenant.policy.backlog(now) if len(tenant.policy) else 0.0
            self._backlog += backlog - tenant.backlog
            tenant.backlog = backlog
        self._stale.clear()
        return max(0.0, self._backlog) if self._jobs else 0.0

    def quanta(self) -> Sequence[float]:
        # Those of jobs that have learned to do without levels and those that have not may live side by side.
        policies = [tenant.policy for tenant in self._tenants.values()] or [self._make()]
        return max((policy.quanta() for policy in policies), key=len)

    def level(self, job: Job) -> int:
        return self._tenants[self._name(job.tenant)].policy.level(job)

    def __len__(self) -> int:
        return self._jobs

    # --- who is there ------------------------------------------------------------------------------------------------

    def _policy(self, tenant: str, name: str) -> Policy:
        """For who has none yet."""
        if name != tenant:  # one of several that share as one
            return ByTenant(self._make, quantum=self._quantum, weights=self._weights)
        return self._spare.pop() if self._spare else self._make()

    def _enter(self, name: str, policy: Policy) -> Tenant:
        """A tenant has jobs."""
        if self._only is not None and not len(self._only.policy):
            self._leave(self._only)
        self._number += 1
        tenant = Tenant(name, self._weights.get(name, 1.0), self._number, policy, *self._left.pop(name, (0.0, 0.0)))
        self._tenants[name] = tenant
        self._standing.enter(tenant)
        self._weight += tenant.weight
        self._waking.append(tenant)
        self._only = tenant if len(self._tenants) == 1 else None
        return tenant

    def _leave(self, tenant: Tenant) -> None:
        """A tenant has none any more."""
        del self._tenants[tenant.name]
        self._standing.leave(tenant)
        self._weight -= tenant.weight
        self._backlog -= tenant.backlog
        self._stale.pop(tenant, None)
        if tenant in self._waking:
            self._waking.remove(tenant)
        self._left[tenant.name] = tenant.service, tenant.counter
        if len(self._left) > _MOST_IDLE:
            self._left.popitem(last=False)
        # Counters within a key go with its last job: nobody in it had anything left to do.
        if len(self._spare) < _MOST_SPARE and not isinstance(tenant.policy, ByTenant):
            self._spare.append(tenant.policy)
        if len(self._tenants) == 1:
            self._only = next(iter(self._tenants.values()))
            self._weight = self._only.weight  # without what sums have lost
        elif not self._tenants:
            self._only, self._weight, self._backlog = None, 0.0, 0.0

    def _lift(self) -> None:
        """Before an order is made: see Standing.lift."""
        if self._only is not None:
            self._waking.clear()
        elif self._grew:
            self._standing.lift(self._waking, self._still(self._had), self._still(self._left_over()))
            self._waking.clear()
        self._grew = False

    def _left_over(self) -> Iterator[Tenant]:
        """Those of whose jobs some had no rows in the latest order, but for those that come after the others."""
        yield from (started[4] for started in self._started)
        if self._upcoming is not None:
            yield self._upcoming

    def _still(self, tenants: Iterable[Tenant]) -> list[Tenant]:
        """Those of them that have jobs without having been without since."""
        return [tenant for tenant in tenants if self._tenants.get(tenant.name) is tenant]

    def _hold(self, tenant: Tenant, tier: int, more: int) -> None:
        tenant.held[tier] += more
        if tenant.held[tier]:
            self._holding[tier][tenant] = None
        else:
            self._holding[tier].pop(tenant, None)
