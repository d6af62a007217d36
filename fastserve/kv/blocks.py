"""Where every KV block of every job is. Bookkeeping only: nothing here touches memory, and nothing here decides.

                    grow                     offload                    acknowledge
    free on device ──────▶ RESIDENT ──────────────────────▶ OFFLOADING ─────────────▶ AWAY (host copy only)
          ▲                 │    ▲                              │ recalled               │
          │ release         │    └──────────────────────────────┴── UPLOADING ◀──────────┘
          └─────────────────┘          acknowledge                          upload

A block of a job has an optional place on the device, an optional place on the host and at most one transfer, which
only `acknowledge` ends. Full blocks never change, so the host copy of a block that was brought back stays good and
leaves again without a copy, until somebody needs its place. Every action `x` that can fail has a question `can_x`;
acting without asking raises.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field

from ..types import OFFLOAD, UPLOAD

_NOWHERE = -1

CopyRow = tuple[int, int, int, int]  # copy, direction, source block, destination block


@dataclass(slots=True, eq=False)
class _Table:
    """One owner's blocks, by position / block_size."""

    device: list[int] = field(default_factory=list)  # _NOWHERE: the block is away
    host: list[int] = field(default_factory=list)  # _NOWHERE: no copy there
    missing: int = 0  # blocks that are away or moving: with any, the owner cannot run
    moving: int = 0  # blocks in transfer
    copies: int = 0  # good copies on the host
    released: bool = False


@dataclass(slots=True)
class _Transfer:
    table: _Table
    owner: int
    direction: int
    indices: list[int]  # in the table
    recalled: bool = False  # an offload whose owner is wanted again: the device's copy is kept


class BlockManager:
    """`num_blocks` blocks of `block_size` token slots on the device, `num_host_blocks` on the host.

    An owner is any integer; the scheduler uses Job.index.
    """

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.block_size = block_size
        self.leaving = 0  # device blocks that acknowledgements of offloads will free
        # A stack: blocks just freed are the ones still in cache. An array, as so is what a million integers are not.
        self._free = array("i", range(num_blocks - 1, -1, -1))
        self._free_host = deque(range(num_host_blocks))
        self._tables: dict[int, _Table] = {}
        self._transfers: dict[int, _Transfer] = {}
        # Owners all of whose blocks are on the device and some on the host as well, the longest so first.
        self._spare: dict[int, _Table] = {}
        self._spare_copies = 0
        self._next_copy = 1

    @property
    def free_blocks(self) -> int:
        """Blocks on the device that are nobody's."""
        return len(self._free)

    @property
    def free_host_blocks(self) -> int:
        """Places on the host for an offload: the free ones, and the spare copies of blocks that are on the device."""
        return len(self._free_host) + self._spare_copies

    @property
    def cached(self) -> int:
        """Blocks on the device that no owner has and whose KV is kept for who may come."""
        return 0

    @property
    def cached_host(self) -> int:
        """The same on the host."""
        return 0

    @property
    def transfers(self) -> int:
        """Copies that are not acknowledged."""
        return len(self._transfers)

    def owners(self) -> set[int]:
        """Those that have blocks."""
        return set(self._tables)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold the KV of `tokens` tokens."""
        return -(-tokens // self.block_size)

    def held(self, owner: int) -> int:
        """How many blocks the owner has, wherever they are."""
        table = self._tables.get(owner)
        return len(table.device) if table else 0

    def missing(self, owner: int) -> int:
        """How many of the owner's blocks are not on the device, or on their way to or from it; 0: it can run."""
        table = self._tables.get(owner)
        return table.missing if table else 0

    def moving(self, owner: int) -> int:
        """How many of the owner's blocks are in transfer."""
        table = self._tables.get(owner)
        return table.moving if table else 0

    def away(self, owner: int) -> int:
        """How many of the owner's blocks are on the host only, and not in transfer."""
        table = self._tables.get(owner)
        return table.missing - table.moving if table else 0

    def unsaved(self, owner: int) -> int:
        """How many of the owner's blocks are on the device only: what an offload has to copy."""
        table = self._tables.get(owner)
        return table.host.count(_NOWHERE) if table else 0

    # --- the device's blocks -----------------------------------------------------------------------------------------

    def capacity(self, owner: int) -> int:
        """Tokens the owner could have KV for if it were given every free block."""
        return (self.held(owner) + len(self._free)) * self.block_size

    def can_grow(self, owner: int, tokens: int) -> bool:
        """Whether the owner's table can be made to hold `tokens` tokens in all."""
        return tokens <= self.capacity(owner)

    def grow(self, owner: int, tokens: int) -> list[tuple[int, int]]:
        """Make the owner's table hold `tokens` tokens in all; returns what was added, as (index in table, block)."""
        table = self._tables.get(owner)
        first = len(table.device) if table else 0
        count = self.blocks_for(tokens) - first
        if count > len(self._free):
            raise ValueError(f"owner {owner} needs room for {tokens} tokens and can have {self.capacity(owner)}")
        if count <= 0:
            return []
        if table is None:
            table = self._tables[owner] = _Table()
        blocks = self._free[: -count - 1 : -1].tolist()
        del self._free[-count:]
        table.device += blocks
        table.host += [_NOWHERE] * count
        return list(enumerate(blocks, first))

    def release(self, owner: int) -> int:
        """Take back every block of the owner, those in transfer when that ends; returns how many there were."""
        table = self._tables.pop(owner, None)
        if table is None:
            return 0
        self._not_spare(owner)
        table.released = True
        busy = {index for transfer in self._transfers.values() if transfer.table is table for index in transfer.indices}
        for index in range(len(table.device) - 1, -1, -1):
            if index not in busy:
                self._give_back(table, index)
        return len(table.device)

    # --- between the tiers -------------------------------------------------------------------------------------------

    def can_offload(self, owner: int) -> bool:
        """Whether some of the owner's blocks can leave the device now, or begin to."""
        table = self._tables.get(owner)
        if table is None or table.moving:
            return False
        here = len(table.device) - table.missing
        return here > 0 and (self._has_saved_here(table) or self.free_host_blocks > 0)

    def offload(self, owner: int, blocks: int) -> tuple[list[CopyRow], int]:
        """Take up to `blocks` blocks off the device: those with a good copy on the host, then as many as find a place.

        Returns the copies to make and how many blocks became free at once, because their host copies were good.
        """
        if blocks < 1 or not self.can_offload(owner):
            raise ValueError(f"{blocks} blocks of owner {owner} cannot leave the device")
        table = self._tables[owner]
        self._not_spare(owner)
        here = [index for index, block in enumerate(table.device) if block != _NOWHERE]
        saved = [index for index in here if table.host[index] != _NOWHERE][:blocks]
        for index in saved:
            self._free.append(table.device[index])
            table.device[index] = _NOWHERE
        freed = len(saved)
        table.missing += freed
        copied = min(blocks - freed, self.free_host_blocks)
        indices = [index for index in here if table.host[index] == _NOWHERE][:copied]
        if not indices:
            return [], freed
        for index, place in zip(indices, self._take_host(len(indices)), strict=True):
            table.host[index] = place
        table.missing += len(indices)
        table.moving += len(indices)
        self.leaving += len(indices)
        copy = self._begin(_Transfer(table, owner, OFFLOAD, indices))
        return [(copy, OFFLOAD, table.device[index], table.host[index]) for index in indices], freed

    def recall(self, owner: int) -> bool:
        """Keep on the device what is being offloaded; its owner can run once acknowledged. False: nothing is."""
        found = False
        table = self._tables.get(owner)
        for transfer in self._transfers.values():
            if transfer.table is table and transfer.direction == OFFLOAD and not transfer.recalled:
                transfer.recalled = found = True
                self.leaving -= len(transfer.indices)
        return found

    def can_upload(self, owner: int) -> bool:
        """Whether the owner has blocks away, and the device has room for all of them."""
        return 0 < self.away(owner) <= len(self._free)

    def upload(self, owner: int) -> tuple[list[CopyRow], list[tuple[int, int]]]:
        """Bring back every block that is away; returns the copies to make and the table's new (index, block)."""
        if not self.can_upload(owner):
            raise ValueError(f"owner {owner} has {self.away(owner)} blocks away, and {len(self._free)} are free")
        table = self._tables[owner]
        indices = [index for index, block in enumerate(table.device) if block == _NOWHERE]
        for index in indices:
            table.device[index] = self._free.pop()
        table.moving += len(indices)
        copy = self._begin(_Transfer(table, owner, UPLOAD, indices))
        rows = [(copy, UPLOAD, table.host[index], table.device[index]) for index in indices]
        return rows, [(index, table.device[index]) for index in indices]

    def acknowledge(self, copy: int) -> tuple[int, int, int]:
        """A copy is done on all ranks; returns its owner, direction and blocks. Raises ValueError for one unknown."""
        transfer = self._transfers.pop(copy, None)
        if transfer is None:
            raise ValueError(f"copy {copy} is not under way")
        table, indices = transfer.table, transfer.indices
        table.moving -= len(indices)
        if transfer.direction == OFFLOAD:
            table.copies += len(indices)
            if not transfer.recalled:
                self.leaving -= len(indices)
        if table.released:
            for index in indices:
                self._give_back(table, index)
        elif transfer.direction == UPLOAD or transfer.recalled:
            table.missing -= len(indices)
            if table.copies and not table.missing:
                self._spare[transfer.owner] = table
                self._spare_copies += table.copies
        else:
            for index in indices:
                self._free.append(table.device[index])
                table.device[index] = _NOWHERE
        return transfer.owner, transfer.direction, len(indices)

    def wrote(self, owner: int, position: int) -> None:
        """The owner is about to write its KV at `position` and beyond: host copies from that block on are no good."""
        table = self._spare.get(owner)
        if table is None:
            return
        for index in range(len(table.host) - 1, position // self.block_size - 1, -1):
            if table.host[index] != _NOWHERE:
                self._drop_copy(table, index)
                self._spare_copies -= 1
        if not table.copies:
            del self._spare[owner]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _begin(self, transfer: _Transfer) -> int:
        copy = self._next_copy
        self._next_copy += 1
        self._transfers[copy] = transfer
        return copy

    def _give_back(self, table: _Table, index: int) -> None:
        if table.device[index] != _NOWHERE:
            self._free.append(table.device[index])
        if table.host[index] != _NOWHERE:
            self._free_host.append(table.host[index])

    def _drop_copy(self, table: _Table, index: int) -> None:
        self._free_host.append(table.host[index])
        table.host[index] = _NOWHERE
        table.copies -= 1

    def _not_spare(self, owner: int) -> None:
        table = self._spare.pop(owner, None)
        if table is not None:
            self._spare_copies -= table.copies

    def _has_saved_here(self, table: _Table) -> bool:
        """Whether a block is on the device and, in a good copy, on the host."""
        return table.copies > table.missing - table.moving

    def _take_host(self, count: int) -> list[int]:
        """Free places on the host, at the cost of spare copies where it must be."""
        while len(self._free_host) < count:
            owner, table = next(iter(self._spare.items()))
            index = next(i for i, place in enumerate(table.host) if place != _NOWHERE)
            self._drop_copy(table, index)
            self._spare_copies -= 1
            if not table.copies:
                del self._spare[owner]
        return sorted(self._free_host.popleft() for _ in range(count))

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every block of both tiers is in exactly one place and the counters are true."""
        tables = list(self._tables.values())
        gone = [t for t in self._transfers.values() if t.table.released]
        device = self._free.tolist() + [b for t in tables for b in t.device if b != _NOWHERE]
        device += [t.table.device[i] for t in gone for i in t.indices]
        host = list(self._free_host) + [b for t in tables for b in t.host if b != _NOWHERE]
        host += [t.table.host[i] for t in gone for i in t.indices]
        for places, count, where in ((device, self.num_blocks, "device"), (host, self.num_host_blocks, "host")):
            if sorted(places) != list(range(count)):
                raise RuntimeError(f"blocks of the {where} lost or doubled: {len(places)} places for {count} blocks")
        moving: dict[int, int] = {}
        unsaved: dict[int, int] = {}
        leaving = 0
        for transfer in self._transfers.values():
            moving[id(transfer.table)] = moving.get(id(transfer.table), 0) + len(transfer.indices)
            if transfer.direction == OFFLOAD:
                unsaved[id(transfer.table)] = unsaved.get(id(transfer.table), 0) + len(transfer.indices)
                leaving += 0 if transfer.recalled else len(transfer.indices)
        spare = 0
        for owner, table in self._tables.items():
            away = table.device.count(_NOWHERE)
            here = len(table.host) - table.host.count(_NOWHERE)
            if (
                table.missing != away + table.moving
                or table.moving != moving.get(id(table), 0)
                or table.copies != here - unsaved.get(id(table), 0)
                or any(d == h == _NOWHERE for d, h in zip(table.device, table.host, strict=True))
                or (owner in self._spare) != (table.missing == 0 and table.copies > 0)
            ):
                raise RuntimeError(f"the table of owner {owner} is out of step: {table}")
            spare += table.copies if owner in self._spare else 0
        if (spare, leaving) != (self._spare_copies, self.leaving):
            raise RuntimeError(f"{spare} spare copies and {leaving} leaving blocks, not as counted")
