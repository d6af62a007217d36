"""In which order blocks that nobody has leave a tier."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from operator import itemgetter
from typing import Final

from .block import Block

_SLACK: Final = 128  # entries of a heap that are out of date, beside as many as there are good ones

_Entry = tuple[float, int, int, Block]  # worth or time, last use, number, block


class LeavingOrder:
    """What is worth least goes first; of equals the least recently used. What is sure to be wanted until later goes
    last, and of that what is so for the shortest time.

    Whoever changes what a block is worth, or takes it up again, leaves its entry behind: those are passed over.
    """

    def __init__(self, fits: Callable[[Block], bool]) -> None:
        """`fits`: whether a block could leave."""
        self._fits = fits
        self._worth: list[_Entry] = []
        self._kept: list[_Entry] = []
        self.now = 0.0
        self._number = 0

    def push(self, block: Block, good: int) -> None:
        """A block that fits, of about so many, has its place in the order, or another than before."""
        kept = block.keep > self.now
        heap = self._kept if kept else self._worth
        self._number += 1
        heapq.heappush(heap, (block.keep if kept else block.score, block.used, self._number, block))
        if len(heap) > 2 * good + _SLACK:
            newest = {entry[-1]: entry for entry in sorted(heap, key=itemgetter(2)) if self._fits(entry[-1])}
            heap[:] = newest.values()
            heapq.heapify(heap)

    def expire(self, now: float, good: int) -> None:
        """Time goes on: what was kept until now is like all others."""
        self.now = now
        while self._kept and self._kept[0][0] <= now:
            block = heapq.heappop(self._kept)[-1]
            if self._fits(block):
                self.push(block, good)

    def pop(self) -> Block | None:
        """The first to leave."""
        return self._first(self._worth) or self._first(self._kept)

    def pop_below(self, score: float) -> Block | None:
        """The first to leave if it is worth less than that, and nobody is sure to want it."""
        return self._first(self._worth, score)

    def _first(self, heap: list[_Entry], below: float | None = None) -> Block | None:
        while heap:
            value, used, _, block = heap[0]
            current = self._fits(block) and (value, used) == (
                block.keep if heap is self._kept else block.score,
                block.used,
            )
            if current and below is not None and value >= below:
                return None
            heapq.heappop(heap)
            if current:
                return block
        return None

    def known(self) -> set[Block]:
        """Blocks that will be found in their turn, if they fit; for tests."""
        return {block for value, used, _, block in self._worth if (value, used) == (block.score, block.used)} | {
            block for value, used, _, block in self._kept if (value, used) == (block.keep, block.used)
        }
