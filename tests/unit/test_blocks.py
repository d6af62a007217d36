"""Blocks: the states of the module's diagram, one by one."""

from __future__ import annotations

import pytest

from fastserve.kv import BlockManager, check_blocks
from fastserve.types import OFFLOAD, UPLOAD


def counts(blocks: BlockManager, owner: int) -> tuple[int, int, int, int]:
    """held, missing, moving, away; after a look at everything else."""
    check_blocks(blocks)
    return blocks.held(owner), blocks.missing(owner), blocks.moving(owner), blocks.away(owner)


def free(blocks: BlockManager) -> tuple[int, int, int]:
    """Blocks free on the device, places free on the host, blocks that will be free on the device."""
    return blocks.free_blocks, blocks.free_host_blocks, blocks.leaving


def away(blocks: BlockManager, owner: int, tokens: int) -> list[tuple[int, int]]:
    """Let the owner have blocks for `tokens` tokens, all on the host; returns what it had on the device."""
    table = blocks.grow(owner, tokens)
    copies, _ = blocks.offload(owner, len(table))
    blocks.acknowledge(copies[0][0])
    assert counts(blocks, owner) == (len(table), len(table), 0, len(table))
    return table


# --- on the device alone ----------------------------------------------------------------------------------------------


def test_a_table_grows_by_whole_blocks() -> None:
    blocks = BlockManager(num_blocks=4, block_size=8)
    assert [index for index, _ in blocks.grow(1, 9)] == [0, 1]
    assert blocks.grow(1, 16) == []
    assert [index for index, _ in blocks.grow(1, 17)] == [2]
    assert (blocks.held(1), blocks.free_blocks) == (3, 1)


def test_growing_takes_nothing_when_it_cannot() -> None:
    blocks = BlockManager(num_blocks=3, block_size=4)
    blocks.grow(1, 8)
    with pytest.raises(ValueError, match="owner 2 needs 2 blocks for 5 tokens, and 1 are free"):
        blocks.grow(2, 5)
    assert blocks.free_blocks == 1 and blocks.owners() == {1}
    check_blocks(blocks)


def test_released_blocks_can_be_had_again() -> None:
    blocks = BlockManager(num_blocks=2, block_size=4)
    taken = {block for _, block in blocks.grow(1, 8)}
    assert blocks.release(1) == 2
    assert blocks.release(1) == 0
    assert {block for _, block in blocks.grow(2, 8)} == taken


def test_integrity_notices_a_lost_and_a_doubled_block() -> None:
    lost, doubled, lost_on_host = BlockManager(3, 4), BlockManager(3, 4), BlockManager(3, 4, 2)
    lost._places.free.pop()
    doubled._places.free[0] = doubled._places.free[1]
    lost_on_host._places.free_host.pop()
    for blocks in (lost, doubled, lost_on_host):
        with pytest.raises(RuntimeError, match="lost or doubled"):
            check_blocks(blocks)


# --- between the tiers ------------------------------------------------------------------------------------------------


def test_a_block_leaves_and_comes_back() -> None:
    """RESIDENT → OFFLOADING → AWAY → UPLOADING → RESIDENT."""
    blocks = BlockManager(num_blocks=3, block_size=4, num_host_blocks=5)
    before = blocks.grow(1, 8)
    assert (blocks.leavable(1), free(blocks)) == ((2, 2), (1, 5, 0))

    copies, freed = blocks.offload(1, 2)
    assert [(direction, source) for _, direction, source, _ in copies] == [(OFFLOAD, block) for _, block in before]
    assert len({copy for copy, *_ in copies}) == 1 and freed == 0
    assert (counts(blocks, 1), blocks.leavable(1), free(blocks)) == ((2, 2, 2, 0), (0, 0), (1, 3, 2))
    assert not blocks.can_offload(1) and not blocks.can_upload(1)

    assert blocks.acknowledge(copies[0][0])[:3] == (1, OFFLOAD, 2)
    assert (counts(blocks, 1), free(blocks)) == ((2, 2, 0, 2), (3, 3, 0))

    back, table = blocks.upload(1)
    assert [(direction, source) for _, direction, source, _ in back] == [(UPLOAD, place) for *_, place in copies]
    assert table == [(index, destination) for index, (*_, destination) in enumerate(back)]
    assert (counts(blocks, 1), free(blocks)) == ((2, 2, 2, 0), (1, 3, 0))

    assert blocks.acknowledge(back[0][0]) == (1, UPLOAD, 2, [1])
    # The host copies are good still; their places may be used for others all the same.
    assert (counts(blocks, 1), blocks.leavable(1), free(blocks)) == ((2, 0, 0, 0), (2, 0), (1, 5, 0))


def test_what_came_back_leaves_again_without_a_copy() -> None:
    blocks = BlockManager(num_blocks=3, block_size=4, num_host_blocks=4)
    away(blocks, 1, 9)
    blocks.acknowledge(blocks.upload(1)[0][0][0])
    assert blocks.offload(1, 2) == ([], 2)
    assert (counts(blocks, 1), free(blocks)) == ((3, 2, 0, 2), (2, 1, 0))


def test_a_block_that_was_written_to_is_copied_again() -> None:
    blocks = BlockManager(num_blocks=4, block_size=4, num_host_blocks=3)
    away(blocks, 1, 10)
    blocks.acknowledge(blocks.upload(1)[0][0][0])
    blocks.wrote(1, 10)  # in the third block, which was not full
    blocks.grow(1, 13)
    assert (blocks.leavable(1), blocks.free_host_blocks) == ((4, 2), 3)
    copies, freed = blocks.offload(1, 4)
    # Two whose copies are good; of the other two, one finds a place.
    assert (freed, len(copies)) == (2, 1)
    assert counts(blocks, 1) == (4, 3, 1, 2)


def test_a_part_of_a_job_leaves() -> None:
    blocks = BlockManager(num_blocks=4, block_size=4, num_host_blocks=4)
    blocks.grow(1, 16)
    copies, _ = blocks.offload(1, 1)
    blocks.acknowledge(copies[0][0])
    assert (counts(blocks, 1), blocks.leavable(1), blocks.can_offload(1)) == ((4, 1, 0, 1), (3, 3), True)
    copies, _ = blocks.offload(1, 2)
    assert (len(copies), counts(blocks, 1)) == (2, (4, 3, 2, 1))
    back, table = blocks.upload(1)  # what is away already may come back meanwhile
    assert (len(back), [index for index, _ in table], counts(blocks, 1)) == (1, [0], (4, 3, 3, 0))


def test_recalled_blocks_stay_and_their_copies_are_good() -> None:
    """OFFLOADING → RESIDENT."""
    blocks = BlockManager(num_blocks=2, block_size=4, num_host_blocks=2)
    table = blocks.grow(1, 8)
    copies, _ = blocks.offload(1, 2)
    assert blocks.recall(1) and not blocks.recall(1) and not blocks.recall(2)
    # The copy goes on: it reads the blocks, so nobody may write to them before it is done.
    assert (counts(blocks, 1), free(blocks)) == ((2, 2, 2, 0), (0, 0, 0))
    blocks.acknowledge(copies[0][0])
    assert (counts(blocks, 1), free(blocks)) == ((2, 0, 0, 0), (0, 2, 0))
    assert blocks.offload(1, 2) == ([], 2)
    assert len(table) == blocks.free_blocks


def test_spare_copies_make_room_for_others_the_oldest_first() -> None:
    blocks = BlockManager(num_blocks=6, block_size=4, num_host_blocks=4)
    for owner in (1, 2):
        away(blocks, owner, 8)
    for owner in (2, 1):
        blocks.acknowledge(blocks.upload(owner)[0][0][0])
    assert (blocks.free_host_blocks, blocks.leavable(1)[1], blocks.leavable(2)[1]) == (4, 0, 0)
    blocks.grow(3, 4)
    assert blocks.can_offload(3)
    blocks.offload(3, 1)
    assert (blocks.free_host_blocks, blocks.leavable(1)[1], blocks.leavable(2)[1]) == (3, 0, 1)


def test_no_place_on_the_host_is_no_error() -> None:
    blocks = BlockManager(num_blocks=4, block_size=4, num_host_blocks=1)
    blocks.grow(1, 8)
    copies, freed = blocks.offload(1, 2)
    assert (len(copies), freed, counts(blocks, 1)) == (1, 0, (2, 1, 1, 0))
    blocks.grow(2, 4)
    assert not blocks.can_offload(2)
    with pytest.raises(ValueError, match="1 blocks of owner 2 cannot leave the device"):
        blocks.offload(2, 1)
    with pytest.raises(ValueError, match="0 blocks of owner 1"):
        blocks.offload(1, 0)
    check_blocks(blocks)


def test_what_is_away_needs_room_to_come_back() -> None:
    blocks = BlockManager(num_blocks=2, block_size=4, num_host_blocks=2)
    away(blocks, 1, 8)
    blocks.grow(2, 4)
    assert not blocks.can_upload(1) and not blocks.can_upload(2)
    with pytest.raises(ValueError, match="owner 1 has 2 blocks away, and 1 are free"):
        blocks.upload(1)
    blocks.release(2)
    assert blocks.can_upload(1)


@pytest.mark.parametrize("recalled", [False, True])
def test_blocks_released_in_transfer_are_free_when_it_ends(recalled: bool) -> None:
    blocks = BlockManager(num_blocks=3, block_size=4, num_host_blocks=3)
    blocks.grow(1, 12)
    copies, _ = blocks.offload(1, 2)
    if recalled:
        blocks.recall(1)
    assert blocks.release(1) == 3 and blocks.owners() == set()
    assert free(blocks)[:2] == (1, 1)
    blocks.grow(1, 4)  # the same owner may start over meanwhile
    assert blocks.acknowledge(copies[0][0])[:3] == (1, OFFLOAD, 2)
    assert (counts(blocks, 1), free(blocks)) == ((1, 0, 0, 0), (2, 3, 0))


def test_blocks_released_on_their_way_back_are_free_when_it_ends() -> None:
    blocks = BlockManager(num_blocks=2, block_size=4, num_host_blocks=2)
    away(blocks, 1, 8)
    copies, _ = blocks.upload(1)
    blocks.release(1)
    assert free(blocks) == (0, 0, 0)
    blocks.acknowledge(copies[0][0])
    assert free(blocks) == (2, 2, 0)
    check_blocks(blocks)


def test_accounts_hold_what_is_on_the_device_and_a_shared_block_once() -> None:
    manager = BlockManager(num_blocks=8, block_size=2, num_host_blocks=8)
    manager.grow(1, 7, ("key 0", "key 0/ann"))
    manager.grow(2, 2, ("key 0", "key 0/bob"))
    assert manager.accounts == {"key 0": 5, "key 0/ann": 4, "key 0/bob": 1}
    keys = [(bytes([n]), bytes([n]), 1.0) for n in range(2)]
    manager.share(1, keys)
    manager.attach(3, manager.path(1), ("key 0", "key 0/ann"))
    assert manager.accounts["key 0/ann"] == 4
    manager.release(1)
    assert manager.accounts["key 0/ann"] == 2
    manager.release(3)
    assert manager.accounts == {"key 0": 1, "key 0/bob": 1} and manager.cached == 2
    found = manager.cache.find(*keys[0][:2], None)
    assert found is not None
    manager.attach(3, [found], ("key 0", "key 0/ann"))
    assert manager.accounts["key 0/ann"] == 1
    check_blocks(manager)
    copies, _ = manager.offload(2, 1)
    assert manager.accounts["key 0/bob"] == 1, "it has its place until the copy is done"
    manager.acknowledge(copies[0][0])
    assert manager.accounts == {"key 0": 1, "key 0/ann": 1}
    manager.upload(2)
    assert manager.accounts["key 0/bob"] == 1
    check_blocks(manager)
    manager.accounts["key 0/ann"] = 2
    with pytest.raises(RuntimeError, match="accounts hold"):
        check_blocks(manager)


def test_an_unknown_copy_is_refused() -> None:
    blocks = BlockManager(num_blocks=2, block_size=4, num_host_blocks=2)
    blocks.grow(1, 4)
    copies, _ = blocks.offload(1, 1)
    blocks.acknowledge(copies[0][0])
    with pytest.raises(ValueError, match=f"copy {copies[0][0]} is not under way"):
        blocks.acknowledge(copies[0][0])


# --- in any order -----------------------------------------------------------------------------------------------------


def test_an_exchange_takes_none_that_count_as_free() -> None:
    """Who has one block and could have two of the index gets no second one: it may be promised to another by now."""
    manager = BlockManager(3, 1, 2)
    manager.grow(1, 2)
    manager.share(1, [(b"first", b"ab", 1.0), (b"second", b"cd", 1.0)])
    path = manager.path(1)
    manager.release(1)
    manager.attach(2, path[:1])
    assert manager.free_blocks == 2
    assert not manager.exchange(2, path) and manager.free_blocks == 2
    check_blocks(manager)
