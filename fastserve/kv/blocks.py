"""Where every KV block is, and who has it. Bookkeeping only: nothing here touches memory, and nothing here decides.

                    grow                     offload                    acknowledge
    free on device ──────▶ RESIDENT ──────────────────────▶ OFFLOADING ─────────────▶ AWAY (host copy only)
          ▲                 │    ▲                              │ recalled               │
          │ release         │    └──────────────────────────────┴── UPLOADING ◀──────────┘
          └─────────────────┘          acknowledge                          upload

A block has an optional place on the device, an optional place on the host and at most one transfer, which only
`acknowledge` ends. Full blocks never change, so the host copy of a block that was brought back stays good and leaves
again without a copy, until somebody needs its place. Every action `x` that can fail has a question `can_x`; acting
without asking raises.

Owners share the blocks of what they have in common (`attach`), and a shared one leaves the device with the last of them
that has all of its blocks there. What nobody has any more, and the index knows, is cache: its place counts as free,
and is taken when no other is left; what is worth least goes first (cache.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..types import OFFLOAD, UPLOAD
from .block import NOWHERE, Block, Table
from .cache import PrefixCache
from .places import Places

CopyRow = tuple[int, int, int, int]  # copy, direction, source block, destination block


@dataclass(slots=True)
class _Transfer:
    owner: int | None  # None: of blocks that nobody had
    direction: int
    blocks: list[Block]


class Done(NamedTuple):
    """What a copy has done."""

    owner: int | None
    direction: int
    blocks: int
    returned: list[int]  # owners all of whose blocks are on the device now


class BlockManager:
    """`num_blocks` blocks of `block_size` token slots on the device, `num_host_blocks` on the host.

    An owner is any integer; the scheduler uses Job.index.
    """

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.block_size = block_size
        self.leaving = 0  # device blocks that acknowledgements of offloads will free
        self.cache = PrefixCache()
        self.gone = 0  # owners without a block on the device, though they have some
        self.partial: dict[int, None] = {}  # those with some on the device, and others not
        self._places = Places(num_blocks, num_host_blocks, self.cache)
        self._tables: dict[int, Table] = {}
        self._transfers: dict[int, _Transfer] = {}
        self._next_copy = 1

    @property
    def free_blocks(self) -> int:
        """Blocks on the device that are nobody's, cache included."""
        return len(self._places.free) + self.cache.cached

    @property
    def idle_blocks(self) -> int:
        """Those of them that hold nothing."""
        return len(self._places.free)

    @property
    def free_host_blocks(self) -> int:
        """Places on the host for an offload: those without use, and of spare copies, and of what is only cache."""
        return len(self._places.free_host) + len(self._places.spare) + self.cache.cached_host

    @property
    def cached(self) -> int:
        """Blocks on the device that no owner has and whose KV is kept for who may come."""
        return self.cache.cached

    @property
    def cached_host(self) -> int:
        """The same on the host."""
        return self.cache.cached_host

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
        return len(table.blocks) if table else 0

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
        return sum([block.host == NOWHERE for block in table.blocks]) if table else 0

    def leavable(self, owner: int) -> tuple[int, int]:
        """How many blocks would leave the device with the owner, and how many of them need a copy."""
        table = self._tables.get(owner)
        blocks = _leavable(table) if table else []
        return len(blocks), sum([block.host == NOWHERE for block in blocks])

    def table(self, owner: int) -> list[tuple[int, int]]:
        """The owner's whole table, which is on the device, as (index, block)."""
        table = self._tables.get(owner)
        return [(index, block.device) for index, block in enumerate(table.blocks)] if table else []

    def path(self, owner: int) -> list[Block]:
        """Those of the owner's blocks that are in the index."""
        table = self._tables.get(owner)
        return table.blocks[: table.shared] if table else []

    def common(self, owner: int) -> int:
        """How many of the owner's blocks, from the first on, others have, too."""
        table = self._tables.get(owner)
        if table is None:
            return 0
        return next((i for i, block in enumerate(table.blocks) if len(block.tables) == 1), len(table.blocks))

    # --- the device's blocks -----------------------------------------------------------------------------------------

    def capacity(self, owner: int) -> int:
        """Tokens the owner could have KV for if it were given every free block."""
        return (self.held(owner) + self.free_blocks) * self.block_size

    def can_grow(self, owner: int, tokens: int) -> bool:
        """Whether the owner's table can be made to hold `tokens` tokens in all."""
        return tokens <= self.capacity(owner)

    def grow(self, owner: int, tokens: int) -> list[tuple[int, int]]:
        """Make the owner's table hold `tokens` tokens in all; returns what was added, as (index in table, block)."""
        table = self._tables.get(owner)
        first = len(table.blocks) if table else 0
        count = self.blocks_for(tokens) - first
        if count > self.free_blocks:
            raise ValueError(f"owner {owner} needs room for {tokens} tokens and can have {self.capacity(owner)}")
        if count <= 0:
            return []
        if table is None:
            table = self._tables[owner] = Table(owner)
        places = self._places.take(count)
        table.blocks += [Block(place, table.alone) for place in places]
        self._classify(table)
        return list(enumerate(places, first))

    def attach(self, owner: int, path: Sequence[Block]) -> None:
        """An owner without blocks begins with some of the index, wherever they are: a path from its beginning."""
        if owner in self._tables or not path:
            raise ValueError(f"owner {owner} cannot begin with {len(path)} blocks")
        table = self._tables[owner] = Table(owner, list(path), shared=len(path))
        for block in path:
            if not block.tables and block.transfer is None:
                self.cache.wakes(block)
            block.tables = (*block.tables, table)
            if block.transfer == OFFLOAD:
                self._stay(block)
            table.moving += block.transfer is not None
            table.missing += not block.here
        for block in path if table.missing else ():
            self._places.spare.pop(block, None)
        self._classify(table)

    def exchange(self, owner: int, path: Sequence[Block]) -> bool:
        """Have an owner that does not run give up its own blocks for those of the index, all of them on the device.

        False where that cannot be: it has some away, or they are no continuation of what it shares.
        """
        table = self._tables[owner]
        if table.missing or path[: table.shared] != table.blocks[: table.shared]:
            return False
        for index in range(table.shared, len(path)):
            block = path[index]
            if not block.tables:
                self.cache.wakes(block)
            block.tables = (*block.tables, table)
            if index < len(table.blocks):
                own, table.blocks[index] = table.blocks[index], block
                own.tables = ()
                self._places.rest(own)
            else:
                table.blocks.append(block)
        table.shared, table.diverged = len(path), False
        return True

    def release(self, owner: int) -> int:
        """Take back every block of the owner, those in transfer when that ends; returns how many there were."""
        table = self._tables.pop(owner, None)
        if table is None:
            return 0
        whole = not table.missing
        self.gone -= table.gone
        self.partial.pop(owner, None)
        for block in reversed(table.blocks):
            block.tables = () if len(block.tables) == 1 else tuple([each for each in block.tables if each is not table])
            if not block.tables:
                if block.transfer is None:
                    self._places.rest(block)
            elif not whole:
                self._places.check_spare(block)
        return len(table.blocks)

    # --- the index ---------------------------------------------------------------------------------------------------

    def share(self, owner: int, keys: Sequence[tuple[bytes, bytes, float]]) -> list[bytes]:
        """Put the owner's next blocks into the index: each with its key, its tokens and what it costs to compute.

        All of their KV is computed, or will be before any later iteration. Returns the keys that are in it now. Another
        owner's block that holds the same ends it: this one's are its own, then, until it leaves.
        """
        table = self._tables[owner]
        new: list[bytes] = []
        for key, tokens, cost in () if table.diverged else keys:
            parent = table.blocks[table.shared - 1] if table.shared else None
            if self.cache.insert(table.blocks[table.shared], key, tokens, parent, cost):
                new.append(key)
            elif not self._revive(table, key, tokens, parent):
                table.diverged = True
                break
            table.shared += 1
        return new

    def _revive(self, table: Table, key: bytes, tokens: bytes, parent: Block | None) -> bool:
        """Where what the owner has computed rests on the host, which was too far away, let it have this one's place."""
        found = self.cache.find(key, tokens, parent)
        if found is None or found.tables or found.device != NOWHERE or found.transfer is not None:
            return False
        self.cache.wakes(found)
        own, table.blocks[table.shared] = table.blocks[table.shared], found
        found.device, own.device = own.device, NOWHERE
        found.tables = own.tables
        self.cache.moved(found)
        self._places.check_spare(found)
        return True

    def shared(self, owner: int) -> int:
        """How many of the owner's blocks are in the index."""
        table = self._tables.get(owner)
        return table.shared if table else 0

    def bequeath(self, owner: int, keys: Sequence[tuple[bytes, bytes, float]], keep: float = 0.0) -> list[bytes]:
        """The owner is about to leave: put what it has into the index, all its blocks from the first unshared one on.

        Where others have computed the same, theirs are what stays. `keep`: until when it is sure to be wanted. Returns
        the keys that are in it now.
        """
        table = self._tables[owner]
        path = table.blocks[: table.shared]
        new: list[bytes] = []
        for block, (key, tokens, cost) in zip(table.blocks[table.shared :], keys, strict=False):
            parent = path[-1] if path else None
            if self.cache.insert(block, key, tokens, parent, cost):
                new.append(key)
            elif (found := self.cache.find(key, tokens, parent)) is not None:
                block = found
            else:
                break
            path.append(block)
        self.cache.touch(path, keep)
        return new

    # --- between the tiers -------------------------------------------------------------------------------------------

    def can_offload(self, owner: int) -> bool:
        """Whether some of the owner's blocks can leave the device now, or begin to."""
        table = self._tables.get(owner)
        if table is None or table.moving:
            return False
        blocks = _leavable(table)
        if not blocks or any(block.host != NOWHERE for block in blocks):
            return bool(blocks)
        own = sum([block in self._places.spare for block in table.blocks])  # which it keeps, once some are away
        return self.free_host_blocks > own

    def offload(self, owner: int, blocks: int) -> tuple[list[CopyRow], int]:
        """Take up to `blocks` blocks off the device: those with a good copy on the host, then as many as find a place.

        Returns the copies to make and how many blocks became free at once, because their host copies were good.
        """
        if blocks < 1 or not self.can_offload(owner):
            raise ValueError(f"{blocks} blocks of owner {owner} cannot leave the device")
        table = self._tables[owner]
        if not table.missing:
            for block in table.blocks:
                self._places.spare.pop(block, None)
        here = _leavable(table)
        saved = [block for block in here if block.host != NOWHERE][:blocks]
        for block in saved:
            self._places.leave_device(block)
            self._changed(block, missing=1)
        freed = len(saved)
        copied = min(blocks - freed, self.free_host_blocks)
        leaving = [block for block in here if block.host == NOWHERE][:copied]
        for block, place in zip(leaving, self._places.take_host(len(leaving)), strict=True):
            block.host = place
            self._changed(block, missing=1, moving=1)
        return self._begin_offload(owner, leaving), freed

    def save(self, blocks: int) -> list[CopyRow]:
        """Copy up to `blocks` blocks of the cache to the host, in place of what is worth less there.

        They stay on the device, and what they hold is not lost when their places there are needed. Returns the copies.
        """
        saving: list[Block] = []
        while len(saving) < blocks and (block := self.cache.unsaved()) is not None:
            if not self._places.free_host:
                worse = self.cache.coldest_on_host(block.score)
                if worse is None:
                    self.cache.rests(block)
                    break
                self._places.throw_away(worse)
            block.host = self._places.take_host(1)[0]
            block.stays = True
            block.transfer = OFFLOAD  # at once: to make place for the next one, all that rests below another may go
            saving.append(block)
        return self._begin_offload(None, saving)

    def recall(self, owner: int) -> bool:
        """Keep on the device what is being offloaded; its owner can run once acknowledged. False: nothing is."""
        table = self._tables.get(owner)
        leaving = [
            block
            for block in (table.blocks if table and table.moving else ())
            if block.transfer == OFFLOAD and not block.stays
        ]
        for block in leaving:
            self._stay(block)
        return bool(leaving)

    def can_upload(self, owner: int) -> bool:
        """Whether the owner has blocks away, and the device has room for all of them."""
        return 0 < self.away(owner) <= self.free_blocks

    def upload(self, owner: int) -> tuple[list[CopyRow], list[tuple[int, int]]]:
        """Bring back every block that is away; returns the copies to make and the table's new (index, block)."""
        if not self.can_upload(owner):
            raise ValueError(f"owner {owner} has {self.away(owner)} blocks away, and {self.free_blocks} are free")
        table = self._tables[owner]
        indices = [index for index, block in enumerate(table.blocks) if block.device == NOWHERE]
        coming = [table.blocks[index] for index in indices]
        for block, place in zip(coming, self._places.take(len(coming)), strict=True):
            block.device = place
            block.transfer = UPLOAD
            self._changed(block, moving=1)
        copy = self._begin(_Transfer(owner, UPLOAD, coming))
        rows = [(copy, UPLOAD, block.host, block.device) for block in coming]
        return rows, [(index, table.blocks[index].device) for index in indices]

    def acknowledge(self, copy: int) -> Done:
        """A copy is done on all ranks. Raises ValueError for one unknown."""
        transfer = self._transfers.pop(copy, None)
        if transfer is None:
            raise ValueError(f"copy {copy} is not under way")
        returned: dict[int, None] = {}
        for block in reversed(transfer.blocks):  # the ends of paths first, as they are used
            stays = block.transfer == UPLOAD or block.stays
            wanted = bool(block.tables or block.key is not None)
            if transfer.direction == OFFLOAD and not block.stays:
                self.leaving -= 1
            block.transfer, block.stays = None, False
            if not stays and wanted:
                self._places.leave_device(block)
            self.cache.moved(block)
            self._changed(block, missing=-1 if stays else 0, moving=-1)
            if not block.tables:
                self._places.rest(block)
            elif stays:
                returned.update(dict.fromkeys(table.owner for table in block.tables if not table.missing))
        for owner in returned:
            for block in self._tables[owner].blocks:
                self._places.check_spare(block)
        return Done(transfer.owner, transfer.direction, len(transfer.blocks), list(returned))

    def wrote(self, owner: int, position: int) -> None:
        """The owner is about to write its KV at `position` and beyond: host copies from that block on are no good."""
        table = self._tables.get(owner)
        if table is None or table.missing:
            return
        for block in table.blocks[position // self.block_size :]:
            if block.host != NOWHERE:
                self._places.drop_copy(block)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _stay(self, block: Block) -> None:
        """A block that is being offloaded is wanted again."""
        if not block.stays:
            block.stays = True
            self.leaving -= 1

    def _begin_offload(self, owner: int | None, blocks: Iterable[Block]) -> list[CopyRow]:
        leaving = list(blocks)
        if not leaving:
            return []
        for block in leaving:
            block.transfer = OFFLOAD
            self.cache.moved(block)
            self.leaving += not block.stays
        copy = self._begin(_Transfer(owner, OFFLOAD, leaving))
        return [(copy, OFFLOAD, block.device, block.host) for block in leaving]

    def _begin(self, transfer: _Transfer) -> int:
        copy = self._next_copy
        self._next_copy += 1
        self._transfers[copy] = transfer
        return copy

    def _changed(self, block: Block, missing: int = 0, moving: int = 0) -> None:
        """So many more of its owners' blocks are missing, or moving."""
        for table in block.tables:
            table.missing += missing
            table.moving += moving
            self._classify(table)

    def _classify(self, table: Table) -> None:
        """Whether the owner has all, some or none of its blocks on the device."""
        gone = table.missing - table.moving == len(table.blocks)
        self.gone += gone - table.gone
        table.gone = gone
        if 0 < table.missing < len(table.blocks):
            self.partial[table.owner] = None
        else:
            self.partial.pop(table.owner, None)


def _leavable(table: Table) -> list[Block]:
    """Blocks on the device that nobody else needs there: others that have them lack some of theirs."""
    return [
        block
        for block in table.blocks
        if block.here and (len(block.tables) == 1 or all(each is table or each.missing for each in block.tables))
    ]
