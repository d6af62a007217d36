from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.kv import BlockManager


def test_a_table_grows_by_whole_blocks() -> None:
    blocks = BlockManager(num_blocks=4, block_size=8)
    assert [index for index, _ in blocks.grow(1, 9)] == [0, 1]
    assert blocks.grow(1, 16) == []
    assert [index for index, _ in blocks.grow(1, 17)] == [2]
    assert (blocks.held(1), blocks.free_blocks, blocks.capacity(1), blocks.capacity(2)) == (3, 1, 32, 8)


def test_growing_asks_first_and_takes_nothing_when_it_cannot() -> None:
    blocks = BlockManager(num_blocks=3, block_size=4)
    blocks.grow(1, 8)
    assert blocks.can_grow(2, 4) and not blocks.can_grow(2, 5)
    with pytest.raises(ValueError, match="owner 2 needs room for 5 tokens and can have 4"):
        blocks.grow(2, 5)
    assert blocks.free_blocks == 1
    blocks.check_integrity()


def test_released_blocks_can_be_had_again() -> None:
    blocks = BlockManager(num_blocks=2, block_size=4)
    taken = {block for _, block in blocks.grow(1, 8)}
    assert blocks.release(1) == 2
    assert blocks.release(1) == 0
    assert {block for _, block in blocks.grow(2, 8)} == taken


def test_integrity_notices_a_lost_and_a_doubled_block() -> None:
    lost, doubled = BlockManager(3, 4), BlockManager(3, 4)
    lost._free.pop()
    doubled._free[0] = doubled._free[1]
    for blocks in (lost, doubled):
        with pytest.raises(RuntimeError, match="lost or doubled"):
            blocks.check_integrity()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), max_size=60))
def test_no_block_is_ever_in_two_places(actions: list[tuple[int, int]]) -> None:
    blocks = BlockManager(num_blocks=10, block_size=4)
    tables: dict[int, list[int]] = {}
    for owner, tokens in actions:
        if tokens == 0:
            assert blocks.release(owner) == len(tables.pop(owner, []))
        elif blocks.can_grow(owner, tokens):
            for index, block in blocks.grow(owner, tokens):
                assert index == len(tables.setdefault(owner, []))
                tables[owner].append(block)
        blocks.check_integrity()
        held = [block for table in tables.values() for block in table]
        assert len(held) == len(set(held)) == 10 - blocks.free_blocks
