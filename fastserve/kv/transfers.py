"""Copies of blocks between the tiers that are under way: what is in which, and which blocks are about to leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..types import OFFLOAD, UPLOAD
from .block import Block

CopyRow = tuple[int, int, int, int]  # copy, direction, source block, destination block


@dataclass(slots=True)
class Transfer:
    """One copy of several blocks."""

    owner: int | None  # None: of blocks that nobody had
    direction: int
    blocks: Sequence[Block]


class Transfers:
    """Begins and ends copies. A block is in one at most, from `begin` until `end`."""

    def __init__(self) -> None:
        self.leaving = 0  # device blocks that the ends of offloads will free
        self.under_way: dict[int, Transfer] = {}
        self._next = 1

    def begin(self, owner: int | None, direction: int, blocks: Sequence[Block]) -> list[CopyRow]:
        """Copy blocks that have a place in either tier; returns what the runtime has to do."""
        if not blocks:
            return []
        copy = self._next
        self._next += 1
        self.under_way[copy] = Transfer(owner, direction, blocks)
        for block in blocks:
            block.transfer = direction
            self.leaving += direction == OFFLOAD and not block.stays
        if direction == UPLOAD:
            return [(copy, UPLOAD, block.host, block.device) for block in blocks]
        return [(copy, OFFLOAD, block.device, block.host) for block in blocks]

    def keep(self, block: Block) -> None:
        """A block that is being offloaded is wanted again: it keeps its place on the device."""
        if not block.stays:
            block.stays = True
            self.leaving -= 1

    def end(self, copy: int) -> Transfer:
        """A copy is done. Its blocks still say that they move. Raises ValueError for one unknown."""
        transfer = self.under_way.pop(copy, None)
        if transfer is None:
            raise ValueError(f"copy {copy} is not under way")
        if transfer.direction == OFFLOAD:
            self.leaving -= sum([not block.stays for block in transfer.blocks])
        return transfer
