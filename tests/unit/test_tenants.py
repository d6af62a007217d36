"""Tenants: rows by weight, nobody saves up, nobody is idle while there is work; and one tenant is as none."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import VOCAB, Toy
from unit_server import COST, UnitServer, unit_job

from fastserve.config import SchedulerConfig
from fastserve.policies import POLICIES, create_policy
from fastserve.policies.fcfs import FirstComeFirstServed
from fastserve.policies.tenant import ByTenant
from fastserve.types import DEVICE, HOST, InvalidRequest, Job, SamplingParams

SLICE = 16  # decodes


def by_tenant(**weights: float) -> ByTenant:
    return ByTenant(FirstComeFirstServed, quantum=1.0, weights=weights)


def job_of(tenant: str, index: int, arrival: float = 0.0, prompt: int = 1, output: int = 5, priority: int = 0) -> Job:
    job = unit_job(index, arrival, prompt, output, priority=priority)
    job.tenant = tenant
    return job


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(POLICIES)),
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["one", "key 0/", "key 1/ann"]),
)
def test_one_tenant_is_as_none(name: str, seed: int, batch: int, lumped: bool, tenant: str) -> None:
    """What the policy alone makes of it, whatever the tenant is called and whoever was there before."""
    schedules = []
    for tenants in (False, True):
        draw = random.Random(seed)
        config = SchedulerConfig(policy=name, starvation_limit=draw.choice([None, 15.0]))
        policy = create_policy(config, COST)
        if not tenants:
            policy = policy._make()  # type: ignore[attr-defined]
        server = UnitServer(policy, batch, lumped=lumped)
        jobs = [unit_job(i, float(draw.randrange(60)), draw.randint(1, 9), draw.randint(1, 20)) for i in range(30)]
        for job in jobs:
            job.tenant = tenant if tenants else ""
        server.run(jobs)
        schedules.append(server.schedule)
    assert schedules[0] == schedules[1]


def test_rows_are_shared_by_weight_and_no_row_is_empty() -> None:
    """1 : 2 : 3 of 4 rows; every counter stays within a slice or two of the others."""
    server = UnitServer(by_tenant(b=2.0, c=3.0), 4, lumped=True)
    for index in range(60):
        server.add(job_of("abc"[index % 3], index, output=300))
    served = Counter[str]()
    for step in range(1, 1201):
        ran = server.step()
        assert len(ran) == 4
        served.update(job.tenant for job in ran)
        for tenant, share in (("a", 1 / 6), ("b", 2 / 6), ("c", 3 / 6)):
            assert abs(served[tenant] - 4 * step * share) < 3 * SLICE, (step, tenant)


def shares(weights: dict[str, float], tenants: dict[str, int], rows: int = 4) -> dict[str, float]:
    """Of 2400 steps, where each tenant has so many jobs that never end."""
    policy = create_policy(SchedulerConfig(policy="fcfs", tenant_weights=weights), COST)
    server = UnitServer(policy, rows, lumped=True)
    for index, tenant in enumerate(tenant for tenant, count in tenants.items() for _ in range(count)):
        server.add(job_of(tenant, index, output=3000))
    served = Counter[str]()
    for _ in range(2400):
        ran = server.step()
        assert len(ran) == rows
        served.update(job.tenant for job in ran)
    return {tenant: count / (2400 * rows) for tenant, count in served.items()}


def test_a_key_gets_no_more_by_naming_users() -> None:
    users = {f"key 0/u{number}": 2 for number in range(30)}
    had = shares({}, {**users, "key 1/": 4, "key 2/ann": 2, "key 2/bob": 4})
    assert sum(had[user] for user in users) == pytest.approx(1 / 3, abs=0.02)
    assert all(had[user] == pytest.approx(1 / 90, abs=0.01) for user in users)
    assert had["key 1/"] == pytest.approx(1 / 3, abs=0.02)
    assert had["key 2/ann"] == pytest.approx(1 / 6, abs=0.02) == had["key 2/bob"]


def test_a_key_is_weighed_as_a_whole_and_its_users_within_it() -> None:
    tenants = {"key 0/": 4, "key 0/ann": 4, "key 1/": 4, "key 1/ann": 4}
    had = shares({"key 0": 3.0, "key 0/ann": 3.0}, tenants)
    assert had["key 0/ann"] == pytest.approx(3 / 4 * 3 / 4, abs=0.02)
    assert had["key 0/"] == pytest.approx(3 / 4 * 1 / 4, abs=0.02)
    assert had["key 1/"] == pytest.approx(1 / 8, abs=0.02) == had["key 1/ann"]


def test_names_without_a_key_share_one_by_one() -> None:
    had = shares({}, {"a/x": 4, "a/y": 4, "b": 4, "keys/z": 4})
    assert all(share == pytest.approx(1 / 4, abs=0.01) for share in had.values())


def test_a_second_user_of_a_lone_key_does_not_pay_for_the_first() -> None:
    """What the lone user of the lone key was served is told before the other's jobs are chosen: it does not count."""
    policy = create_policy(SchedulerConfig(policy="fcfs"), COST)
    policy.add(job_of("key 0/ann", 0), 0.0)
    list(policy.iter_best(0.0))
    policy.add(job_of("key 0/ann", 1), 0.0)
    assert not policy.settles()
    policy.add(job_of("key 0/bob", 2), 0.0)
    assert policy.settles()
    list(policy.iter_best(0.0))
    assert not policy.settles()


def test_who_comes_back_gets_a_share_and_no_more() -> None:
    """After 1000 s alone, a is not made to wait until b has had as much; nor is what b had before held against it."""
    server = UnitServer(by_tenant(), 2, lumped=True)
    server.add(job_of("b", 0, output=30))
    for _ in range(30):
        server.step()
    for index in range(1, 5):
        server.add(job_of("a", index, output=2000))
    for _ in range(500):
        server.step()
    for index in range(5, 9):
        server.add(job_of("b", index, output=2000))
    served = Counter[str]()
    for step in range(1, 301):
        served.update(job.tenant for job in server.step())
        assert abs(served["a"] - served["b"]) <= 3 * SLICE, step


def test_a_lone_tenants_service_is_told_before_others_are_chosen() -> None:
    """fcfs is not asked for service: 200 tokens of each of two jobs are not told when b comes. They do not count."""
    toy = Toy(policy="fcfs", max_num_seqs=2, max_model_len=1024, num_blocks=1024)

    def add(name: str, tenant: str) -> None:
        params = SamplingParams(max_tokens=900, ignore_eos=True)
        toy.engine.add_job(name, [1], params, seed=0, vocab_size=VOCAB, tenant=tenant)

    for index in range(4):
        add(f"a{index}", "a")
    for _ in range(200):
        toy.engine.step()
    for index in range(4):
        add(f"b{index}", "b")
    for _ in range(300):
        toy.engine.step()
        toy.engine.check_integrity()
    ran = Counter(name[0] for record in toy.records[200:] for name in record.job_ids)
    assert abs(ran["a"] - ran["b"]) <= 3 * SLICE
    changes = sum(one.job_ids != two.job_ids for one, two in zip(toy.records[200:], toy.records[201:], strict=False))
    assert changes < 3 * 300 / SLICE


def test_a_flood_waits_for_itself() -> None:
    """c has 50 times as many jobs as a and b, who have no more than their share: these wait for no slice of it."""
    jct = {}
    for flood in (0, 500):
        draw = random.Random(5)
        server = UnitServer(create_policy(SchedulerConfig(), COST), 4, lumped=True)
        jobs = [job_of("ab"[i % 2], i, 40.0 * i + draw.randrange(9), 3, draw.randint(5, 40)) for i in range(40)]
        jobs += [job_of("c", 1000 + i, 3.0 * i, draw.randint(1, 9), draw.randint(5, 40)) for i in range(flood)]
        server.run(jobs)
        jct[flood] = [server.finish[job.index] - job.arrival for job in jobs[:40]]
    assert max(new - old for new, old in zip(jct[500], jct[0], strict=True)) <= 2


def test_a_prompt_counts_for_as_long_as_it_takes() -> None:
    """A row for a prompt of 160 tokens is worth ten of another tenant's jobs."""
    policy = by_tenant()
    for index in range(3):
        policy.add(job_of("a", index, prompt=160), 0.0)
    for index in range(3, 25):
        policy.add(job_of("b", index), 0.0)
    order = "".join(job.tenant for job in policy.iter_best(0.0))
    assert order == "a" + "b" * 10 + "a" + "b" * 10 + "a" + "b" * 2


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(POLICIES)), st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_the_order_is_that_of_ranks_in_every_tier(name: str, seed: int, batch: int, tenants: int, ranked: bool) -> None:
    draw = random.Random(seed)
    named = draw.choice(["{0}", "key {1}/{0}"])  # no keys, or three
    names = [named.format(tenant, tenant % 3) for tenant in range(tenants)]
    weights = {tenant: draw.choice([0.5, 1.0, 4.0]) for tenant in [*names, "key 0"]}
    config = SchedulerConfig(
        policy=name, starvation_limit=draw.choice([None, 9.0]), slowdown_limit=draw.choice([None, 2.0]),
        tenant_weights=weights,
    )  # fmt: skip
    server = UnitServer(create_policy(config, COST), batch, lumped=draw.random() < 0.5)
    policy = server.policy
    jobs = [
        job_of(
            draw.choice(names), i, float(draw.randrange(60)), draw.randint(1, 9), draw.randint(1, 20),
            priority=ranked * draw.choice([0, 1]),
        )
        for i in range(40)
    ]  # fmt: skip
    waiting = sorted(jobs, key=lambda job: job.arrival, reverse=True)
    live: list[Job] = []
    while waiting or len(policy):
        if not len(policy):
            server.now = max(server.now, waiting[-1].arrival)
        while waiting and waiting[-1].arrival <= server.now:
            live.append(waiting.pop())
            server.add(live[-1])
        for job in draw.sample(live, min(2, len(live))):
            if not job.finished:
                tier = draw.choice([None, DEVICE, HOST])
                policy.move(job, tier)
                job.tier = tier
        order = list(policy.iter_best(server.now))
        assert len(order) == len(set(order)) == len(policy)
        assert order == sorted(order, key=policy.rank)
        for tier in (DEVICE, HOST):
            there = [job for job in order if job.tier == tier]
            assert list(policy.iter_tier(tier)) == there
            assert list(policy.iter_tier(tier, worst_first=True)) == there[::-1]
        assert name == "srpt" or policy.work_ahead(order[0], server.now) == 0.0
        assert all(0 <= policy.work_ahead(job, server.now) < math.inf for job in order)
        assert sum(policy.work_ahead(job, server.now) > policy.backlog(server.now) + 1e-6 for job in order) == 0
        # Those that nobody looked at rank behind those that somebody did.
        looked = [job for job, _ in zip(policy.iter_best(server.now), range(batch), strict=False)]
        assert sorted(order, key=policy.rank)[: len(looked)] == sorted(looked, key=policy.rank)
        for job in server.step():
            if job.finished:
                live.remove(job)
        # Nor do those that were looked at in an order before.
        next(policy.iter_best(server.now), None)
        for tier in (DEVICE, HOST):
            there = [job for job in sorted(live, key=policy.rank) if job.tier == tier]
            assert list(policy.iter_tier(tier)) == there
    assert len(server.finish) == 40
    assert sum(map(len, server.schedule)) == sum(len(job.prompt) + len(job.output) - 1 for job in jobs)


class Counting(FirstComeFirstServed):
    asked = 0

    def iter_best(self, now: float):  # type: ignore[no-untyped-def]
        Counting.asked += 1
        return super().iter_best(now)


def test_a_decision_asks_no_more_tenants_than_it_has_rows() -> None:
    policy = ByTenant(Counting, quantum=1.0, weights={})
    for index in range(5000):
        policy.add(job_of(str(index), index), 0.0)
    Counting.asked = 0
    for turn in range(10):
        best = [job for job, _ in zip(policy.iter_best(0.0), range(16), strict=False)]
        for job in best:
            job.served += SLICE
            policy.on_service(job, float(SLICE), float(turn))
        policy.next_deadline()
    assert Counting.asked <= 10 * 17
    assert len(policy._opened) <= 17 and len(policy._places) <= 17


def test_tenants_come_and_go() -> None:
    policy, draw, live = by_tenant(), random.Random(2), list[Job]()
    for index in range(2000):
        job = job_of(str(draw.randrange(50)), index)
        policy.add(job, 0.0)
        live.append(job)
        while len(live) > draw.randrange(8):
            policy.remove(live.pop(draw.randrange(len(live))))
        assert len(policy) == len(live) and set(policy.iter_best(0.0)) == set(live)
        assert len(policy._tenants) == max(1, len({job.tenant for job in live}))
        assert policy.backlog(0.0) == pytest.approx(len(live))
    for job in live:
        policy.remove(job)
    assert len(policy) == 0 == policy.backlog(0.0) and list(policy.iter_best(0.0)) == []


def test_a_refused_job_leaves_no_trace() -> None:
    policy = create_policy(SchedulerConfig(policy="srpt"), COST)
    fine, refused = job_of("a", 0), job_of("b", 1)
    refused.known_output = None
    policy.add(fine, 0.0)
    with pytest.raises(InvalidRequest):
        policy.add(refused, 0.0)
    assert list(policy.iter_best(0.0)) == [fine] and len(policy) == 1 and not policy.settles()


def test_bounds_act_within_a_tenant() -> None:
    policy = create_policy(SchedulerConfig(starvation_limit=5.0), COST)
    for job in (job_of("a", 0, prompt=8), job_of("a", 1), job_of("b", 2), job_of("b", 3)):
        policy.add(job, 0.0)
    assert [job.index for job in policy.iter_best(0.0)] == [1, 2, 0, 3]
    assert policy.next_deadline() == 5.0
    assert [job.index for job in policy.iter_best(5.0)] == [1, 2, 0, 3]
    policy.add(job_of("a", 4), 6.0)
    assert [job.index for job in policy.iter_best(6.0)] == [1, 2, 0, 3, 4]  # it came to level 0 before
