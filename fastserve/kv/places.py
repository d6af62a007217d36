"""Places of blocks on the device and on the host: which are free, and what is given up when none is."""

from __future__ import annotations

from array import array
from collections import deque

from .block import NOWHERE, Block
from .cache import PrefixCache


class Places:
    """Free ones, those of spare copies, and those of what is only cache, which count as free and are taken last."""

    def __init__(self, num_blocks: int, num_host_blocks: int, cache: PrefixCache) -> None:
        # A stack: blocks just freed are the ones still in cache. An array, as so is what a million integers are not.
        self.free = array("i", range(num_blocks - 1, -1, -1))
        self.free_host = deque(range(num_host_blocks))
        # Blocks on the device and on the host as well, of owners that have all of theirs there; the longest so first.
        self.spare: dict[Block, None] = {}
        self._cache = cache

    def take(self, count: int) -> list[int]:
        """Places on the device that are free, at the cost of cache where it must be."""
        while len(self.free) < count:
            block = self._cache.coldest()
            assert block is not None
            if block.host != NOWHERE:
                self.spare.pop(block, None)
                self.leave_device(block)
                self._cache.rests(block)
            else:
                self.throw_away(block)
        places = self.free[: -count - 1 : -1].tolist()
        del self.free[-count:]
        return places

    def take_host(self, count: int) -> list[int]:
        """Free places on the host, at the cost of spare copies and of cache where it must be."""
        while len(self.free_host) < count:
            if self.spare:
                self.drop_copy(next(iter(self.spare)))
            else:
                block = self._cache.coldest_on_host()
                assert block is not None
                self.throw_away(block)
        return sorted(self.free_host.popleft() for _ in range(count))

    def throw_away(self, block: Block) -> None:
        """Forget what a block holds that nobody has, and so all that goes on from it. It is awake, the others rest."""
        for each in self._cache.remove(block):
            if each is not block and each.transfer is None:
                self._cache.wakes(each)
            if each.transfer is None:
                self.give_back(each)

    def rest(self, block: Block) -> None:
        """Nobody has a block, and it does not move."""
        if block.key is None:
            self.give_back(block)
            return
        self.check_spare(block)
        self._cache.rests(block)

    def give_back(self, block: Block) -> None:
        self.spare.pop(block, None)
        if block.device != NOWHERE:
            self.free.append(block.device)
            block.device = NOWHERE
        if block.host != NOWHERE:
            self.free_host.append(block.host)
            block.host = NOWHERE

    def leave_device(self, block: Block) -> None:
        """The block's host copy is all there is of it from here on."""
        self.free.append(block.device)
        block.device = NOWHERE
        self._cache.moved(block)

    def drop_copy(self, block: Block) -> None:
        self.spare.pop(block, None)
        self.free_host.append(block.host)
        block.host = NOWHERE
        self._cache.unsaves(block)

    def check_spare(self, block: Block) -> None:
        """Whether a block's host copy could go for another's sake may have changed."""
        if block.here and block.host != NOWHERE and not any(table.missing for table in block.tables):
            self.spare.setdefault(block)
