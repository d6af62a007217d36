"""What a waiting job has to compute may change: it goes where it would join now, if that is better."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import bare_job
from unit_server import COST, unit_job

from fastserve.config import SchedulerConfig
from fastserve.policies import create_policy
from fastserve.policies.base import Policy
from fastserve.policies.fcfs import FirstComeFirstServed
from fastserve.policies.gittins import Gittins
from fastserve.policies.lengths import LengthDistribution
from fastserve.policies.mlfq import MultiLevelFeedbackQueue
from fastserve.policies.srpt import ShortestRemainingTime


def mlfq(**options: object) -> MultiLevelFeedbackQueue:
    given = {"quantum": 1.0, "num_levels": 6, "starvation_limit": None, "skip_join": True, **options}
    return MultiLevelFeedbackQueue(**given)  # type: ignore[arg-type]


def test_a_shorter_prefill_moves_up_to_the_tail() -> None:
    policy = mlfq()
    jobs = [bare_job(0, 8.0), bare_job(1, 2.0), bare_job(2, 8.0)]
    for job in jobs:
        policy.add(job, 0.0)
    jobs[2].next_seconds = 2.0
    policy.refresh(jobs[2], 1.0)
    assert [policy.level(job) for job in jobs] == [3, 1, 1]
    assert [job.index for job in policy.iter_best(1.0)] == [1, 2, 0]
    assert policy.work_ahead(jobs[0], 1.0) == 2 * (2 + 4)


def test_a_longer_one_stays_and_is_demoted_when_its_quantum_is_spent() -> None:
    policy = mlfq()
    job, other = bare_job(0, 1.0), bare_job(1, 2.0)
    policy.add(job, 0.0)
    policy.add(other, 0.0)
    job.next_seconds = 16.0
    policy.refresh(job, 1.0)
    assert policy.level(job) == 0
    job.next_seconds, job.attained = 15.0, 1.0
    policy.on_service(job, 1.0, 2.0)
    assert policy.level(job) == 4


def test_plain_mlfq_does_not_look_at_prefills() -> None:
    policy = mlfq(skip_join=False)
    job = bare_job(0, 8.0)
    policy.add(job, 0.0)
    job.next_seconds = 1.0
    policy.refresh(job, 1.0)
    assert policy.level(job) == 0


def test_what_the_program_was_served_still_counts() -> None:
    policy = mlfq()
    job = bare_job(0, 8.0)
    job.inherited = 7.0
    policy.add(job, 0.0)
    assert policy.level(job) == 3
    job.next_seconds = 1.0
    policy.refresh(job, 1.0)
    assert policy.level(job) == 3  # 1 + 2 + 4 spent


def test_it_may_be_overdue_earlier_and_not_at_the_front() -> None:
    policy = mlfq(slowdown_limit=4.0)
    job, other = bare_job(0, 8.0), bare_job(1, 16.0)
    policy.add(job, 0.0)
    policy.add(other, 0.0)
    assert policy.next_deadline() == 32.0
    other.next_seconds = 5.0
    policy.refresh(other, 1.0)
    assert policy.deadline(other) == 20.0 == policy.next_deadline()
    assert [job.index for job in policy.iter_best(20.0)] == [1, 0]
    job.next_seconds = 0.5
    policy.refresh(job, 21.0)
    assert policy.level(job) == 0 and policy.next_deadline() is None
    assert [job.index for job in policy.iter_best(99.0)] == [1, 0]


def test_deadlines_brought_forward_over_and_over_take_no_memory() -> None:
    policy = mlfq(slowdown_limit=4.0)
    jobs = [bare_job(index, 30.0) for index in range(10)]
    for job in jobs:
        policy.add(job, 0.0)
    for turn in range(1000):
        job = jobs[turn % 10]
        job.next_seconds = 30.0 - turn / 1000
        policy.refresh(job, 0.0)
    assert len(policy._deadlines._heap) <= 2 * 10 + 65
    assert policy.next_deadline() == min(policy.deadline(job) for job in jobs)


def test_fcfs_keeps_the_order_and_updates_its_sums() -> None:
    policy = FirstComeFirstServed()
    jobs = [bare_job(index, 4.0) for index in range(3)]
    for job in jobs:
        policy.add(job, 0.0)
    jobs[0].next_seconds = 1.0
    policy.refresh(jobs[0], 1.0)
    assert list(policy.iter_best(1.0)) == jobs and policy.work_ahead(jobs[2], 1.0) == 5.0 == policy.backlog(1.0) - 4


def learned() -> LengthDistribution:
    lengths = LengthDistribution(100)
    draw = random.Random(0)
    for _ in range(400):
        lengths.ended(0, draw.choice([2, 9, 60]))
    return lengths


def made(name: str) -> Policy:
    if name == "srpt":
        return ShortestRemainingTime(COST)
    return Gittins(cost=COST, lengths=learned(), num_levels=12, starvation_limit=None)


@pytest.mark.parametrize("name", ["srpt", "gittins"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=30))
def test_the_order_is_that_of_jobs_that_came_so(name: str, prefills: list[tuple[int, int]]) -> None:
    """As far as the index tells them apart: equals stay in the order in which they became so."""
    policy, fresh = made(name), made(name)
    jobs = [unit_job(index, 0.0, before, 20) for index, (before, _) in enumerate(prefills)]
    same = [unit_job(index, 0.0, after, 20) for index, (_, after) in enumerate(prefills)]
    for job, other in zip(jobs, same, strict=True):
        policy.add(job, 0.0)
        fresh.add(other, 0.0)
    list(policy.iter_best(0.0))
    list(fresh.iter_best(0.0))
    for job, (_, after) in zip(jobs, prefills, strict=True):
        job.next_seconds = float(after)
        policy.refresh(job, 1.0)
    order = list(policy.iter_best(1.0))
    assert order == sorted(order, key=policy.rank)
    ranks = [fresh.rank(same[job.index])[:-1] for job in order]
    assert ranks == sorted(ranks)
    assert policy.backlog(1.0) == pytest.approx(fresh.backlog(1.0))


def test_a_job_of_a_priority_is_refreshed_there() -> None:
    policy = create_policy(SchedulerConfig(), COST)
    job = unit_job(0, 0.0, 16, 4, priority=3)
    policy.add(job, 0.0)
    job.next_seconds = 2.0
    policy.refresh(job, 0.0)
    assert policy.level(job) == 1
