"""Bounds on waiting: hand-worked, against brute force over all jobs, and under overload."""

from __future__ import annotations

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from toy import bare_job
from unit_server import UnitServer, unit_job

from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel
from fastserve.policies import create_policy
from fastserve.policies.deadlines import Deadlines
from fastserve.types import Job


def deadlines(starvation: float | None = None, slowdown: float | None = None) -> Deadlines:
    return Deadlines(starvation_limit=starvation, slowdown_limit=slowdown, quantum=1.0)


def test_without_bounds_nothing_is_due() -> None:
    none = deadlines()
    job = bare_job(0, 1.0)
    none.watch(job, 0.0)
    assert none.pop_due(1e9) == [] and none.next() is None and none.of(job) == math.inf
    none.forget(job)


def test_the_tighter_bound_counts() -> None:
    both = deadlines(starvation=10.0, slowdown=4.0)
    short, long = bare_job(0, 2.0), bare_job(1, 5.0)
    both.watch(short, 0.0)
    both.watch(long, 0.0)
    assert (both.of(short), both.of(long), both.next()) == (8.0, 10.0, 8.0)
    assert both.pop_due(7.9) == []
    assert both.pop_due(10.0) == [short, long]
    assert both.of(short) == math.inf


def test_a_running_job_does_not_starve() -> None:
    bounds = deadlines(starvation=5.0, slowdown=1.0)
    job = bare_job(0, 2.0)
    bounds.watch(job, 0.0)
    job.waiting_since, job.waited = None, 1.5
    for now in range(100):
        assert bounds.pop_due(float(now)) == []
    job.waiting_since, job.attained, job.next_seconds = 99.0, 2.0, 1.0  # may wait 3 s in all
    assert bounds.of(job) == 99.0 + 1.5
    assert bounds.pop_due(100.4) == [] and bounds.pop_due(100.5) == [job]


def test_a_late_promotion_is_not_repeated_at_once() -> None:
    """Waited 100 s where 10 were allowed: after 3 s of service it waits 3 · 2 s, and not less than nothing."""
    bounds = deadlines(slowdown=2.0)
    job = bare_job(0, 5.0)
    bounds.watch(job, 0.0)
    assert bounds.pop_due(100.0) == [job]
    job.waiting_since, job.waited = None, 100.0
    job.attained, job.next_seconds = 3.0, 5.0
    bounds.watch(job, 103.0)
    job.waiting_since = 103.0
    assert bounds.of(job) == 103.0 + 2 * 3.0


def test_a_storm_is_promoted_in_order_a_bounded_number_a_decision() -> None:
    bounds = deadlines(starvation=1.0)
    jobs = [bare_job(index, 1.0, arrival=(index * 7) % 1000) for index in range(1000)]
    for job in jobs:
        bounds.watch(job, job.arrival)
    due: list[Job] = []
    for _ in range(4):
        some = bounds.pop_due(5000.0)
        assert 0 < len(some) <= 256
        due += some
    assert due == sorted(jobs, key=lambda job: (job.arrival, job.index))


def test_within_a_share_jobs_are_promoted_one_by_one_when_those_before_are_paid_for() -> None:
    """A quarter of the time: 5 s taken are paid for after 20 s. Nothing is saved up while nobody is overdue."""
    bounds = Deadlines(starvation_limit=10.0, slowdown_limit=None, quantum=1.0, share=0.25)
    jobs = [bare_job(index, 1.0, arrival=arrival) for index, arrival in enumerate((1000.0, 1001.0, 1002.0, 1005.0))]
    for job in jobs:
        bounds.watch(job, job.arrival)
    assert bounds.next() == 1010.0 and bounds.pop_due(1009.9) == []
    assert bounds.pop_due(1012.0) == jobs[:1]
    bounds.charge(5.0)
    assert bounds.next() == 1032.0 and bounds.pop_due(1031.9) == []
    assert [bounds.of(job) for job in jobs] == [math.inf, 1032.0, 1033.0, 1036.0]  # 21 s late
    bounds.charge(1.0)  # the first one runs on
    assert bounds.next() == bounds.of(jobs[1]) == 1036.0
    assert bounds.pop_due(1036.0) == jobs[1:2]
    bounds.charge(0.5)
    assert bounds.pop_due(1037.9) == [] and bounds.pop_due(1038.0) == jobs[2:3]
    bounds.forget(jobs[3])
    bounds.charge(0.25)
    late = bare_job(4, 1.0, arrival=2000.0)
    bounds.watch(late, 2000.0)
    assert bounds.next() == bounds.of(late) == 2010.0


def test_the_heap_holds_no_more_than_the_live_jobs() -> None:
    bounds = deadlines(starvation=1e9)
    for index in range(10_000):
        job = bare_job(index, 1.0, arrival=float(index))
        bounds.watch(job, float(index))
        bounds.forget(job)
    assert len(bounds._heap) < 100


step = st.tuples(st.sampled_from(["arrive", "run", "pause", "leave", "wait"]), st.integers(0, 10**6))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(step, max_size=80), st.sampled_from([(7.0, None), (None, 2.0), (9.0, 3.0)]))
def test_what_is_due_is_what_brute_force_finds(steps: list[tuple[str, int]], limits: tuple[float, float]) -> None:
    """Every waiting job is looked at, by the definition; promoted jobs run for 1 s at once."""
    starvation, slowdown = limits
    bounds = deadlines(starvation, slowdown)
    live: list[Job] = []
    excused: dict[Job, float] = {}
    now = 0.0

    def deadline(job: Job) -> float:
        assert job.waiting_since is not None
        starved = math.inf if starvation is None else job.waiting_since + starvation
        allowed = math.inf if slowdown is None else slowdown * (job.attained + job.next_seconds) - job.waited
        return min(starved, job.waiting_since + max(0.0, allowed + excused.get(job, 0.0)))

    def serve(job: Job, seconds: float) -> None:
        if job.waiting_since is not None:
            job.waited += now - job.waiting_since
            job.waiting_since = None
        job.attained += seconds

    for number, (what, value) in enumerate(steps):
        job = live[value % len(live)] if live else None
        if what == "arrive":
            live.append(bare_job(number, 1.0 + value % 3, arrival=now))
            bounds.watch(live[-1], now)
        elif what == "wait":
            now += value % 40 / 8
        elif job is not None and what == "run":
            serve(job, 1.0 + value % 2)
        elif job is not None and what == "pause" and job.waiting_since is None:
            job.waiting_since = now
        elif job is not None and what == "leave":
            live.remove(job)
            bounds.forget(job)
        expected = sorted((deadline(job), job.index) for job in live if job.waiting_since is not None)
        next_one = bounds.next()
        assert not expected or (next_one is not None and next_one <= expected[0][0])
        due = bounds.pop_due(now)
        assert [job.index for job in due] == [index for when, index in expected if when <= now]
        for job in due:
            owned = job.attained + job.next_seconds
            serve(job, 1.0)
            if slowdown is not None:
                excused[job] = max(excused.get(job, 0.0), job.waited - slowdown * owned)
            bounds.watch(job, now)
            job.waiting_since = now


def longest_wait(policy: str, load: float, **limits: float) -> tuple[float, float]:
    """The longest wait without service, and the largest share of promoted jobs' seconds, of 400 jobs of 1 + 20 s."""
    limits = {"starvation_limit": None, **limits}
    config = SchedulerConfig(policy=policy, max_num_seqs=4, **limits)  # type: ignore[arg-type]
    server = UnitServer(create_policy(config, CostModel.constant(1.0)), 4)
    draw = random.Random(5)
    arrival, jobs = 0.0, []
    for index in range(400):
        arrival += draw.expovariate(4 * load / 20)
        jobs.append(unit_job(index, arrival, 1, 5 if index % 4 else 65))
    last: dict[int, float] = {}
    longest = 0.0
    waiting = jobs[::-1]
    while waiting or server._live:
        while waiting and waiting[-1].arrival <= server.now:
            last[waiting[-1].index] = waiting[-1].arrival
            server.add(waiting.pop())
        if not server._live:
            server.now = waiting[-1].arrival
            continue
        for job in server.step():
            longest = max(longest, server.now - 1 - last[job.index])
            last[job.index] = server.now
    return longest, max(server.finish.values())


def test_below_saturation_nobody_waits_much_longer_than_the_bound() -> None:
    unbounded, _ = longest_wait("skip-join-mlfq", 0.9)
    bounded, _ = longest_wait("skip-join-mlfq", 0.9, starvation_limit=30.0)
    assert bounded < 30 + 10 < unbounded


def test_a_storm_wastes_nothing() -> None:
    """All are overdue all the time: the work done is the same, and the last job ends when it would."""
    for policy in ("skip-join-mlfq", "gittins"):
        _, end = longest_wait(policy, 3.0)
        _, stormy = longest_wait(policy, 3.0, slowdown_limit=0.01)
        assert abs(stormy - end) <= 65


def test_who_comes_when_all_have_left_does_not_pay_for_them() -> None:
    """Tenants that come get policies of tenants that went: what those owed is not theirs to pay."""
    bounds = Deadlines(starvation_limit=1.0, slowdown_limit=None, quantum=1.0, share=1 / 8)
    before, other, new = bare_job(0, 1.0), bare_job(1, 1.0), bare_job(2, 1.0, arrival=3.0)
    bounds.watch(before, 0.0)
    bounds.watch(other, 0.0)
    assert bounds.pop_due(2.0) == [before]
    bounds.charge(100.0)
    bounds.forget(before)
    assert bounds.pop_due(3.0) == [], "the other waits until it is paid"
    bounds.forget(other)
    bounds.watch(new, 3.0)
    assert bounds.of(new) == 4.0 == bounds.next() and bounds.pop_due(4.0) == [new]
