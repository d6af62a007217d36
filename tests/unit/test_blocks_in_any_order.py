"""Blocks: everything that may happen to them, in any order, against a model that copies what lies in the pools."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastserve.kv import BlockManager, CopyRow, check_blocks
from fastserve.types import OFFLOAD, UPLOAD

SIZE = 4  # token slots of a block


POISON = -1


@dataclass(eq=False)
class Block:
    """A block as its owner sees it."""

    content: int  # what the owner wrote last
    device: int | None
    host: int | None = None
    transfer: int | None = None
    recalled: bool = False


@dataclass(eq=False)
class Copy:
    """A transfer: (source pool and place, destination pool and place, content when it began) of each block."""

    owner: int
    direction: int
    blocks: list[Block]
    moves: list[tuple[list[int], int, list[int], int, int]]
    released: bool = False


class TwoTiers(RuleBasedStateMachine):
    """Every counter is recounted from the model's blocks, and what lies in the pools is what owners wrote.

    The pools are as bad as they may be: what is free holds poison, and so does a destination until its copy is done.
    """

    NUM_BLOCKS, NUM_HOST_BLOCKS = 7, 5

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(self.NUM_BLOCKS, SIZE, self.NUM_HOST_BLOCKS)
        self.device, self.host = [POISON] * self.NUM_BLOCKS, [POISON] * self.NUM_HOST_BLOCKS
        self.tables: dict[int, list[Block]] = {}
        self.copies: dict[int, Copy] = {}
        self.writing: dict[int, int] = {}  # owners that run, and the block from which on they write
        self.written = 0

    # The model's answers, counted anew every time.

    def table(self, owner: int) -> list[Block]:
        return self.tables.get(owner, [])

    def here(self, owner: int) -> list[Block]:
        return [block for block in self.table(owner) if block.device is not None and block.transfer is None]

    def absent(self, owner: int) -> list[Block]:
        return [block for block in self.table(owner) if block.device is None]

    def moving(self, owner: int) -> list[Block]:
        return [block for block in self.table(owner) if block.transfer is not None]

    def is_spare(self, owner: int) -> bool:
        return len(self.here(owner)) == len(self.table(owner)) > 0

    def places(self, *, without: int | None = None) -> int:
        """Host places to be had: all but those of blocks in transfer and of owners that are not all here."""
        taken = sum(
            block.host is not None
            for owner, table in self.tables.items()
            if owner == without or not self.is_spare(owner)
            for block in table
        )
        return self.NUM_HOST_BLOCKS - taken - sum(len(copy.blocks) for copy in self.copies.values() if copy.released)

    def free_device(self) -> set[int]:
        return set(range(self.NUM_BLOCKS)) - self.used("device")

    def used(self, pool: str) -> set[int]:
        blocks = [block for table in self.tables.values() for block in table]
        blocks += [block for copy in self.copies.values() if copy.released for block in copy.blocks]
        return {place for block in blocks if (place := getattr(block, pool)) is not None}

    def poison_what_is_free(self) -> None:
        for name, pool in (("device", self.device), ("host", self.host)):
            for place in set(range(len(pool))) - self.used(name):
                pool[place] = POISON

    def write(self, block: Block) -> None:
        assert block.device is not None and block.transfer is None
        self.written += 1
        block.content = self.device[block.device] = self.written

    def begin(self, owner: int, direction: int, blocks: list[Block], rows: list[CopyRow]) -> None:
        """Start the copy that the rows describe, of exactly these blocks."""
        numbers = {row[0] for row in rows}
        assert len(numbers) == 1 and not numbers & self.copies.keys()
        number = numbers.pop()
        pools = (self.device, self.host) if direction == OFFLOAD else (self.host, self.device)
        moves = []
        for block, (_, way, source, destination) in zip(blocks, rows, strict=True):
            assert way == direction
            assert (source, destination) == (
                (block.device, block.host) if direction == OFFLOAD else (block.host, block.device)
            )
            block.transfer, block.recalled = number, False
            pools[1][destination] = POISON
            moves.append((pools[0], source, pools[1], destination, pools[0][source]))
        self.copies[number] = Copy(owner, direction, blocks, moves)

    # What may happen.

    owners = st.integers(0, 3)

    @rule(owner=owners, tokens=st.integers(1, 5 * SIZE))
    def grow(self, owner: int, tokens: int) -> None:
        table, idle = self.table(owner), self.free_device()
        needed = max(0, -(-tokens // SIZE) - len(table))
        if needed > len(idle):
            with pytest.raises(ValueError, match=f"needs {needed} blocks"):
                self.blocks.grow(owner, tokens)
            return
        added = self.blocks.grow(owner, tokens)
        assert [index for index, _ in added] == list(range(len(table), len(table) + needed))
        assert len({block for _, block in added} & idle) == needed
        for _, place in added:
            block = Block(POISON, place)
            self.tables.setdefault(owner, []).append(block)
            self.write(block)

    @rule(owner=owners, position=st.integers(0, 5 * SIZE - 1))
    def run(self, owner: int, position: int) -> None:
        """The owner gets a row and writes from `position` on; only one whose blocks are all here does."""
        if not self.is_spare(owner) or position > SIZE * len(self.table(owner)):
            return
        self.blocks.wrote(owner, position)
        self.writing[owner] = position // SIZE
        for block in self.table(owner)[position // SIZE :]:
            block.host = None
        self.poison_what_is_free()

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def write_on(self, data: st.DataObject) -> None:
        """Who runs goes on writing behind where it began, without saying so again."""
        owner = data.draw(st.sampled_from(sorted(self.writing)))
        for block in self.table(owner)[self.writing[owner] :]:
            self.write(block)

    @rule(owner=owners, count=st.integers(1, 6))
    def offload(self, owner: int, count: int) -> None:
        here = self.here(owner)
        saved = [block for block in here if block.host is not None]
        unsaved = [block for block in here if block.host is None]
        places = self.places(without=owner)
        possible = bool(here) and not self.moving(owner) and (bool(saved) or places > 0)
        assert self.blocks.can_offload(owner) == possible
        if not possible:
            with pytest.raises(ValueError, match="cannot leave"):
                self.blocks.offload(owner, count)
            return
        self.writing.pop(owner, None)  # who loses blocks does not run
        rows, freed = self.blocks.offload(owner, count)
        assert freed == min(count, len(saved))
        for block in saved[:freed]:
            block.device = None
        leave = unsaved[: count - freed]
        assert len(rows) == min(len(leave), places)
        for block, row in zip(leave, rows, strict=False):
            self.take_place(row[3])
            block.host = row[3]
        if rows:
            self.begin(owner, OFFLOAD, leave[: len(rows)], rows)
        self.poison_what_is_free()

    def take_place(self, place: int) -> None:
        """A place on the host has a new use: it was free, or held a copy of a block whose owner is all here."""
        for owner, table in self.tables.items():
            for block in table:
                if block.host == place:
                    assert self.is_spare(owner)
                    block.host = None
        assert place not in self.used("host")

    @rule(owner=owners)
    def recall(self, owner: int) -> None:
        leaving = [b for c in self.copies.values() if c.direction == OFFLOAD and not c.released for b in c.blocks]
        leaving = [block for block in leaving if block in self.table(owner) and not block.recalled]
        assert self.blocks.recall(owner) == bool(leaving)
        for block in leaving:
            block.recalled = True

    @rule(owner=owners)
    def upload(self, owner: int) -> None:
        absent, idle = self.absent(owner), self.free_device()
        possible = 0 < len(absent) <= len(idle)
        assert self.blocks.can_upload(owner) == possible
        if not possible:
            with pytest.raises(ValueError, match="blocks away"):
                self.blocks.upload(owner)
            return
        rows, table = self.blocks.upload(owner)
        assert [self.table(owner)[index] for index, _ in table] == absent
        assert len({place for _, place in table} & idle) == len(absent)
        for block, (_, place) in zip(absent, table, strict=True):
            block.device = place
        self.begin(owner, UPLOAD, absent, rows)

    @rule(owner=owners)
    def release(self, owner: int) -> None:
        assert self.blocks.release(owner) == len(self.table(owner))
        gone = self.tables.pop(owner, [])
        self.writing.pop(owner, None)
        for copy in self.copies.values():
            copy.released |= any(block in gone for block in copy.blocks)
        self.poison_what_is_free()

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.copies)))
        copy = self.copies.pop(number)
        for source, place, destination, to, content in copy.moves:
            assert source[place] == content, "the source was written to while it was copied"
            assert destination[to] == POISON, "the destination was written to while it was copied to"
            destination[to] = content
        assert self.blocks.acknowledge(number)[:3] == (copy.owner, copy.direction, len(copy.blocks))
        for block in copy.blocks:
            block.transfer = None
            if copy.direction == OFFLOAD and not block.recalled:
                block.device = None
            block.recalled = False
        self.poison_what_is_free()

    # What always holds.

    @invariant()
    def every_counter_is_true(self) -> None:
        blocks = self.blocks
        check_blocks(blocks)
        assert blocks.owners() == set(self.tables)
        assert blocks.free_blocks == len(self.free_device())
        assert blocks.free_host_blocks == self.places()
        assert blocks.transfers == len(self.copies)
        offloads = [copy for copy in self.copies.values() if copy.direction == OFFLOAD]
        assert blocks.leaving == sum(not block.recalled for copy in offloads for block in copy.blocks)
        for owner in range(4):
            table, absent, moving = self.table(owner), self.absent(owner), self.moving(owner)
            assert blocks.held(owner) == len(table)
            assert blocks.missing(owner) == len(absent) + len(moving)
            assert (blocks.moving(owner), blocks.away(owner)) == (len(moving), len(absent))
            here = self.here(owner)
            assert blocks.leavable(owner) == (len(here), sum(block.host is None for block in here))

    @invariant()
    def nothing_is_lost(self) -> None:
        """A block on the device reads what was written; one that is away will, and so would one with a good copy."""
        for table in self.tables.values():
            for block in table:
                if block.transfer is None:
                    assert block.device is None or self.device[block.device] == block.content
                    assert block.host is None or self.host[block.host] == block.content
                    assert block.device is not None or block.host is not None

    def teardown(self) -> None:
        for owner in list(self.tables):
            self.blocks.release(owner)
        for number in list(self.copies):
            self.blocks.acknowledge(number)
        blocks = self.blocks
        assert (blocks.free_blocks, blocks.free_host_blocks, blocks.leaving) == (
            self.NUM_BLOCKS, self.NUM_HOST_BLOCKS, 0
        )  # fmt: skip


class DeviceOnly(TwoTiers):
    NUM_HOST_BLOCKS = 0


class RoomyHost(TwoTiers):
    NUM_BLOCKS, NUM_HOST_BLOCKS = 9, 20


for machine in (TwoTiers, DeviceOnly, RoomyHost):
    machine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None, derandomize=True)
TestTwoTiers, TestDeviceOnly, TestRoomyHost = TwoTiers.TestCase, DeviceOnly.TestCase, RoomyHost.TestCase
