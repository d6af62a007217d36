"""What a flood may do to others: how much longer it makes iterations, and whose memory it holds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import VOCAB, Toy, bare_job

from fastserve.cost import CostModel, Link
from fastserve.engine import Engine
from fastserve.policies import Policy
from fastserve.policies.average import Average
from fastserve.policies.fcfs import FirstComeFirstServed
from fastserve.policies.tenant import ByTenant
from fastserve.types import Job, SamplingParams

ROWS = CostModel(per_iteration=7.0, per_row=1.0)  # 8 s alone: one more row is an eighth
FREE = CostModel.constant(1.0)


def ask(toy: Toy, name: str, tenant: str, prompt: int = 4, output: int = 20) -> Job:
    tokens = [(7 * i + 3 * len(name)) % VOCAB for i in range(prompt)]
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    return toy.engine.add_job(name, tokens, params, seed=0, vocab_size=VOCAB, tenant=tenant)


def flooded(cost: CostModel, tenant: str = "flood", **options: object) -> Toy:
    """A flood of sixty long jobs that has been served for a while, and a batch of eight rows."""
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_blocks": 4096, "max_model_len": 2048}
    toy = Toy(cost, **{**defaults, "starvation_limit": None, **options})
    for number in range(60):
        ask(toy, f"{tenant}{number}", tenant, output=1500)
    for _ in range(40):
        toy.engine.step()
    return toy


def owners(toy: Toy, since: int) -> list[Counter[str]]:
    """How many rows each iteration had, by the tenants that names begin with."""
    return [Counter(name.rstrip("0123456789") for name in record.job_ids) for record in toy.records[since:]]


# --- the time of an iteration -----------------------------------------------------------------------------------------


def test_beside_a_flood_a_job_is_hardly_slower_than_alone() -> None:
    alone = Toy(ROWS, max_num_seqs=8, num_blocks=4096)
    job = ask(alone, "a", "ann")
    alone.run()
    toy = flooded(ROWS)
    ask(toy, "b", "ann")
    for _ in range(200):
        toy.engine.step()
    before = len(toy.records)
    own = ask(toy, "a", "ann")
    while not own.finished:
        toy.engine.step()
        toy.engine.check_integrity()
    assert own.metrics.jct is not None and job.metrics.jct is not None
    assert own.metrics.jct < 1.2 * job.metrics.jct
    assert all(each["flood"] in (1, 2) for each in owners(toy, before + 2))
    since = len(toy.records)
    for _ in range(10):
        toy.engine.step()
    assert all(each["flood"] == 8 for each in owners(toy, since + 1)), "a row stays empty, and nobody else is there"


def test_where_rows_are_free_a_flood_loses_none() -> None:
    toy = flooded(FREE)
    since = len(toy.records)
    for number in range(3):
        ask(toy, f"ann{number}", "ann")
    for _ in range(15):
        toy.engine.step()
    assert all(each == {"flood": 5, "ann": 3} for each in owners(toy, since + 2))


@pytest.mark.parametrize(("ann", "flood"), [("ann", "flood"), ("key 0/ann", "key 1/"), ("key 0/ann", "key 0/flood")])
def test_a_flood_gets_no_less_than_others(ann: str, flood: str) -> None:
    """Ann has two jobs at any time, who would leave no time for more than one row: the flood has as much as they, where
    a prompt counts for more than a decode."""
    toy = flooded(ROWS, flood)
    number, live = 0, list[Job]()
    for step in range(2400):
        if step == 400:
            since = len(toy.records)
        live = [job for job in live if not job.finished]
        while len(live) < 2:
            live.append(ask(toy, f"ann{number}", ann, output=60))
            number += 1
        toy.engine.step()
    rows = sum(owners(toy, since), Counter())
    assert 0.95 < rows[flood.rstrip("0123456789")] / rows["ann"] < 1.2


def test_many_with_much_to_ask_fill_every_row() -> None:
    """Nobody who asks for little is there: nobody is to be sheltered, and rows are shared as ever."""
    toy = flooded(ROWS)
    for number in range(60):
        ask(toy, f"other{number}", "other", output=1500)
    since = len(toy.records)
    for _ in range(600):
        toy.engine.step()
    rows = owners(toy, since + 2)
    assert all(each.total() == 8 for each in rows)
    assert abs(sum(rows, Counter())["flood"] / (8 * len(rows)) - 0.5) < 0.05


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    policy=st.sampled_from(["fcfs", "skip-join-mlfq", "gittins"]),
    tenants=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=4),
    keyed=st.booleans(),
    flood=st.integers(40, 90),
    stages=st.sampled_from([1, 1, 2]),
    blocks=st.sampled_from([40, 100, 4096]),
    host=st.sampled_from([0, 60]),
    seed=st.integers(0, 10**6),
)
def test_all_end_and_no_iteration_is_too_long(
    policy: str, tenants: list[tuple[int, int]], keyed: bool, flood: int, stages: int, blocks: int, host: int, seed: int
) -> None:
    """Whatever comes when: the books balance, tokens are right, all jobs end, and beside others' rows a flood has one
    row of its share (of 8, among up to 5) or two, and as many more as make the iteration an eighth longer."""
    draw = np.random.default_rng(seed)
    toy = Toy(
        ROWS, policy=policy, max_num_seqs=8, max_num_batched_tokens=64, num_blocks=blocks, num_host_blocks=host,
        block_size=4, max_model_len=100, pipeline_parallel_size=stages, max_in_flight=stages,
        enable_prefix_caching=bool(draw.integers(2)),
    )  # fmt: skip
    link = Link(offload_block=0.02, upload_block=0.02)
    toy.engine = Engine(toy.config, toy.executor, ROWS, link=link, clock=toy.clock, on_iteration=toy.records.append)
    jobs: list[Job] = []
    to_come = [
        (int(draw.integers(60)), "flood", int(draw.integers(1, 20)), int(draw.integers(1, 30))) for _ in range(flood)
    ]
    for number, (count, output) in enumerate(tenants):
        name = f"key {number % 2}/{number}" if keyed else f"user{number}"
        to_come += [(int(draw.integers(60)), name, int(draw.integers(1, 20)), output) for _ in range(count)]
    to_come.sort(reverse=True)
    names: dict[str, str] = {}
    for step in range(6000):
        while to_come and to_come[-1][0] <= step:
            _, tenant, prompt, output = to_come.pop()
            jobs.append(ask(toy, str(len(jobs)), tenant, prompt, output))
            names[jobs[-1].job_id] = tenant
        if not (to_come or toy.engine.has_work):
            break
        if toy.engine.has_work:
            toy.engine.step()
            toy.engine.check_integrity()
    assert all(job.finished and job.output == toy.expected(job) for job in jobs)
    toy.engine.scheduler.residency.check_integrity()
    assert not toy.engine.scheduler.blocks.accounts
    if stages > 1:  # which have a few rows each
        return
    live = Counter(names.values())
    for record in toy.records:
        rows = Counter(names[name] == "flood" for name in record.job_ids)
        if rows[False] and rows[True] and live["flood"] > 4 * 8 and record.waiting > 4 * 8 + sum(n for n, _ in tenants):
            within = rows[False] + min(rows[True], 4)  # two tenants, at the least: a half of the rows
            assert 7 + rows.total() <= (7 + within) * 1.125 + 1e-9


# --- policies ---------------------------------------------------------------------------------------------------------


def by_tenant(rows: float = 2.0, **weights: float) -> ByTenant:
    return ByTenant(FirstComeFirstServed, quantum=1.0, rows=rows, weights=weights)


def add(policy: Policy, tenant: str, numbers: range) -> list[Job]:
    jobs = [bare_job(number, 1.0) for number in numbers]
    for job in jobs:
        job.tenant = tenant
        policy.add(job, 0.0)
    return jobs


def served(policy: ByTenant, job: Job, seconds: float) -> None:
    job.served += round(seconds)
    policy.on_service(job, seconds, 0.0)


def beyond(policy: ByTenant) -> str:
    """The order, by the first letters of tenants; in capitals, who is beyond."""
    return "".join(
        job.tenant[0].upper() if policy.beyond else job.tenant[0] for job in policy.iter_best(0.0)
    )  # fmt: skip


def test_who_has_much_to_ask_and_was_served_more_is_beyond() -> None:
    """Two rows, so that eight jobs are few and nine are many; four slices of 16 s ahead are too much."""
    policy = by_tenant()
    many, (one,) = add(policy, "many", range(9)), add(policy, "one", range(9, 10))
    assert beyond(policy) == "mo" + "M" * 8  # one row of two is a half of them
    served(policy, many[0], 120.0)  # 60 ahead of the average
    assert beyond(policy) == "om" + "M" * 8
    served(policy, many[0], 20.0)
    assert beyond(policy) == "o" + "M" * 9
    policy.remove(many[8])
    assert beyond(policy) == "o" + "m" * 8
    served(policy, one, 30.0)
    add(policy, "many", range(20, 21))
    assert beyond(policy) == "om" + "M" * 8, "others have caught up"


@pytest.mark.parametrize(
    ("jobs", "others", "beyond_share"), [(24, 1, True), (12, 1, True), (6, 1, False), (24, 4, False)]
)
def test_who_keeps_many_times_as_many_jobs_as_others_is_beyond(jobs: int, others: int, beyond_share: bool) -> None:
    """A client of a few dozen connections, that never has jobs for more batches than a few."""
    policy = by_tenant(rows=8.0)
    many = add(policy, "many", range(jobs))
    for name in ("ann", "bob", "cid"):
        add(policy, name, range(others))
    next(policy.iter_best(0.0))
    served(policy, many[0], 100.0)
    assert [job for job in policy.iter_best(0.0) if policy.beyond] == (many if beyond_share else [])
    assert policy.is_sheltered(many[0]) is not beyond_share


@pytest.mark.parametrize("lately", [False, True])
def test_of_two_tenants_nobody_is_the_usual_one(lately: bool) -> None:
    """But those that had jobs lately are tenants too: people think between their calls."""
    policy = by_tenant(rows=8.0)
    many, _ = add(policy, "many", range(24)), add(policy, "one", range(1))
    if lately:
        for job in add(policy, "thinks", range(1)):
            policy.remove(job)
    next(policy.iter_best(0.0))
    served(policy, many[0], 100.0)
    assert any([policy.beyond for _ in policy.iter_best(0.0)]) is lately


def test_weights_weigh() -> None:
    """Three quarters of the rows, of the time, and of what others are compared with."""
    policy = by_tenant(rows=4.0, many=3.0)
    many, (one,) = add(policy, "many", range(20)), add(policy, "one", range(20, 21))
    served(policy, one, 200.0)
    served(policy, many[0], 600.0)
    assert beyond(policy).count("m") == 3
    served(policy, many[0], 192.0)  # a twelfth ahead of the average, by its weight: three slices
    assert beyond(policy).count("m") == 1
    served(policy, many[0], 72.0)
    assert beyond(policy) == "o" + "M" * 20


def test_who_was_served_alone_is_forgiven_most_of_it() -> None:
    policy = by_tenant()
    many = add(policy, "many", range(9))
    served(policy, many[0], 10.0**6)
    (one,) = add(policy, "one", range(9, 10))
    served(policy, many[0], 10.0**6)
    assert beyond(policy) == "o" + "M" * 9
    served(policy, one, (64 - 4) * 16 * 2 + 32)  # the average goes up by half
    assert sorted(beyond(policy)[:2]) == ["m", "o"]


def test_users_of_a_key_are_sheltered_from_each_other_and_keys_from_keys() -> None:
    policy = by_tenant(rows=4.0)
    policy = ByTenant(
        FirstComeFirstServed, quantum=1.0, rows=4.0, weights={}, name=lambda tenant: tenant.partition("/")[0]
    )
    add(policy, "b/ann", range(1)), (bobs := add(policy, "b/bob", range(1, 12))), add(policy, "a", range(12, 13))
    list(policy.iter_best(0.0))
    served(policy, bobs[0], 1000.0)
    add(policy, "b/bob", range(13, 14))
    order = [(job.tenant, policy.beyond) for job in policy.iter_best(0.0)]
    assert order[:2] == [("a", False), ("b/ann", False)] or order[:2] == [("b/ann", False), ("a", False)]
    assert order[2:] == [("b/bob", True)] * 12
    small = {job.tenant: policy.is_sheltered(job) for job in policy.iter_best(0.0)}
    assert small == {"a": True, "b/ann": True, "b/bob": True}
    assert policy.shares(bobs[0]) == (1 / 2, 1 / 4)


def test_the_average_is_of_those_that_had_jobs_lately() -> None:
    average = Average(1000.0)
    average.forget(0.0)
    average.wakes("a", 1.0)
    average.wakes("b", 3.0)
    assert average.serve(0.0, 8.0, 1.0) == 8.0 and average.seconds == 2.0
    average.rests("b", 3.0)
    average.forget(59.0)
    average.serve(8.0, 4.0, 1.0)
    assert average.seconds == 4.0, "it weighs no more than those that have jobs"
    average.forget(60.0)
    assert average.weight == 1.0 and average.serve(0.0, 5000.0, 1.0) == 5000.0
    average.wakes("b", 3.0)
    assert average.weight == 4.0
    assert average.serve(5003.0, 4000.0, 1.0) == 5004.0 + 1000.0 + 1000.0, "no more than so much ahead"


# --- memory -----------------------------------------------------------------------------------------------------------


def scarce(blocks: int = 300, jobs: int = 60, host: int = 0) -> Toy:
    """A flood whose jobs hold all the memory there is, and have not been served for long enough to repay it."""
    cost = CostModel(per_iteration=1.0, per_token=0.01, per_row=0.02)
    toy = Toy(
        cost, num_blocks=blocks, num_host_blocks=host, max_num_seqs=4, max_num_batched_tokens=256, max_model_len=1000,
        starvation_limit=None,
    )  # fmt: skip
    link = Link(offload_block=0.01, upload_block=0.01)
    toy.engine = Engine(toy.config, toy.executor, cost, link=link, clock=toy.clock, on_iteration=toy.records.append)
    for number in range(jobs):
        ask(toy, f"flood{number}", "flood", prompt=100, output=200)
        toy.engine.step()
        toy.engine.step()
    return toy


@pytest.mark.parametrize(("blocks", "jobs", "host"), [(300, 60, 0), (150, 100, 300)])
def test_who_holds_more_than_its_share_gives_way_to_who_holds_less(blocks: int, jobs: int, host: int) -> None:
    """Without that, the first token comes after 121 steps, and 40."""
    toy = scarce(blocks, jobs, host)
    accounts = toy.engine.scheduler.blocks.accounts
    assert accounts["flood"] > 0.7 * blocks
    own = ask(toy, "a", "ann", prompt=60)
    steps = 0
    while not own.output:
        toy.engine.step()
        toy.engine.check_integrity()
        steps += 1
        assert steps < 20, "it waits for a flood's jobs to have repaid their memory"
    while not own.finished:
        toy.engine.step()
    assert own.output == toy.expected(own)


def test_nobody_gives_way_to_who_holds_more_than_its_share() -> None:
    """Both have a half; the one that wants has that already."""
    toy = scarce()
    policy, swap = toy.engine.scheduler.policy, toy.engine.scheduler.batches.swapping
    flood, own = next(iter(toy.engine.jobs)), ask(toy, "a", "ann", prompt=30)
    list(policy.iter_best(toy.clock()))
    accounts = toy.engine.scheduler.blocks.accounts
    accounts.update(flood=151, ann=148)
    assert swap._gives_way(flood, own) and not swap._gives_way(own, flood)
    accounts["ann"] = 149  # it wants two
    assert not swap._gives_way(flood, own)
    accounts.update(flood=150, ann=0)
    assert not swap._gives_way(flood, own)
    other = ask(toy, "b", "flood", prompt=30)
    accounts.update(flood=299)
    assert not swap._gives_way(flood, other), "it is its own tenant's"
