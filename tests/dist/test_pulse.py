"""Ranks on other hosts that are not heard of, and those that leave in order."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from threads import each_rank, each_rank_well

from fastserve import _C
from fastserve.pulse import Pulse

APART = [0, 0, 1]  # the machine of each rank


def pulse_of(world: _C.Communicator, limit: float, reasons: list[str]) -> Pulse:
    ways = world.split(0, world.rank)
    assert ways is not None
    return Pulse(ways, limit, reasons.append)


def test_a_rank_that_says_nothing_is_named_by_rank_0_and_the_others_are_told() -> None:
    heard = threading.Event()

    def body(world: _C.Communicator) -> Any:
        if world.rank == 2:  # is in the group, and stands still
            assert world.split(0, 2) is not None
            return heard.wait()
        ways = world.split(0, world.rank)
        assert ways is not None
        reasons: list[str] = []

        def gone(reason: str) -> None:
            reasons.append(reason)
            heard.set()

        pulse = Pulse(ways, 0.4, gone)
        heard.wait()
        pulse.stop()
        return reasons

    (reason,), *_ = each_rank(3, body, APART)
    assert "rank 2 on " in reason and reason.endswith("has not been heard of for 0.4 seconds")


def test_a_rank_that_is_cut_off_ends_by_itself() -> None:
    """Whatever rank 0 knows: what waits for a message of it, as for the next plan, ends with an error that says why."""
    over = threading.Event()

    def body(world: _C.Communicator) -> str:
        ways = world.split(0, world.rank)
        assert ways is not None
        if world.rank == 0:
            over.wait()
            return ""
        pulse = Pulse(ways, 0.4, world.abort)
        try:
            with pytest.raises(_C.Error) as error:
                world.broadcast(bytearray(8))
        finally:
            over.set()
        pulse.stop()
        return str(error.value)

    _, *found = each_rank(3, body, APART)
    assert any(
        "rank 0 on " in str(reason) and "has not been heard of for 0.4 seconds" in str(reason) for reason in found
    )


def test_all_leave_in_order() -> None:
    """Though some come to it later than a silence is taken for an end."""
    gate = threading.Barrier(3)

    def body(world: _C.Communicator) -> list[str]:
        reasons: list[str] = []
        pulse = pulse_of(world, 30.0, reasons)
        gate.wait()
        pulse.stop()
        pulse.stop()
        return reasons

    assert each_rank_well(3, body, APART) == [[], [], []]


def test_an_abort_ends_it_everywhere() -> None:
    gate = threading.Barrier(3)

    def body(world: _C.Communicator) -> list[str]:
        reasons: list[str] = []
        pulse = pulse_of(world, 30.0, reasons)
        gate.wait()
        if world.rank == 1:
            pulse.abort("rank 1 has no memory")
        pulse.stop()
        return reasons

    assert each_rank_well(3, body, APART) == [[], [], []]
