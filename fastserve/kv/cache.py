"""The prefix cache: which blocks hold what, and which of those that nobody has are worth the least.

Blocks form a forest: a block's parent holds the tokens before its own. The index finds one by the chained hash of all
tokens up to its end, and compares its tokens and its parent before it is believed, so no collision shares a wrong one.
An owner has the whole path to each of its blocks in the index, hence what hangs below a block that nobody has is
nobody's either.

What is worth least goes first, by GreedyDual with frequencies (Cherkasova, "Improving WWW proxies performance with
greedy-dual-size-frequency caching policy", 1998): score = clock + uses · seconds of computing it again, and the clock
moves on to the score of what is thrown away. So a block is worth the more, the later and the more often it was used and
the deeper it lies; and a parent at least what its children are, so that a path is lost from its end. Among equals the
least recently used path goes first.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from operator import itemgetter
from typing import Final

from .block import NOWHERE, Block
from .counters import CacheCounters

_MOST_USES: Final = 16  # that count: what was asked for a thousand times yesterday is no better than that
_SLACK: Final = 1024  # entries of a heap that are out of date, beside as many as there are good ones

_Entry = tuple[float, int, int, Block]


class PrefixCache:
    """The index, and the order in which blocks leave it. Knows places only to tell the tiers apart."""

    def __init__(self) -> None:
        self.cached = 0  # blocks that nobody has, on the device ...
        self.cached_host = 0  # ... and on the host only
        self.counters = CacheCounters()
        self._index: dict[bytes, Block] = {}
        self._clock = 0.0
        self._now = 0.0
        self._number = 0  # of uses and of heap entries
        self._device: list[_Entry] = []  # by score; only blocks without others below them on the device
        self._kept: list[_Entry] = []  # the same, of those that are sure to be wanted, by how long
        self._host: list[_Entry] = []  # by score
        self._unsaved: deque[Block] = deque()  # those at rest on the device only, as they came

    def __len__(self) -> int:
        return len(self._index)

    # --- the index ---------------------------------------------------------------------------------------------------

    def find(self, key: bytes, tokens: bytes, parent: Block | None) -> Block | None:
        """The block that holds these tokens behind that parent. Of a first block, `tokens` tell whose it is as well."""
        block = self._index.get(key)
        return block if block is not None and block.parent is parent and block.tokens == tokens else None

    def insert(self, block: Block, key: bytes, tokens: bytes, parent: Block | None, cost: float) -> bool:
        """Put a block into the index; False: its key is taken."""
        if key in self._index:
            return False
        self._index[key] = block
        block.enter(key, tokens, parent, cost)
        if parent is not None:
            parent.children[block] = None
            self.moved(block)
        return True

    def touch(self, path: Sequence[Block], keep: float = 0.0, *, hit: bool = False) -> None:
        """A path, from the beginning of a prompt, is used now; `keep`: until when it is sure to be used again."""
        least = 0.0
        self._number += 1
        for block in reversed(path):
            block.uses = min(block.uses + hit, _MOST_USES)
            least = max(self._clock + (1 + block.uses) * block.cost, block.score, least)
            block.score, block.used, block.keep = least, self._number, max(block.keep, keep)
            if self._is_leaf(block):
                self._push_device(block)
            elif self._is_away(block):
                self._push(self._host, block.score, block, self.cached_host)

    def remove(self, block: Block) -> list[Block]:
        """Take a block that nobody has out of the index, with all below it; returns them, the ends of paths first."""
        self._clock = max(self._clock, block.score)
        gone, above = [block], block.parent
        for each in gone:  # which grows meanwhile
            gone += each.children
        for each in reversed(gone):
            if (parent := each.parent) is not None:
                del parent.children[each]
                parent.below -= each.counted
                each.parent, each.counted = None, False
            del self._index[each.key]  # type: ignore[arg-type]
            each.key = None
        if above is not None and self._is_leaf(above):
            self._push_device(above)
        self.counters.evicted += len(gone)
        return gone[::-1]

    def moved(self, block: Block) -> None:
        """Whether an iteration can read the block may be another answer now."""
        parent = block.parent if block.key is not None else None
        if parent is None or block.counted == block.here:
            return
        block.counted = block.here
        parent.below += 1 if block.counted else -1
        if self._is_leaf(parent):
            self._push_device(parent)

    # --- what nobody has ---------------------------------------------------------------------------------------------

    def rests(self, block: Block) -> None:
        """Nobody has a block of the index any more, or it has come to rest in another place."""
        if block.device == NOWHERE:
            self.cached_host += 1
            self._push(self._host, block.score, block, self.cached_host)
        else:
            self.cached += 1
            if not block.below:
                self._push_device(block)
            self.unsaves(block)

    def wakes(self, block: Block) -> None:
        """Somebody takes a block that rests, or it begins to move."""
        if block.device == NOWHERE:
            self.cached_host -= 1
        else:
            self.cached -= 1

    def expire(self, now: float) -> None:
        """Time goes on: what was kept until now is like all others."""
        self._now = now
        while self._kept and self._kept[0][0] <= now:
            block = heapq.heappop(self._kept)[-1]
            if self._is_leaf(block):
                self._push_device(block)

    def coldest(self) -> Block | None:
        """Of what rests on the device the block that is worth the least; it wakes."""
        for heap in (self._device, self._kept):
            while heap:
                value, used, _, block = heapq.heappop(heap)
                current = block.score if heap is self._device else block.keep
                if self._is_leaf(block) and (value, used) == (current, block.used):
                    self.wakes(block)
                    return block
        return None

    def coldest_on_host(self, below: float | None = None) -> Block | None:
        """The same of the host; only one that is worth less than `below`. It wakes."""
        while self._host:
            score, used, _, block = self._host[0]
            current = self._is_away(block) and (score, used) == (block.score, block.used)
            if current and below is not None and score >= below:
                return None
            heapq.heappop(self._host)
            if current:
                self.wakes(block)
                return block
        return None

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

    def _is_leaf(self, block: Block) -> bool:
        return block.key is not None and not block.tables and block.here and not block.below

    def _is_away(self, block: Block) -> bool:
        return block.key is not None and not block.tables and block.device == NOWHERE and block.transfer is None

    def _push_device(self, block: Block) -> None:
        if block.keep > self._now:
            self._push(self._kept, block.keep, block, self.cached)
        else:
            self._push(self._device, block.score, block, self.cached)

    def _push(self, heap: list[_Entry], value: float, block: Block, good: int) -> None:
        self._number += 1
        heapq.heappush(heap, (value, block.used, self._number, block))
        if len(heap) > 2 * good + _SLACK:  # what was taken up again has left its entry
            fits = self._is_away if heap is self._host else self._is_leaf
            newest = {entry[-1]: entry for entry in sorted(heap, key=itemgetter(2)) if fits(entry[-1])}
            heap[:] = newest.values()
            heapq.heapify(heap)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless index, forest and order agree with the blocks."""
        resting = [block for block in self._index.values() if not block.tables and block.transfer is None]
        here = [block for block in resting if block.device != NOWHERE]
        ordered = {
            (entry[-1], entry[1])
            for entry in (*self._device, *self._kept)
            if entry[0] in (entry[-1].score, entry[-1].keep)
        }
        for what, fine in {
            "counts of cached blocks": (self.cached, self.cached_host) == (len(here), len(resting) - len(here)),
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
            "what could leave the device": all((block, block.used) in ordered for block in here if not block.below),
            "what could leave the host": {block for block in resting if block.device == NOWHERE}
            <= {entry[-1] for entry in self._host if entry[:2] == (entry[-1].score, entry[-1].used)},
        }.items():
            if not fine:
                raise RuntimeError(f"the prefix cache is out of step: {what}")
