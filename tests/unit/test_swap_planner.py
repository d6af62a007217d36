"""The swap planner: decisions worked out by hand, then what holds of every decision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import bare_job

from fastserve.cost import Link
from fastserve.kv import BurstReserve, Holder, LinkEstimate, Moves, Want, plan_moves
from fastserve.types import OFFLOAD, UPLOAD, Job

LINK = Link(offload_block=0.01, upload_block=0.02)  # seconds a block
JOBS = [bare_job(number, 1.0) for number in range(40)]  # named by their numbers, which are their ranks as well


def want(number: int, blocks: int, enst: float = 0.0, **options: Any) -> Want:
    return Want(JOBS[number], blocks, enst, (number,), **{"upload": True, **options})


def holder(number: int, here: int, enst: float = 1000.0, **options: Any) -> Holder:
    """Long idle, none of its blocks on the host, and dear to compute again."""
    given: dict[str, Any] = {"unsaved": here, "away": 0, "recompute": 500.0, "service": 100.0, "busy": False, **options}
    return Holder(JOBS[number], here, enst=enst, rank=(number,), **given)


def decide(wants: list[Want], victims: Iterator[Holder] | list[Holder], free: int = 0, **options: Any) -> Moves:
    defaults: dict[str, Any] = {
        "leaving": 0, "host_places": 1000, "reserve": 0, "whole": False, "backlog": (0.0, 0.0), "patience": 60.0,
        "repayment": 16.0,
    }  # fmt: skip
    return plan_moves(wants, iter(victims), free=free, link=LinkEstimate(LINK), **{**defaults, **options})


def numbers(moves: Moves) -> dict[str, Any]:
    """What is moved, by the numbers of jobs."""
    named = {
        "offload": [(job.index, blocks) for job, blocks in moves.offloads],
        "upload": [job.index for job in moves.uploads],
        "drop": [job.index for job in moves.drops],
        "pause": [job.index for job in moves.pauses],
    }
    return {name: value for name, value in named.items() if value}


def nobody() -> Iterator[Holder]:
    raise AssertionError("nobody has to be looked at")
    yield


# --- who comes, who goes ----------------------------------------------------------------------------------------------


def test_where_there_is_room_all_come_and_nobody_goes() -> None:
    moves = decide([want(1, 4), want(2, 3), want(3, 2, upload=False)], nobody(), free=9)
    assert numbers(moves) == {"upload": [1, 2]}
    assert numbers(decide([], nobody())) == {}


def test_the_last_to_run_leave_first_and_no_more_than_needed() -> None:
    victims = [holder(9, 8), holder(8, 8), holder(7, 8)]
    assert numbers(decide([want(1, 10)], victims)) == {"offload": [(9, 8), (8, 8)]}
    # Half of it is free already, and the rest on its way: wait.
    assert numbers(decide([want(1, 10)], nobody(), free=5, leaving=5)) == {}


def test_the_first_to_run_come_first_and_nobody_overtakes() -> None:
    wants = [want(1, 4), want(2, 6), want(3, 1)]
    assert numbers(decide(wants, [], free=9)) == {"upload": [1]}
    # The 8 blocks that come for 2 are enough for 3 as well, later.
    assert numbers(decide(wants, [holder(9, 30)], free=4)) == {"upload": [1], "offload": [(9, 8)]}
    # The 2 that are free are kept for 1; for 2 some more leave.
    victims = [holder(9, 10), holder(8, 10)]
    assert numbers(decide([want(1, 10), want(2, 8)], victims, free=2)) == {"offload": [(9, 8), (8, 8)]}
    # So they do if they run soon: the batch is more urgent. But not for one outside the batch, while 1 waits.
    soon = [holder(9, 8), holder(8, 10, enst=0.1)]
    assert numbers(decide([want(1, 10), want(2, 8)], soon, free=2)) == {"offload": [(9, 8), (8, 8)]}
    assert numbers(decide([want(1, 10), want(2, 8, enst=0.5)], victims, free=2)) == {"offload": [(9, 8)]}


def test_a_part_of_a_victim_leaves_unless_all_is_asked_for() -> None:
    assert numbers(decide([want(1, 12)], [holder(9, 100)])) == {"offload": [(9, 12)]}
    assert numbers(decide([want(1, 1)], [holder(9, 100)])) == {"offload": [(9, 8)]}  # few large copies
    assert numbers(decide([want(1, 12)], [holder(9, 100)], whole=True)) == {"offload": [(9, 100)]}


def test_blocks_with_a_copy_on_the_host_are_free_at_once() -> None:
    """So whom they are freed for comes in the same decision, and no place on the host is needed."""
    moves = decide([want(1, 10)], [holder(9, 20, unsaved=5)], host_places=0)
    assert numbers(moves) == {"offload": [(9, 10)], "upload": [1]}
    # 15 at once; for the other 5 a copy.
    assert numbers(decide([want(1, 20)], [holder(9, 20, unsaved=5)])) == {"offload": [(9, 20)]}


def test_nothing_is_taken_for_a_job_that_runs_later() -> None:
    better = [holder(2, 50), holder(1, 50)]
    assert numbers(decide([want(3, 10)], better)) == {}
    # Ahead of need: a victim must be away, and back, before it runs, and run after whom it left for.
    # 10 blocks out and in again are 0.1 + 0.2 s.
    assert numbers(decide([want(3, 10, enst=5.0)], [holder(9, 50, enst=5.29)])) == {}
    assert numbers(decide([want(3, 10, enst=5.0)], [holder(9, 50, enst=5.31)])) == {"offload": [(9, 10)]}
    assert numbers(decide([want(3, 10, enst=5.0)], [holder(9, 50, enst=5.31)], backlog=(0.1, 0.0))) == {}
    # What has left already has to come back as well: 0.1 + 0.6 s.
    assert numbers(decide([want(3, 10, enst=5.0)], [holder(9, 50, away=20, enst=5.69)])) == {}
    assert numbers(decide([want(3, 10, enst=5.0)], [holder(9, 50, away=20, enst=5.71)])) == {"offload": [(9, 10)]}


def test_who_comes_back_for_the_batch_is_no_reserve() -> None:
    partly_away = [holder(1, 10, away=4), holder(9, 20)]
    assert numbers(decide([want(1, 4)], partly_away, free=4, reserve=8)) == {"upload": [1], "offload": [(9, 8)]}


def test_who_gives_up_blocks_for_a_better_one_is_not_brought_back_at_once() -> None:
    moves = decide([want(1, 8), want(2, 4)], [holder(2, 10, unsaved=0, away=4), holder(9, 20)], free=4)
    assert numbers(moves) == {"upload": [1], "offload": [(2, 8)]}


def test_no_more_leaves_than_the_link_takes_in_time() -> None:
    victims = [holder(number, 10) for number in (9, 8, 7)]
    assert numbers(decide([want(1, 30)], victims, patience=0.15)) == {"offload": [(9, 10), (8, 10)]}
    assert numbers(decide([want(1, 30)], victims, patience=0.15, backlog=(0.2, 0.0))) == {}


def test_no_more_comes_than_the_link_brings_in_time() -> None:
    wants = [want(1, 10), want(2, 10), want(3, 10), want(4, 2, upload=False)]
    assert numbers(decide(wants, nobody(), free=40, patience=0.3)) == {"upload": [1, 2]}
    assert numbers(decide(wants, nobody(), free=40, patience=0.3, backlog=(0.0, 0.35))) == {}
    # Those that need no copy do not wait for the link.
    behind = [holder(9, 8)]
    assert numbers(decide(wants, behind, patience=0.3, backlog=(0.0, 0.35))) == {"offload": [(9, 8)]}


def test_kv_that_came_back_stays_until_it_was_worth_it() -> None:
    """10 blocks take 0.2 s to come back."""
    assert numbers(decide([want(1, 10)], [holder(9, 10, service=3.2)])) == {"offload": [(9, 10)]}
    for urgency in (0.0, 5.0):
        assert numbers(decide([want(1, 10, enst=urgency)], [holder(9, 10, service=3.1)])) == {}
    # Without repayment, until it got something new: else jobs that take turns might get nothing for ever.
    assert numbers(decide([want(1, 10)], [holder(9, 10, service=0.1)], repayment=0.0)) == {"offload": [(9, 10)]}
    assert numbers(decide([want(1, 10)], [holder(9, 10, service=0.0)], repayment=0.0)) == {}
    # For the best of all, and where it has begun to leave, it goes.
    assert numbers(decide([want(1, 10, first=True)], [holder(9, 10, service=3.1)])) == {"offload": [(9, 10)]}
    assert numbers(decide([want(1, 10)], [holder(9, 10, service=3.1, away=1)])) == {"offload": [(9, 10)]}


def test_who_is_owed_the_memory_gets_it_from_whoever_has_it() -> None:
    """Whatever that was served; but only for who belongs in the batch, and from who runs later."""
    new = [holder(9, 8, service=0.0), holder(8, 8, service=0.0), holder(1, 8, service=0.0)]
    assert numbers(decide([want(2, 12)], new)) == {}

    def owed(victim: Job, wanting: Job) -> bool:
        return victim.index != 9 and wanting.index == 2

    assert numbers(decide([want(2, 12)], new, gives_way=owed)) == {"offload": [(8, 8)]}
    assert numbers(decide([want(3, 12)], new, gives_way=owed)) == {}
    assert numbers(decide([want(2, 8, enst=5.0)], new, gives_way=owed)) == {}
    dear = [holder(8, 8, service=0.0, recompute=500.0)]
    assert numbers(decide([want(2, 8)], dear, gives_way=owed, host_places=0)) == {"drop": [8], "upload": [2]}


def test_the_search_for_victims_gives_up() -> None:
    soon = iter([holder(number, 10, enst=0.01) for number in range(39, 9, -1)])
    assert numbers(decide([want(1, 10, enst=0.005)], soon)) == {}
    assert len(list(soon)) == 30 - 16


# --- the reserve ------------------------------------------------------------------------------------------------------


def test_only_the_batch_may_use_the_reserve() -> None:
    assert numbers(decide([want(1, 8)], [], free=10, reserve=6)) == {"upload": [1]}
    assert numbers(decide([want(1, 8, enst=1.0)], [], free=10, reserve=6)) == {}
    assert numbers(decide([want(1, 8, enst=1.0)], [], free=14, reserve=6)) == {"upload": [1]}


def test_the_reserve_is_filled_ahead_of_need_but_not_from_the_batch() -> None:
    idle = [holder(9, 30)]
    assert numbers(decide([], idle, free=2, reserve=12)) == {"offload": [(9, 10)]}
    assert numbers(decide([], idle, free=2, leaving=10, reserve=12)) == {}
    assert numbers(decide([], [holder(9, 30, enst=0.0)], free=2, reserve=12)) == {}
    # Blocks that are owed are no reserve.
    victims = [holder(9, 8), holder(8, 9)]
    assert numbers(decide([want(1, 10)], victims, free=2, reserve=6)) == {"offload": [(9, 8), (8, 8)]}
    # Nor is anything dropped for it.
    assert numbers(decide([], [holder(9, 30, recompute=0.0)], free=2, reserve=12, host_places=0)) == {}


# --- keep, swap or recompute ------------------------------------------------------------------------------------------


def test_with_the_host_full_kv_is_thrown_away_only_where_that_is_repaid() -> None:
    served_well, served_little = holder(9, 8, recompute=1.0, service=16.0), holder(9, 8, recompute=1.0, service=15.9)
    assert numbers(decide([want(1, 8)], [served_well], host_places=0)) == {"drop": [9], "upload": [1]}
    assert numbers(decide([want(1, 8)], [served_little], host_places=0)) == {}  # wait
    assert numbers(decide([want(1, 8, enst=1.0)], [served_well], host_places=0)) == {}  # nor ahead of need
    # The best job goes on at any price.
    assert numbers(decide([want(1, 8, first=True)], [served_little], host_places=0)) == {"drop": [9], "upload": [1]}


def test_with_the_host_nearly_full_as_many_leave_as_find_a_place() -> None:
    victims = [holder(9, 10), holder(8, 10, recompute=1.0, service=16.0)]
    assert numbers(decide([want(1, 10)], victims, host_places=3)) == {"offload": [(9, 3)], "drop": [8], "upload": [1]}


def test_what_is_cheaper_to_compute_than_to_move_is_computed_again() -> None:
    """It runs in 0.1 s, and there and back take 0.3 s: 0.2 s of waiting against the prefill."""
    dear = holder(9, 10, enst=0.1, recompute=0.21, service=100.0)
    cheap = holder(9, 10, enst=0.1, recompute=0.19, service=100.0)
    unrepaid = holder(9, 10, enst=0.1, recompute=0.19, service=1.0)
    assert numbers(decide([want(1, 10)], [dear])) == {"offload": [(9, 10)]}
    assert numbers(decide([want(1, 10)], [cheap])) == {"drop": [9], "upload": [1]}
    assert numbers(decide([want(1, 10)], [unrepaid])) == {}


def test_a_busy_victim_is_left_out_of_a_batch_first() -> None:
    busy, idle = holder(9, 10, busy=True), holder(8, 10)
    assert numbers(decide([want(1, 10)], [busy, idle])) == {"pause": [9]}
    assert numbers(decide([want(1, 12)], [busy, idle])) == {"pause": [9], "offload": [(8, 8)]}
    assert numbers(decide([want(1, 10, enst=1.0)], [busy, idle])) == {"offload": [(8, 10)]}  # not ahead of need


# --- on every decision ------------------------------------------------------------------------------------------------

ensts = st.sampled_from([0.0, 0.0, 0.05, 1.0, 10.0, 1000.0])


@st.composite
def decisions(draw: st.DrawFn) -> tuple[list[Want], list[Holder], dict[str, Any]]:
    """Jobs 0 … 19 may want, 20 … 39 hold, and ranks are drawn: as the scheduler has it, ENST grows with rank."""
    ranks = draw(st.permutations(range(20)))
    wants, victims = [], []
    split = draw(st.integers(0, 8))
    for number in range(split):
        wants.append(want(number, draw(st.integers(1, 30)), draw(ensts), upload=draw(st.booleans())))
        wants[-1].rank = (ranks[number],)
        wants[-1].first = draw(st.booleans()) and number == 0
    for number in range(split, split + draw(st.integers(0, 10))):
        here = draw(st.integers(1, 40))
        victims.append(
            holder(
                20 + number,
                here,
                draw(ensts),
                unsaved=draw(st.integers(0, here)),
                away=draw(st.sampled_from([0, 0, 5])),
                recompute=draw(st.sampled_from([0.0, 0.1, 50.0])),
                service=draw(st.sampled_from([0.0, 2.0, 1000.0])),
                busy=draw(st.booleans()),
            )
        )
        victims[-1].rank = (ranks[number],)
    wants.sort(key=lambda want: (want.enst, want.rank))
    victims.sort(key=lambda victim: victim.rank, reverse=True)
    room = {
        "free": draw(st.integers(0, 40)),
        "leaving": draw(st.integers(0, 10)),
        "host_places": draw(st.sampled_from([0, 5, 30, 1000])),
        "reserve": draw(st.integers(0, 15)),
        "whole": draw(st.booleans()),
        "repayment": draw(st.sampled_from([0.0, 4.0, 16.0])),
        "backlog": (draw(st.sampled_from([0.0, 0.5])), draw(st.sampled_from([0.0, 0.5]))),
        "patience": draw(st.sampled_from([0.1, 1.0, 100.0])),
    }
    return wants, victims, room


@settings(max_examples=500, deadline=None, derandomize=True)
@given(decisions())
def test_no_decision_promises_what_is_not_there(case: tuple[list[Want], list[Holder], dict[str, Any]]) -> None:
    wants, victims, room = case
    moves = decide(wants, victims, **room)
    of = {victim.job: victim for victim in victims}
    wanted = {entry.job: entry for entry in wants}

    # Everybody loses once, and not more than there is.
    losers = [*(job for job, _ in moves.offloads), *moves.drops, *moves.pauses]
    assert len(losers) == len(set(losers)) and set(losers) <= of.keys()
    assert all(1 <= blocks <= of[job].here for job, blocks in moves.offloads)
    assert all(of[job].busy for job in moves.pauses)
    assert not any(of[job].busy for job in losers if job not in moves.pauses)

    # Copies find a place on the host, and whoever comes finds room on the device.
    copied = {job: max(0, blocks - (of[job].here - of[job].unsaved)) for job, blocks in moves.offloads}
    assert sum(copied.values()) <= room["host_places"]
    at_once = sum(blocks - copied[job] for job, blocks in moves.offloads) + sum(of[job].here for job in moves.drops)
    left = room["free"] + at_once - sum(wanted[job].blocks for job in moves.uploads)
    assert left >= 0
    if any(not wanted[job].urgent for job in moves.uploads):
        assert left >= room["reserve"]

    # Nobody overtakes: those that come are the first of those that want to.
    coming = [entry.job for entry in wants if entry.upload]
    assert moves.uploads == coming[: len(moves.uploads)]

    # Nobody loses anything to a job that runs later, nor for want of a reserve if it is to run now.
    for job in losers:
        victim = of[job]
        for_the_batch = any(entry.urgent and entry.rank < victim.rank for entry in wants)
        ahead = [entry.enst for entry in wants if not entry.urgent] + [0.0] * (room["reserve"] > 0)
        assert for_the_batch or any(victim.enst > enst for enst in ahead)
        if job in moves.drops or job in moves.pauses:
            assert for_the_batch

    # Nor before it was served for long enough, but for the best of all.
    for job in losers:
        cost = 0.0 if of[job].away else min(of[job].recompute, 0.02 * of[job].here)
        assert of[job].service >= room["repayment"] * cost or any(entry.first for entry in wants)

    # Where there is room for all, nobody loses anything.
    if sum(entry.blocks for entry in wants) + room["reserve"] <= room["free"]:
        assert not losers
        under_way = room["backlog"][UPLOAD] + 0.02 * sum(entry.blocks for entry in wants)
        assert moves.uploads == coming or under_way > room["patience"]


# --- what the planner goes by -----------------------------------------------------------------------------------------


def test_the_link_is_as_fast_as_it_was_measured() -> None:
    link = LinkEstimate(Link(offload_block=1.0, upload_block=2.0, latency=0.5))
    assert (link.seconds(OFFLOAD, 10), link.seconds(UPLOAD, 10), link.seconds(UPLOAD, 0)) == (10.5, 20.5, 0.0)
    link.observe(OFFLOAD, 10, 60.5)  # 6 s a block: a fifth of the way from 1 to 6
    assert (link.seconds(OFFLOAD, 10), link.seconds(UPLOAD, 10)) == (pytest.approx(20.5), 20.5)
    for _ in range(60):
        link.observe(UPLOAD, 3, 0.5 + 3 * 0.25)
    assert link.seconds(UPLOAD, 100) == pytest.approx(0.5 + 25, rel=1e-3)
    link.observe(OFFLOAD, 4, 0.1)  # less than the latency: as if a block took no time
    assert link.seconds(OFFLOAD, 10) == pytest.approx(0.5 + 0.8 * 20)


def test_the_reserve_is_what_bursts_took() -> None:
    calm, burst = BurstReserve(), BurstReserve()
    for iteration in range(400):
        calm.took(1)
        burst.took(20 if iteration == 0 else 0)
        if iteration == 0:
            assert burst.blocks(1000) == 20
    assert calm.blocks(1000) == 4  # a block an iteration, over four of them
    assert 20 * 0.1 < burst.blocks(1000) < 20 * 0.3  # e^(-400 / 256) is 0.21
    assert (calm.blocks(3), calm.blocks(0), calm.blocks(-5)) == (3, 0, 0)
    assert BurstReserve().blocks(1000) == 0


def test_the_largest_of_two_bursts_counts() -> None:
    reserve = BurstReserve()
    for blocks in (30, 0, 0, 0, 0, 0, 0, 0, 5):
        reserve.took(blocks)
    assert 28 <= reserve.blocks(1000) <= 30
    reserve.took(60)
    assert reserve.blocks(1000) >= 60
