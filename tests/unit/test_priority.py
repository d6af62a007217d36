"""Priorities order a tenant's jobs before its policy does, on every policy, and nobody else's."""

from __future__ import annotations

import random

import pytest
from unit_server import COST, UnitServer, unit_job

from fastserve.config import SchedulerConfig
from fastserve.policies import POLICIES, Policy, create_policy
from fastserve.policies.fcfs import FirstComeFirstServed
from fastserve.policies.priority import ByPriority
from fastserve.types import InvalidRequest, Job


def policy(name: str, **options: object) -> Policy:
    return create_policy(SchedulerConfig(policy=name, **options), COST)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", POLICIES)
def test_lower_values_go_first_and_the_policy_decides_among_equals(name: str) -> None:
    """Each value's jobs run as they would alone in the time the better ones leave, and here those end at once."""
    jobs = [unit_job(i, 0.0, 1 + i % 3, 2 + i % 4, priority=(2, -1, 0)[i % 3]) for i in range(12)]
    server = UnitServer(policy(name, starvation_limit=None))
    server.run(jobs)
    order = [jobs[ran[0]].priority for ran in server.schedule]
    assert order == sorted(order)
    for value in (2, -1, 0):
        alone = UnitServer(policy(name, starvation_limit=None))
        alone.run([unit_job(i, 0.0, 1 + i % 3, 2 + i % 4) for i in range(12) if (2, -1, 0)[i % 3] == value])
        assert alone.schedule == [ran for ran in server.schedule if jobs[ran[0]].priority == value]


def test_an_urgent_job_preempts() -> None:
    server = UnitServer(policy("fcfs"))
    server.run([unit_job(0, 0.0, 1, 5), unit_job(1, 2.0, 1, 2, priority=-5)])
    assert server.schedule == [(0,), (0,), (1,), (1,), (0,), (0,), (0,)]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("tenants", [("ann", "bob"), ("key 0/", "key 1/bob"), ("key 0/ann", "key 0/bob")])
def test_a_priority_brings_a_tenant_no_more(name: str, tenants: tuple[str, str]) -> None:
    """Whatever one claims, both run side by side; and of its own jobs, the urgent one goes first."""
    urgent, modest = tenants
    server = UnitServer(policy(name, starvation_limit=None), 2)
    jobs = [unit_job(i, 0.0, 1, 8, priority=-(2**31) + (i == 0)) for i in range(4)]
    jobs += [unit_job(i, 0.0, 1, 8, priority=2**31 - 1) for i in range(4, 8)]
    for job in jobs:
        job.tenant = urgent if job.index < 4 else modest
    server.run(jobs)
    for ran in server.schedule:
        assert sorted(index // 4 for index in ran) == [0, 1]
    assert server.finish[0] == max(server.finish[index] for index in range(4))


def test_bounds_act_within_a_priority() -> None:
    server = policy("skip-join-mlfq", starvation_limit=5.0)
    urgent, starved, short = unit_job(0, 0.0, 1, 9, priority=-1), unit_job(1, 0.0, 8, 9), unit_job(2, 0.0, 1, 9)
    for job in (urgent, starved, short):
        server.add(job, 0.0)
    assert [job.index for job in server.iter_best(4.9)] == [0, 2, 1]
    assert server.next_deadline() == 5.0 == server.deadline(starved)
    short.waiting_since = None
    server.on_service(short, 1.0, 5.0)  # to level 1
    assert [job.index for job in server.iter_best(5.0)] == [0, 1, 2]


def test_ranks_sort_as_iter_best_does_and_work_ahead_adds_up() -> None:
    server = policy("fcfs")
    jobs = [unit_job(i, 0.0, 1 + i, 2, priority=i % 2) for i in range(6)]
    for job in jobs:
        server.add(job, 0.0)
    assert [job.index for job in sorted(jobs, key=server.rank)] == [0, 2, 4, 1, 3, 5]
    assert [server.work_ahead(jobs[i], 0.0) for i in (0, 2, 4, 1, 3, 5)] == [0, 1, 1 + 3, 9, 9 + 2, 9 + 2 + 4]
    assert server.backlog(0.0) == 21 and len(server) == 6


def test_values_come_and_go() -> None:
    made: list[FirstComeFirstServed] = []

    def make() -> FirstComeFirstServed:
        made.append(FirstComeFirstServed())
        return made[-1]

    server = ByPriority(make)
    draw = random.Random(1)
    live: list[Job] = []
    for index in range(500):
        job = unit_job(index, 0.0, 1, 2, priority=draw.randrange(4))
        server.add(job, 0.0)
        live.append(job)
        while len(live) > draw.randrange(6):
            server.remove(live.pop(draw.randrange(len(live))))
        assert len(server) == len(live)
        assert [job.index for job in server.iter_best(0.0)] == [
            job.index for job in sorted(live, key=lambda job: (job.priority, job.index))
        ]
        assert len(server._policies) <= max(1, len({job.priority for job in live}))


def test_equal_priorities_need_one_policy() -> None:
    made: list[FirstComeFirstServed] = []

    def make() -> FirstComeFirstServed:
        made.append(FirstComeFirstServed())
        return made[-1]

    server = ByPriority(make)
    for index in range(10):
        job = unit_job(index, 0.0, 1, 1, priority=7)
        server.add(job, 0.0)
        server.remove(job)
    assert len(made) == 1


def test_a_refused_job_leaves_no_trace() -> None:
    server = policy("srpt")
    job = unit_job(0, 0.0, 1, 1, priority=3)
    job.known_output = None
    with pytest.raises(InvalidRequest):
        server.add(job, 0.0)
    assert len(server) == 0 and list(server.iter_best(0.0)) == [] and server.next_deadline() is None
