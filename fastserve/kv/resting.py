"""What rests in a tier, by whose it is: who has the most of it by weight is the first to lose some.

API keys share first, and then each key's users, as they do everything else. What a tenant holds counts twice as much
for every half-life that it has had no job: cache is kept for those who come back, and not for those who were here once.
What jobs of theirs have on the device counts, too: so a flood of prompts that are never seen again throws away its own,
and whoever has more than a share of the memory starts no further jobs in the others' (`spared`).
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from .block import Block
from .order import LeavingOrder

# Seconds without a job after which what a tenant holds counts twice; a person reads an answer in less.
_HALF_LIFE: Final = 120.0
_STEPS: Final = 64  # of a half-life, to which time is told: those with jobs are looked at anew once a step

_MOST_AWAY: Final = 65_536  # accounts without jobs of which it is remembered when they had one

_SLACK: Final = 64  # entries of a heap that are out of date, beside as many as there are good ones

Accounts = tuple[str, ...]  # whom a block counts for: an API key and its user, or a tenant alone


class Presence:
    """Who has jobs, what accounts weigh, and what time it is: of both tiers."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self.now = 0.0
        self.time = 0.0  # in half-lives
        self._live: dict[str, int] = {}  # jobs, by account
        self._left: OrderedDict[str, float] = OrderedDict()  # when others had their last; the one longest away first

    def expire(self, now: float) -> None:
        """Time goes on."""
        self.now = now
        self.time = math.floor(now / _HALF_LIFE * _STEPS) / _STEPS

    def count(self, accounts: Accounts, jobs: int) -> None:
        """So many more jobs of these are live."""
        for name in accounts:
            live = self._live.get(name, 0) + jobs
            if live:
                self._live[name] = live
                continue
            del self._live[name]
            self._left[name] = self.time
            self._left.move_to_end(name)
            if len(self._left) > _MOST_AWAY:
                self._left.popitem(last=False)

    def seen(self, name: str) -> float:
        """When an account last had a job, in half-lives."""
        return self.time if name in self._live else self._left.get(name, 0.0)


@dataclass(slots=True, eq=False)
class _Account:
    name: str
    weight: float
    resting: int = 0
    users: _Group | None = None  # of an API key, or the only one of a tenant without one
    order: LeavingOrder | None = None  # of a user


@dataclass(slots=True)
class _Group:
    """Accounts that share as equals but for their weights."""

    presence: Presence
    owned: Mapping[str, int]  # by account, blocks of the tier that do not rest
    members: dict[str, _Account] = field(default_factory=dict)
    _weight: float = 0.0  # of all of them, as far as they are there, ...
    _weighed: float = -1.0  # ... when it was last added up
    _heap: list[tuple[float, int, _Account]] = field(default_factory=list)  # of each at least what it is now
    _grown: dict[_Account, None] = field(default_factory=dict)  # that may have more than the heap says
    _number: int = 0

    def member(self, name: str) -> _Account:
        account = self.members.get(name)
        if account is None:
            weight = self.presence.weights.get(name, 1.0)
            account = self.members[name] = _Account(name, weight)
            self._weight += weight
        return account

    def count(self, account: _Account, blocks: int) -> None:
        account.resting += blocks
        if blocks > 0:
            self._grown[account] = None
        elif not account.resting:
            del self.members[account.name]
            self._weight -= self._presence_of(account)
            self._grown.pop(account, None)

    def grew(self, account: _Account) -> None:
        """It may have more than it had."""
        self._grown[account] = None

    def part(self, name: str) -> float:
        """Its share by weight among those that are there."""
        if self._weighed != self.presence.time:
            self._weighed = self.presence.time
            self._weight = sum(map(self._presence_of, self.members.values()))
        weight = self.presence.weights.get(name, 1.0)
        others = self._weight - (self._presence_of(self.members[name]) if name in self.members else 0.0)
        return weight / (weight + max(0.0, others))

    def _presence_of(self, account: _Account) -> float:
        """Its weight, halved for every half-life that it has had no job."""
        return float(account.weight * 2.0 ** (self.presence.seen(account.name) - self.presence.time))

    def share(self, account: _Account, more: int = 0) -> float:
        """The logarithm of what it has, by weight and by how long it has been away; the same number is taken off all.

        Time goes on for all of them alike, so that their order changes only with what they do.
        """
        blocks = account.resting + self.owned.get(account.name, 0) + more
        return math.log2(blocks / account.weight) - self.presence.seen(account.name)

    def largest(self) -> _Account | None:
        """Who has the most of what rests."""
        if len(self.members) < 2:
            return next(iter(self.members.values()), None)
        for account in self._grown:
            self._post(account)
        self._grown.clear()
        heap = self._heap
        if len(heap) > 2 * len(self.members) + _SLACK:
            heap.clear()
            for account in self.members.values():
                self._post(account)
        while heap:
            known, _, account = heap[0]
            if account.resting and -known == self.share(account):
                return account
            heapq.heappop(heap)
            self._post(account)
        return None

    def _post(self, account: _Account) -> None:
        if account.resting:
            self._number += 1
            heapq.heappush(self._heap, (-self.share(account), self._number, account))


class Resting:
    """Of one tier: what rests there, and in which order it leaves. O(log n) each."""

    def __init__(self, fits: Callable[[Block], bool], presence: Presence, owned: Mapping[str, int]) -> None:
        """`fits`: whether a block could leave; `owned`: by account, blocks of the tier that do not rest."""
        self.blocks = 0
        self._fits = fits
        self._presence = presence
        self._owned = owned
        self._sharers = _Group(presence, owned)
        self._found: dict[Accounts, tuple[_Account, _Account]] = {}  # sharer and user, of all there are

    def rests(self, block: Block) -> None:
        """One more is here that nobody has."""
        self.blocks += 1
        self._count(block, 1)

    def wakes(self, block: Block) -> None:
        """One less."""
        self.blocks -= 1
        self._count(block, -1)

    def push(self, block: Block) -> None:
        """A block that fits has its place in the order, or another than before."""
        user = self._find(block)[-1]
        if user.resting:
            self._order(user).push(block, user.resting)
        else:  # it is about to move, and the only one
            self._count(block, 0)

    def pop(self) -> Block | None:
        """The first to leave."""
        user = self._largest()
        return None if user is None else self._order(user).pop()

    def pop_for(self, block: Block) -> Block | None:
        """The first to leave if a block that is not here may take its place: its owner's if it is worth less, or that
        of one who has more than its owner would have then."""
        group = self._sharers
        for own in self._find(block):
            largest = group.largest()
            if largest is not own and largest is not None and group.share(largest) > group.share(own, 1):
                self._count(block, 0)  # or who has nothing here would be counted
                return self.pop()
            if not own.resting:
                self._count(block, 0)
                return None if (user := self._largest()) is None else self._order(user).pop_below(block.score)
            if own.users is not None:
                group = own.users
        return self._order(own).pop_below(block.score)

    def grew(self, accounts: Accounts) -> None:
        """These own more than they did."""
        sharer = self._sharers.members.get(accounts[0]) if accounts else None
        if sharer is not None and sharer.users is not None:
            self._sharers.grew(sharer)
            if (user := sharer.users.members.get(accounts[-1])) is not None:
                sharer.users.grew(user)

    def spared(self, accounts: Accounts, places: int) -> int:
        """How many blocks that rest are to be left to others by one that has more than its share of the places.

        Sharers' first, and then those of a key's users.
        """
        group, resting, share, spared = self._sharers, self.blocks, float(places), 0.0
        for name in (accounts[0], accounts[-1]) if accounts else ():
            within, member = share, group.members.get(name)
            share *= group.part(name)
            own = 0 if member is None else member.resting
            if own + self._owned.get(name, 0) > share:
                spared += min(resting - own, within - share)
            if member is None or member.users is None:
                break
            group, resting = member.users, own
        return math.ceil(spared)

    def known(self) -> set[Block]:
        """Blocks that will be found in their turn, if they fit; for tests."""
        return {block for user in self._users() if user.order is not None for block in user.order.known()}

    def held(self) -> dict[tuple[str, str], int]:
        """How many rest, by whose they are; raises RuntimeError where a key has not what its users have. For tests."""
        held: dict[tuple[str, str], int] = {}
        for sharer in self._sharers.members.values():
            users = sharer.users.members.values() if sharer.users is not None else ()
            if sharer.resting != sum(user.resting for user in users):
                raise RuntimeError(f"what rests of {sharer.name!r} is not that of its users")
            held |= {(sharer.name, user.name): user.resting for user in users if user.resting}
        return held

    def _users(self) -> Iterator[_Account]:
        for sharer in self._sharers.members.values():
            if sharer.users is not None:
                yield from sharer.users.members.values()

    def _largest(self) -> _Account | None:
        sharer = self._sharers.largest()
        return None if sharer is None or sharer.users is None else sharer.users.largest()

    def _find(self, block: Block) -> tuple[_Account, _Account]:
        accounts = block.accounts
        found = self._found.get(accounts)
        if found is None:
            sharer = self._sharers.member(accounts[0] if accounts else "")
            if sharer.users is None:
                sharer.users = _Group(self._presence, self._owned)
            found = self._found[accounts] = sharer, sharer.users.member(accounts[-1] if accounts else "")
        return found

    def _count(self, block: Block, blocks: int) -> None:
        sharer, user = self._find(block)
        if sharer.users is not None:
            sharer.users.count(user, blocks)
        self._sharers.count(sharer, blocks)
        if not user.resting:
            del self._found[block.accounts]

    def _order(self, user: _Account) -> LeavingOrder:
        """With what was kept until now among the others."""
        order, now = user.order, self._presence.now
        if order is None:
            order = user.order = LeavingOrder(self._fits)
        if order.now != now:
            order.expire(now, user.resting)
        return order
