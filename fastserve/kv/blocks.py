"""Which job holds which KV blocks. Bookkeeping only: nothing here touches memory, and nothing here decides.

    free list ──grow──▶ a job's table ──release──▶ free list

A block is in exactly one of the two places. Every action `x` that can fail has a question `can_x`; asking first is the
caller's duty, and acting without asking raises.
"""

from __future__ import annotations


class BlockManager:
    """`num_blocks` blocks of `block_size` token slots each; an owner is any integer, the scheduler uses Job.index."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: blocks just freed are the ones still in cache
        self._tables: dict[int, list[int]] = {}

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold the KV of `tokens` tokens."""
        return -(-tokens // self.block_size)

    def held(self, owner: int) -> int:
        """How many blocks the owner holds."""
        return len(self._tables.get(owner, ()))

    def capacity(self, owner: int) -> int:
        """Tokens the owner could have KV for if it were given every free block."""
        return (self.held(owner) + len(self._free)) * self.block_size

    def can_grow(self, owner: int, tokens: int) -> bool:
        """Whether the owner's table can be made to hold `tokens` tokens in all."""
        return tokens <= self.capacity(owner)

    def grow(self, owner: int, tokens: int) -> list[tuple[int, int]]:
        """Make the owner's table hold `tokens` tokens in all; returns what was added, as (index in table, block)."""
        if not self.can_grow(owner, tokens):
            raise ValueError(f"owner {owner} needs room for {tokens} tokens and can have {self.capacity(owner)}")
        table = self._tables.setdefault(owner, [])
        first, needed = len(table), self.blocks_for(tokens)
        added = [(index, self._free.pop()) for index in range(first, needed)]
        table.extend(block for _, block in added)
        return added

    def release(self, owner: int) -> int:
        """Take back every block of the owner; returns how many there were."""
        table = self._tables.pop(owner, [])
        self._free.extend(reversed(table))
        return len(table)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every block is in exactly one place."""
        places = self._free + [block for table in self._tables.values() for block in table]
        if sorted(places) != list(range(self.num_blocks)):
            raise RuntimeError(f"blocks lost or doubled: {len(places)} places for {self.num_blocks} blocks")
