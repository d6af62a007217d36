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

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from ..types import OFFLOAD, UPLOAD
from .block import NOWHERE, Block, Table
from .cache import PrefixCache
from .few import with_one, without_one
from .places import Places
from .tables import Tables, leavable
from .transfers import CopyRow, Transfers


class Done(NamedTuple):
    """What a copy has done."""

    owner: int | None
    direction: int
    blocks: int
    returned: list[int]  # owners all of whose blocks are on the device now


class BlockManager(Tables):
    """`num_blocks` blocks of `block_size` token slots on the device, `num_host_blocks` on the host.

    An owner is any integer; the scheduler uses Job.index.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int = 0,
        weights: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """`weights`: of the accounts that owners' blocks count for; 1 for those not there."""
        super().__init__()
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.block_size = block_size
        self.cache = PrefixCache(num_blocks + num_host_blocks, weights, self.accounts)
        self._places = Places(num_blocks, num_host_blocks, self.cache)
        self._transfers = Transfers()

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
        return len(self._transfers.under_way)

    @property
    def leaving(self) -> int:
        """Blocks on the device that acknowledgements of offloads will free."""
        return self._transfers.leaving

    def readable(self, path: Sequence[Block]) -> int:
        """How many blocks of a path, from its beginning on, an iteration can read."""
        if not (self.transfers or self.cached_host or self.gone or self.partial):  # all blocks are on the device
            return len(path)
        return next((index for index, block in enumerate(path) if not block.here), len(path))

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold the KV of `tokens` tokens."""
        return -(-tokens // self.block_size)

    def _count(self, table: Table, blocks: int) -> None:
        super()._count(table, blocks)
        if blocks > 0:
            self.cache.grew(table.accounts)

    # --- the device's blocks -----------------------------------------------------------------------------------------

    def grow(self, owner: int, tokens: int, accounts: tuple[str, ...] = ()) -> list[tuple[int, int]]:
        """Make the owner's table hold `tokens` tokens in all; returns what was added, as (index in table, block).

        `accounts`: what the blocks of an owner that has none yet count for.
        """
        table = self._tables.get(owner)
        first = len(table.blocks) if table else 0
        count = self.blocks_for(tokens) - first
        if count > self.free_blocks:
            raise ValueError(f"owner {owner} needs {count} blocks for {tokens} tokens, and {self.free_blocks} are free")
        if count <= 0:
            return []
        if table is None:
            self._added(table := Table(owner, accounts))
        places = self._places.take(count)
        self._count(table, count)
        table.blocks += [Block(place, table.alone) for place in places]
        self._classify(table)
        return list(enumerate(places, first))

    def attach(self, owner: int, path: Sequence[Block], accounts: tuple[str, ...] = ()) -> None:
        """An owner without blocks begins with some of the index, wherever they are: a path from its beginning."""
        if owner in self._tables or not path:
            raise ValueError(f"owner {owner} cannot begin with {len(path)} blocks")
        self._added(table := Table(owner, accounts, list(path), shared=len(path)))
        new = 0
        for block in path:
            owners = block.tables
            block.tables = with_one(owners, table) if owners else table.alone
            if not owners and block.device != NOWHERE:
                new += 1
            if block.transfer is None:
                if not owners:
                    self.cache.wakes(block)
                table.missing += block.device == NOWHERE
            else:
                if block.transfer == OFFLOAD:
                    self._transfers.keep(block)
                table.moving += 1
                table.missing += 1
        self._count(table, new)
        for block in path if table.missing else ():
            self._places.spare.pop(block, None)
        self._classify(table)

    def exchange(self, owner: int, path: Sequence[Block]) -> bool:
        """Have an owner that does not run give up its own blocks for those of the index, all of them on the device.

        False where that cannot be: it has some away, has fewer (more would be taken from those that count as free), or
        they are no continuation of what it shares.
        """
        table = self._tables[owner]
        if table.missing or len(path) > len(table.blocks) or path[: table.shared] != table.blocks[: table.shared]:
            return False
        for index in range(table.shared, len(path)):
            block = path[index]
            if not block.tables:
                self.cache.wakes(block)
                self._count(table, 1)
            block.tables = with_one(block.tables, table)
            own, table.blocks[index] = table.blocks[index], block
            own.tables = ()
            self._count(table, -1)
            self._places.rest(own)
        table.shared, table.diverged = len(path), False
        return True

    def release(self, owner: int) -> int:
        """Take back every block of the owner, those in transfer when that ends; returns how many there were."""
        table = self._removed(owner)
        if table is None:
            return 0
        whole = not table.missing
        for block in reversed(table.blocks):
            block.tables = without_one(block.tables, table)
            if not block.tables:
                if block.device != NOWHERE:
                    self._count(table, -1)
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
            if self.cache.insert(table.blocks[table.shared], key, tokens, parent, cost, table.accounts):
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
            if self.cache.insert(block, key, tokens, parent, cost, table.accounts):
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
        blocks = leavable(table)
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
        here = leavable(table)
        saved = [block for block in here if block.host != NOWHERE][:blocks]
        for block in saved:
            self._places.leave_device(block)
            self._count(table, -1)
            self._changed(block.tables, missing=1)
        freed = len(saved)
        copied = min(blocks - freed, self.free_host_blocks)
        leaving = [block for block in here if block.host == NOWHERE][:copied]
        for block, place in zip(leaving, self._places.take_host(len(leaving)), strict=True):
            block.host = place
            self._changed(block.tables, missing=1, moving=1)
        return self._begin_offload(owner, leaving), freed

    def _begin_offload(self, owner: int | None, blocks: Sequence[Block]) -> list[CopyRow]:
        copies = self._transfers.begin(owner, OFFLOAD, blocks)
        for block in blocks:
            self.cache.moved(block)
        return copies

    def save(self, blocks: int) -> list[CopyRow]:
        """Copy up to `blocks` blocks of the cache to the host, in place of what is worth less there.

        They stay on the device, and what they hold is not lost when their places there are needed. Returns the copies.
        """
        saving: list[Block] = []
        while len(saving) < blocks and (block := self.cache.unsaved()) is not None:
            if not self._places.free_host:
                worse = self.cache.coldest_on_host(block)
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
            self._transfers.keep(block)
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
            self._count(table, 1)
            self._changed(block.tables, moving=1)
        rows = self._transfers.begin(owner, UPLOAD, coming)
        return rows, [(index, table.blocks[index].device) for index in indices]

    def acknowledge(self, copy: int) -> Done:
        """A copy is done on all ranks. Raises ValueError for one unknown."""
        transfer = self._transfers.end(copy)
        returned: dict[int, None] = {}
        for block in reversed(transfer.blocks):  # the ends of paths first, as they are used
            stays = block.transfer == UPLOAD or block.stays
            wanted = bool(block.tables or block.key is not None)
            block.transfer, block.stays = None, False
            if not stays and wanted:
                self._places.leave_device(block)
                if block.tables:
                    self._count(next(iter(block.tables)), -1)
            self.cache.moved(block)
            self._changed(block.tables, missing=-1 if stays else 0, moving=-1)
            if not block.tables:
                self._places.rest(block)
            elif stays:
                returned.update(dict.fromkeys(table.owner for table in block.tables if not table.missing))
        for block in dict.fromkeys(block for owner in returned for block in self._tables[owner].blocks):
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
