from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import bare_job
from unit_server import COST, UnitServer, unit_job

from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel
from fastserve.policies import POLICIES, create_policy
from fastserve.policies.fcfs import FirstComeFirstServed
from fastserve.policies.mlfq import MultiLevelFeedbackQueue
from fastserve.policies.queue import JobQueue
from fastserve.types import DEVICE, HOST, InvalidRequest, Job


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_made_by_name(name: str) -> None:
    policy = create_policy(SchedulerConfig(policy=name), CostModel.constant(0.01))
    job = bare_job(0, 0.01)
    job.known_output = 3
    policy.add(job, 0.0)
    assert len(policy) == 1


def test_an_unknown_policy_is_refused_with_the_choices() -> None:
    with pytest.raises(
        InvalidRequest, match=r"policy: must be one of fcfs, mlfq, skip-join-mlfq, srpt, gittins; got 'lifo'"
    ):
        create_policy(SchedulerConfig(policy="lifo"), CostModel.constant(0.01))


def test_the_first_quantum_is_a_decode_at_batch_1() -> None:
    cost = CostModel(per_iteration=0.01, per_token=0.002)
    policy = create_policy(SchedulerConfig(), cost)
    just, above = bare_job(0, cost.decode_seconds(1)), bare_job(1, cost.decode_seconds(1) * 1.01)
    policy.add(just, 0.0)
    policy.add(above, 0.0)
    assert (policy.level(just), policy.level(above)) == (0, 1)


def test_fcfs_keeps_the_order_of_arrival_whatever_is_served() -> None:
    policy = FirstComeFirstServed()
    jobs = [bare_job(index, 2.0) for index in range(4)]
    for entry in jobs:
        policy.add(entry, 0.0)
    jobs[0].next_seconds = 0.5
    policy.on_service(jobs[0], 2.0, 1.0)
    policy.remove(jobs[2])
    assert [entry.index for entry in policy.iter_best(9.0)] == [0, 1, 3]
    assert [policy.work_ahead(entry, 9.0) for entry in (jobs[0], jobs[1], jobs[3])] == [0.0, 0.5, 2.5]
    assert policy.backlog(9.0) == 4.5 and policy.horizon(jobs[0]) == math.inf


def test_work_ahead_is_the_papers_sum() -> None:
    """Quanta 1, 2, 4, 8: a job of level 0 ahead of one of level 3 will spend 1 + 2 + 4 s first, one of level 2 4 s."""
    policy = MultiLevelFeedbackQueue(quantum=1.0, num_levels=5, starvation_limit=None, skip_join=True)
    jobs = [bare_job(0, 1.0), bare_job(1, 1.0), bare_job(2, 4.0), bare_job(3, 8.0), bare_job(4, 8.0)]
    for entry in jobs:
        policy.add(entry, 0.0)
    policy.on_service(jobs[3], 3.0, 1.0)
    assert [policy.work_ahead(entry, 1.0) for entry in jobs] == [0, 1, 2 * 3, 2 * 7 + 4, 2 * 7 + 4 + 5]
    assert policy.backlog(1.0) == 2 * 15 + 12 + 8 + 8  # up to the last level


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(POLICIES)), st.integers(0, 10**6), st.integers(1, 4), st.booleans(), st.booleans())
def test_the_order_is_that_of_ranks_and_work_is_conserved(
    name: str, seed: int, batch: int, lumped: bool, ranked: bool
) -> None:
    draw = random.Random(seed)
    limits = {"starvation_limit": draw.choice([None, 9.0]), "slowdown_limit": draw.choice([None, 2.0])}
    server = UnitServer(create_policy(SchedulerConfig(policy=name, **limits), COST), batch, lumped=lumped)
    jobs = [
        unit_job(
            i, float(draw.randrange(60)), draw.randint(1, 9), draw.randint(1, 20), priority=ranked * draw.choice([0, 1])
        )
        for i in range(30)
    ]
    waiting = sorted(jobs, key=lambda job: job.arrival, reverse=True)
    policy = server.policy
    while waiting or len(policy):
        if not len(policy):
            server.now = max(server.now, waiting[-1].arrival)
        while waiting and waiting[-1].arrival <= server.now:
            server.add(waiting.pop())
        order = list(policy.iter_best(server.now))
        assert len(order) == len(set(order)) == len(policy)
        assert order == sorted(order, key=policy.rank)
        assert name == "srpt" or policy.work_ahead(order[0], server.now) == 0.0
        for job in order:  # whoever is overdue has been promoted; after a part of a prompt, a little late
            assert policy.deadline(job) > server.now - (limits["slowdown_limit"] or 0)
        assert len(server.step()) == min(batch, len(order))
    assert len(server.finish) == 30
    assert sum(map(len, server.schedule)) == sum(len(job.prompt) + len(job.output) - 1 for job in jobs)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(["fcfs", "mlfq", "skip-join-mlfq", "srpt"]), st.integers(0, 10**6), st.integers(1, 4))
def test_service_in_lumps_gives_the_same_schedule(name: str, seed: int, batch: int) -> None:
    schedules = []
    for lumped in (False, True):
        draw = random.Random(seed)
        config = SchedulerConfig(policy=name, starvation_limit=15.0)
        server = UnitServer(create_policy(config, COST), batch, lumped=lumped)
        server.run([unit_job(i, float(draw.randrange(60)), draw.randint(1, 9), draw.randint(1, 20)) for i in range(30)])
        schedules.append([tuple(sorted(ran)) for ran in server.schedule])
    assert schedules[0] == schedules[1]


actions = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 50)),
        st.tuples(st.just("remove"), st.integers(0, 10**6)),
        st.tuples(st.just("set"), st.integers(0, 10**6)),
        st.tuples(st.just("move"), st.integers(0, 10**6)),
        st.tuples(st.just("again"), st.integers(0, 10**6)),
        st.tuples(st.just("ask"), st.integers(0, 10**6)),
    ),
    max_size=400,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(actions)
def test_a_queue_keeps_order_tiers_and_sums(actions: list[tuple[str, int]]) -> None:
    queue, plain = JobQueue(), dict[Job, float]()
    for number, (action, value) in enumerate(actions):
        chosen = list(plain)[value % len(plain)] if plain and action != "append" else None
        if action == "append":
            new = bare_job(number, 1.0)
            queue.append(new, float(value))
            plain[new] = float(value)
        elif chosen is not None and action == "remove":
            queue.remove(chosen)
            del plain[chosen]
        elif chosen is not None and action == "move":
            tier = (None, DEVICE, HOST)[value % 3]
            queue.move(chosen, tier)
            chosen.tier = tier
        elif chosen is not None and action == "again":  # to the tail
            queue.remove(chosen)
            queue.append(chosen, 2.0)
            del plain[chosen]
            plain[chosen] = 2.0
        elif chosen is not None and action == "ask":
            before = list(plain)[: list(plain).index(chosen)]
            assert queue.ahead(chosen) == pytest.approx(sum(plain[job] for job in before), abs=1e-9)
        elif chosen is not None:
            queue.set_seconds(chosen, plain[chosen] / 2 + 1)
            plain[chosen] = plain[chosen] / 2 + 1
        for tier in (DEVICE, HOST):
            jobs = [job for job in plain if job.tier == tier]
            assert list(queue.tier(tier)) == jobs and list(queue.tier(tier, last_first=True)) == jobs[::-1]
    assert list(queue) == list(plain) and len(queue) == len(plain)
    total = 0.0
    for entry, seconds in plain.items():
        assert queue.ahead(entry) == pytest.approx(total, abs=1e-9)
        assert queue.seconds(entry) == seconds
        total += seconds


def test_a_queue_renumbers_and_keeps_its_sums() -> None:
    queue = JobQueue()
    jobs = [bare_job(index, 1.0) for index in range(20_000)]
    for entry in jobs:
        queue.append(entry, 1.0)
        queue.move(entry, DEVICE)
        entry.tier = DEVICE
        if entry.index % 30:
            queue.remove(entry)
    assert [queue.ahead(entry) for entry in jobs[::30]] == list(range(667))
    assert list(queue) == list(queue.tier(DEVICE)) == jobs[::30] and queue.total() == 667
    assert queue.ticket(jobs[-20]) < 20_000
