"""Regret against hindsight SRPT: schedules worked out by hand, and a slow, plain SRPT beside the fast one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import Clock

from fastserve.server.regret import WINDOW, Ended, Regret, regret, srpt
from fastserve.types import JobMetrics

Jobs = list[tuple[float, float]]

# Quarters: sums and differences are exact, and ties are frequent.
quarters = st.integers(0, 40).map(lambda number: number / 4)
workloads = st.lists(st.tuples(quarters, quarters), min_size=1, max_size=14)


def plain_srpt(jobs: Jobs, slots: int) -> list[float]:
    """By its definition, from event to event: those with the least left run; ties go to who ran, then to the first."""
    left = [needed for _, needed in jobs]
    times: dict[int, float] = {}
    now, running = 0.0, set[int]()
    while len(times) < len(jobs):
        here = [k for k, (arrival, _) in enumerate(jobs) if arrival <= now and k not in times]
        times |= {k: now - jobs[k][0] for k in here if left[k] == 0.0}
        here = [k for k in here if left[k] > 0.0]
        running = set(sorted(here, key=lambda k: (left[k], k not in running, jobs[k][0], k))[:slots])
        step = min([arrival - now for arrival, _ in jobs if arrival > now] + [left[k] for k in running], default=0.0)
        for k in running:
            left[k] -= step
        now += step
    return [times[k] for k in range(len(jobs))]


def first_come_first_served(jobs: Jobs) -> list[float]:
    """On one slot."""
    free, times = 0.0, [0.0] * len(jobs)
    for k in sorted(range(len(jobs)), key=lambda k: jobs[k][0]):
        free = max(free, jobs[k][0]) + jobs[k][1]
        times[k] = free - jobs[k][0]
    return times


def test_one_slot_by_hand() -> None:
    """At 2 B (4 s) preempts A (7 s, 5 left), at 4 C (1 s) preempts B (2 left). B ends at 7, A at 12; D, which came at 5
    and has as much to do as A has left, comes after it."""
    assert srpt([(0, 7), (2, 4), (4, 1), (5, 5)], 1) == [12.0, 5.0, 1.0, 12.0]


def test_two_slots_by_hand() -> None:
    """A (10 s) and B (6 s) run. At 1 C (2 s) preempts A, which goes on at 3. At 4 D and E (1 s) preempt both, which go
    on at 5: B, with 2 s left, ends at 7, A, with 8, at 13."""
    assert srpt([(0, 10), (0, 6), (1, 2), (4, 1), (4, 1)], 2) == [13.0, 7.0, 2.0, 1.0, 1.0]


def test_regret_by_hand() -> None:
    """Two jobs at once on one slot, 4 s and 1 s: first come first served takes 4 and 5 s, SRPT 5 and 1 s."""
    assert regret([Ended(0, 4, 4), Ended(0, 5, 1)], 1) == pytest.approx(4.5 / 3.0)
    assert regret([Ended(0, 4, 4), Ended(0, 5, 1)], 2) == pytest.approx(4.5 / 2.5)
    assert regret([], 1) is None and regret([Ended(0, 4, 0)], 1) is None


@given(workloads, st.integers(1, 4))
def test_the_fast_srpt_is_the_plain_one(jobs: Jobs, slots: int) -> None:
    """Which of two equals goes first changes who ends when, and not when somebody does."""
    fast, plain = srpt(jobs, slots), plain_srpt(jobs, slots)
    ends = [sorted(job[0] + time for job, time in zip(jobs, times, strict=True)) for times in (fast, plain)]
    assert ends[0] == pytest.approx(ends[1])


@given(workloads)
def test_srpt_is_no_worse_than_first_come_first_served(jobs: Jobs) -> None:
    assert sum(srpt(jobs, 1)) <= sum(first_come_first_served(jobs)) + 1e-9


@given(workloads, st.integers(1, 4))
def test_a_schedule_that_is_srpt_has_a_regret_of_one(jobs: Jobs, slots: int) -> None:
    times = plain_srpt(jobs, slots)
    found = regret([Ended(a, a + time, n) for (a, n), time in zip(jobs, times, strict=True)], slots)
    assert found == (pytest.approx(1.0) if any(needed for _, needed in jobs) else None)


@given(workloads, st.integers(1, 4))
def test_nobody_ends_before_its_time_and_with_a_slot_each_nobody_waits(jobs: Jobs, slots: int) -> None:
    assert all(time >= needed for time, (_, needed) in zip(srpt(jobs, slots), jobs, strict=True))
    assert srpt(jobs, len(jobs)) == pytest.approx([needed for _, needed in jobs])


def test_the_window_and_how_long_an_answer_is_good() -> None:
    clock = Clock()
    found = Regret(clock)
    assert found.value(1) is None
    found.ended(JobMetrics(0.0, finish=4.0, prefill_seconds=1.0, decode_seconds=1.0))
    found.ended(JobMetrics(0.0, prefill_seconds=1.0))  # of which nobody knows when it ended
    assert found.value(1) is None, "the answer of a moment ago"
    clock.now = 5.0
    assert found.value(1) == 2.0
    clock.now = WINDOW + 4.5
    assert found.value(1) is None


def test_the_latest_two_thousand_jobs_count() -> None:
    """They waited for nobody; those before them did."""
    found = Regret(Clock())
    for number in range(10_000):
        waited = 100.0 if number < 8_000 else 0.0
        found.ended(JobMetrics(-waited, finish=0.001, prefill_seconds=0.001))
    value = found.value(2_000)
    assert value is not None and math.isclose(value, 1.0)
