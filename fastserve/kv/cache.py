"""The prefix cache: which blocks hold what, and which of those that nobody has are worth the least.

Blocks form a forest: a block's parent holds the tokens before its own. The index finds one by the chained hash of all
tokens up to its end, and compares its tokens and its parent before it is believed, so no collision shares a wrong one.
An owner has the whole path to each of its blocks in the index, hence what hangs below a block that nobody has is
nobody's either.

What is worth least goes first, by GreedyDual with frequencies (Cherkasova, "Improving WWW proxies performance with
greedy-dual-size-frequency caching policy", 1998): score = clock + uses · seconds of computing it again, and the clock
moves on to the score of what is thrown away. While nothing is, it goes on as it would where each block used took the
place of another: when as many have been as there is memory for, by what one of them costs. So a block is worth the
more, the later and the more often it was used and the deeper it lies; and a parent at least what its children are, so
that a path is lost from its end. Among equals the least recently used path goes first. Where several tenants have
something at rest in a tier, it is taken from who has the most of it by weight (see resting.py).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from .block import NOWHERE, Block
from .counters import CacheCounters
from .few import with_one, without_one
from .resting import Accounts, Presence, Resting

_MOST_USES: Final = 16  # that count: what was asked for a thousand times yesterday is no better than that
_SLACK: Final = 1024  # entries that are out of date, beside as many as there are good ones


class PrefixCache:
    """The index, and the order in which blocks leave it. Knows places only to tell the tiers apart."""

    def __init__(
        self,
        places: int,
        weights: Mapping[str, float] = MappingProxyType({}),
        owned: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """`places`: blocks that there is memory for, in both tiers; `weights`: of accounts, 1 for those not there.

        `owned`: by account, blocks on the device that somebody has, as it changes.
        """
        self.counters = CacheCounters()
        self._index: dict[bytes, Block] = {}
        self._clock = 0.0
        self._places = places
        self._number = 0  # of uses
        self._presence = Presence(weights)
        self._device = Resting(_is_leaf, self._presence, owned)
        self._host = Resting(_is_away, self._presence, MappingProxyType({}))
        self._unsaved: deque[Block] = deque()  # those at rest on the device only, as they came

    def __len__(self) -> int:
        return len(self._index)

    @property
    def cached(self) -> int:
        """Blocks that nobody has, on the device."""
        return self._device.blocks

    @property
    def cached_host(self) -> int:
        """The same on the host only."""
        return self._host.blocks

    # --- the index ---------------------------------------------------------------------------------------------------

    def find(self, key: bytes, tokens: bytes, parent: Block | None) -> Block | None:
        """The block that holds these tokens behind that parent. Of a first block, `tokens` tell whose it is as well."""
        block = self._index.get(key)
        return block if block is not None and block.parent is parent and block.tokens == tokens else None

    def insert(
        self,
        block: Block,
        key: bytes,
        tokens: bytes,
        parent: Block | None,
        cost: float,
        accounts: Accounts = (),
    ) -> bool:
        """Put a block into the index; False: its key is taken. `accounts`: whom it counts for while it rests."""
        if key in self._index:
            return False
        self._index[key] = block
        block.enter(key, tokens, parent, cost, accounts)
        if parent is not None:
            parent.children = with_one(parent.children, block)
            self.moved(block)
        return True

    def touch(self, path: Sequence[Block], keep: float = 0.0, *, hit: bool = False) -> None:
        """A path, from the beginning of a prompt, is used now; `keep`: until when it is sure to be used again."""
        least = 0.0
        self._number += 1
        self._clock += sum([block.cost for block in path]) / self._places
        clock, number = self._clock, self._number
        for block in reversed(path):
            if hit and block.uses < _MOST_USES:
                block.uses += 1
            block.score = least = max(clock + (1 + block.uses) * block.cost, block.score, least)
            block.used = number
            if block.keep < keep:
                block.keep = keep
            if block.tables:
                continue
            if _is_leaf(block):
                self._device.push(block)
            elif _is_away(block):
                self._host.push(block)

    def remove(self, block: Block) -> list[Block]:
        """Take a block that nobody has out of the index, with all below it; returns them, the ends of paths first."""
        self._clock = max(self._clock, block.score)
        gone, above = [block], block.parent
        for each in gone:  # which grows meanwhile
            gone += each.children
        for each in reversed(gone):
            if (parent := each.parent) is not None:
                parent.children = without_one(parent.children, each)
                parent.below -= each.counted
                each.parent, each.counted = None, False
            del self._index[each.key]  # type: ignore[arg-type]
            each.key = None
        if above is not None and _is_leaf(above):
            self._device.push(above)
        self.counters.evicted += len(gone)
        return gone[::-1]

    def moved(self, block: Block) -> None:
        """Whether an iteration can read the block may be another answer now."""
        parent = block.parent if block.key is not None else None
        if parent is None or block.counted == block.here:
            return
        block.counted = block.here
        parent.below += 1 if block.counted else -1
        if _is_leaf(parent):
            self._device.push(parent)

    # --- what nobody has ---------------------------------------------------------------------------------------------

    def rests(self, block: Block) -> None:
        """Nobody has a block of the index any more, or it has come to rest in another place."""
        if block.device == NOWHERE:
            self._host.rests(block)
            self._host.push(block)
        else:
            self._device.rests(block)
            if not block.below:
                self._device.push(block)
            self.unsaves(block)

    def wakes(self, block: Block) -> None:
        """Somebody takes a block that rests, or it begins to move."""
        if block.device == NOWHERE:
            self._host.wakes(block)
        else:
            self._device.wakes(block)

    def expire(self, now: float) -> None:
        """Time goes on: what was kept until now is like all others."""
        self._presence.expire(now)

    def arrives(self, accounts: Accounts) -> None:
        """A job of these is live from now on."""
        self._presence.count(accounts, 1)

    def departs(self, accounts: Accounts) -> None:
        """One of these has ended."""
        self._presence.count(accounts, -1)

    def grew(self, accounts: Accounts) -> None:
        """Jobs of these have more blocks on the device."""
        self._device.grew(accounts)

    def spared(self, accounts: Accounts, places: int) -> int:
        """How much of what rests on the device, which has so many places, a job of these should leave to others."""
        return self._device.spared(accounts, places)

    def coldest(self) -> Block | None:
        """Of what rests on the device, of who has the most of it, the block that is worth the least; it wakes."""
        return self._woken(self._device.pop())

    def coldest_on_host(self, instead: Block | None = None) -> Block | None:
        """The same of the host; only one that may go for the sake of `instead`, to save that. It wakes."""
        return self._woken(self._host.pop() if instead is None else self._host.pop_for(instead))

    def _woken(self, block: Block | None) -> Block | None:
        if block is not None:
            self.wakes(block)
        return block

    def unsaves(self, block: Block) -> None:
        """A block that may be at rest may have no copy on the host."""
        if self._is_unsaved(block):
            self._unsaved.append(block)
            if len(self._unsaved) > 2 * self.cached + _SLACK:
                self._unsaved = deque(dict.fromkeys(filter(self._is_unsaved, self._unsaved)))

    def unsaved(self) -> Block | None:
        """Of what rests on the device only the block that has done so for longest; it wakes."""
        while self._unsaved:
            block = self._unsaved.popleft()
            if self._is_unsaved(block):
                self.wakes(block)
                return block
        return None

    def _is_unsaved(self, block: Block) -> bool:
        return block.key is not None and not block.tables and block.here and block.host == NOWHERE

    def check_integrity(self) -> None:
        """Raise RuntimeError unless index, forest and order agree with the blocks."""
        resting = [block for block in self._index.values() if not block.tables and block.transfer is None]
        here = [block for block in resting if block.device != NOWHERE]
        for what, fine in {
            "counts of cached blocks": (self.cached, self.cached_host) == (len(here), len(resting) - len(here)),
            "whose what rests is": (self._device.held(), self._host.held())
            == (_by_account(here), _by_account([block for block in resting if block.device == NOWHERE])),
            "a path that is not all of one tenant": all(
                block.parent is None or block.parent.accounts == block.accounts for block in self._index.values()
            ),
            "a key": all(block.key == key for key, block in self._index.items()),
            "the forest": all(
                block.parent is None or (block.parent.key is not None and block in block.parent.children)
                for block in self._index.values()
            )
            and all(child.parent is block for block in self._index.values() for child in block.children),
            "blocks below": all(
                block.below == sum(child.counted for child in block.children) for block in self._index.values()
            ),
            "an owner without the path to its block": all(
                block.parent is None or set(block.tables) <= set(block.parent.tables) for block in self._index.values()
            ),
            "a path worth more at its end": all(
                block.parent is None or block.parent.score >= block.score for block in resting
            ),
            "what could leave the device": {block for block in here if not block.below} <= self._device.known(),
            "what could leave the host": set(resting) - set(here) <= self._host.known(),
        }.items():
            if not fine:
                raise RuntimeError(f"the prefix cache is out of step: {what}")


def _by_account(blocks: Sequence[Block]) -> dict[tuple[str, str], int]:
    """How many there are, by sharer and user."""
    whose = [block.accounts or ("",) for block in blocks]
    return dict(Counter([(accounts[0], accounts[-1]) for accounts in whose]))


def _is_leaf(block: Block) -> bool:
    return block.key is not None and not block.tables and block.here and not block.below


def _is_away(block: Block) -> bool:
    return block.key is not None and not block.tables and block.device == NOWHERE and block.transfer is None
