"""Plans as ranks tell them each other, and what ranks say of them."""

from __future__ import annotations

import struct
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from threads import each_rank, each_rank_well

from fastserve import _C
from fastserve.types import BatchPlan

INT32 = st.integers(-(2**31), 2**31 - 1)
FLOAT32 = st.floats(width=32, allow_nan=True, allow_infinity=True)


def table(columns: int, most: int = 40) -> st.SearchStrategy[Any]:
    return st.integers(0, most).flatmap(lambda rows: arrays(np.int32, (rows, columns), elements=INT32))


def flat(dtype: Any, elements: st.SearchStrategy[Any], length: int) -> st.SearchStrategy[Any]:
    return arrays(dtype, length, elements=elements)


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    """Any plan that can be written, most of which no runtime would run: the wire does not know what is in it."""
    slots = draw(st.lists(st.tuples(*[st.integers(0, 6)] * 3), max_size=5))
    history, biases, stops = (sum(lengths) for lengths in zip(*slots, strict=True)) if slots else (0, 0, 0)
    opened = draw(arrays(np.int32, (len(slots), 8), elements=INT32))
    for row, (own_history, own_biases, own_stops) in zip(opened, slots, strict=True):
        row[[2, 6, 7]] = own_history, own_biases, own_stops
    return BatchPlan(
        plan_id=draw(st.integers(-(2**63), 2**63 - 1)),
        rows=draw(table(4)),
        tokens=draw(st.integers(0, 300).flatmap(lambda n: flat(np.int32, INT32, n))),
        opened=opened,
        opened_params=draw(arrays(np.float32, (len(slots), 6), elements=FLOAT32)),
        opened_seeds=draw(flat(np.uint64, st.integers(0, 2**64 - 1), len(slots))),
        history=draw(flat(np.int32, INT32, history)),
        bias_tokens=draw(flat(np.int32, INT32, biases)),
        bias_values=draw(flat(np.float32, FLOAT32, biases)),
        stop_tokens=draw(flat(np.int32, INT32, stops)),
        closed=draw(st.integers(0, 9).flatmap(lambda n: flat(np.int32, INT32, n))),
        table=draw(table(3)),
        copies=draw(table(4)),
    )


def same(one: BatchPlan, other: BatchPlan) -> bool:
    for field in fields(BatchPlan):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "plan_id":
            if a != b:
                return False
        elif (a.dtype, a.shape, a.tobytes()) != (b.dtype, b.shape, b.tobytes()):
            return False
    return True


def large_plan() -> BatchPlan:
    rng = np.random.default_rng(0)
    return BatchPlan(
        plan_id=7,
        rows=rng.integers(0, 100, (64, 4), np.int32),
        tokens=rng.integers(0, 50_000, 200_000, np.int32),
        copies=rng.integers(0, 100, (300, 4), np.int32),
    )


@given(plans())
def test_a_plan_survives_the_wire_to_the_bit(plan: BatchPlan) -> None:
    assert same(_C.decode_plan(_C.encode_plan(plan)), plan)


@given(plans(), st.data())
def test_what_is_cut_or_longer_is_no_plan(plan: BatchPlan, data: st.DataObject) -> None:
    wire = _C.encode_plan(plan)
    length = data.draw(st.integers(0, len(wire) - 1))
    for damaged in (wire[:length], wire + bytes(8)):
        with pytest.raises(_C.Error, match="plan"):
            _C.decode_plan(damaged)


@given(plans(), st.data())
def test_no_damage_reads_beyond_the_buffer(plan: BatchPlan, data: st.DataObject) -> None:
    """One word of the header is another: refused, or a plan of as many bytes."""
    wire = bytearray(_C.encode_plan(plan))
    word = data.draw(st.integers(0, 12))
    struct.pack_into("<Q", wire, 8 * word, data.draw(st.integers(0, 2**64 - 1) | st.integers(0, 2000)))
    try:
        read = _C.decode_plan(wire)
    except _C.Error as error:
        assert "plan" in str(error)
    else:
        assert len(_C.encode_plan(read)) == len(wire)


def test_slots_that_claim_more_than_there_is_are_refused() -> None:
    plan = BatchPlan(
        plan_id=3,
        opened=np.array([[0, 5, 2, 0, -1, 0, 0, 1]], np.int32),
        opened_params=np.ones((1, 6), np.float32),
        opened_seeds=np.array([9], np.uint64),
        history=np.array([1, 2], np.int32),
        stop_tokens=np.array([5], np.int32),
    )
    wire = bytearray(_C.encode_plan(plan))
    counts = 104 + 44  # of the slot: behind eleven columns of four bytes
    assert struct.unpack_from("<III", wire, counts) == (2, 0, 1)
    struct.pack_into("<I", wire, counts, 3)
    with pytest.raises(_C.Error, match="its slots have more than it holds"):
        _C.decode_plan(wire)
    struct.pack_into("<I", wire, counts, 1)
    with pytest.raises(_C.Error, match="it holds more than its slots have"):
        _C.decode_plan(wire)


@pytest.mark.parametrize("machines", [None, [0, 0, 1]], ids=str)
@pytest.mark.parametrize("root", [0, 2])
def test_every_rank_gets_the_roots_plan(root: int, machines: list[int] | None) -> None:
    sent = [BatchPlan(plan_id=1), large_plan(), BatchPlan(plan_id=3, closed=np.array([4, 5], np.int32))]

    def body(world: _C.Communicator) -> bool:
        heard = [world.broadcast_plan(plan if world.rank == root else None, root) for plan in sent]
        return all(same(one, other) for one, other in zip(heard, sent, strict=True))

    assert each_rank_well(3, body, machines) == [True] * 3


def test_what_is_broadcast_in_place_of_a_plan_is_refused() -> None:
    def body(world: _C.Communicator) -> None:
        if world.rank == 0:
            world.broadcast(bytearray(4096))
        else:
            world.broadcast_plan()

    _, error = each_rank(2, body)
    assert "no plan" in str(error)


def test_a_copy_is_acknowledged_when_every_rank_has_finished_it() -> None:
    """Ranks finish copies in different iterations; each is told once, with its longest time."""
    finished = [
        [[(1, 0.5)], [(2, 0.25)], [(3, 1.0)]],
        [[], [(1, 0.75), (2, 0.125)], [(3, 0.5)]],
        [[(1, 0.25), (2, 0.5)], [], [(3, 2.0)]],
    ]  # by rank, then plan
    took = [[0.1, 0.2, 0.3], [0.4, 0.1, 0.3], [0.2, 0.1, 0.5]]

    def body(world: _C.Communicator) -> list[Any]:
        return [
            world.gather_acknowledgements(plan, took[world.rank][plan], finished[world.rank][plan]) for plan in range(3)
        ]

    assert each_rank_well(3, body)[0] == [
        (0, 0.4, []),
        (1, 0.2, [(1, 0.75), (2, 0.5)]),
        (2, 0.5, [(3, 2.0)]),
    ]


def test_a_rank_that_is_at_another_plan_is_named() -> None:
    first, _ = each_rank(2, lambda world: world.gather_acknowledgements(5 + world.rank))
    assert "rank 1 on " in str(first) and "acknowledges plan 6 where plan 5 is due" in str(first)
