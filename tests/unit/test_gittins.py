"""The Gittins policy against what it must equal: fcfs, skip-join, common sense."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_server import COST, UnitServer, unit_job

from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel
from fastserve.origin import sharer_of
from fastserve.policies import Policy, create_policy
from fastserve.policies.fcfs import FirstComeFirstServed
from fastserve.policies.gittins import PROMOTED_SHARE, Gittins
from fastserve.policies.hazards import bucket
from fastserve.policies.lengths import LengthDistribution
from fastserve.policies.mlfq import MultiLevelFeedbackQueue
from fastserve.policies.tenant import ByTenant
from fastserve.types import FinishReason, Job


def learned(lengths: Iterable[int]) -> LengthDistribution:
    distribution = LengthDistribution(100)
    for length in lengths:
        distribution.ended(0, int(length))
    return distribution


def policy(distribution: LengthDistribution | None = None, **limits: float) -> Gittins:
    bounds = {"starvation_limit": None, "slowdown_limit": None, **limits}
    return Gittins(cost=COST, lengths=distribution or LengthDistribution(100), num_levels=12, **bounds)  # type: ignore[arg-type]


def skip_join(**limits: float) -> MultiLevelFeedbackQueue:
    bounds = {"starvation_limit": None, "slowdown_limit": None, **limits}
    return MultiLevelFeedbackQueue(quantum=1.0, num_levels=12, skip_join=True, **bounds)  # type: ignore[arg-type]


def trace(seed: int, count: int, rate: float, lengths: Iterable[int], prompt: int = 3) -> list[Job]:
    draw = random.Random(seed)
    arrival, jobs = 0.0, []
    for index, length in zip(range(count), lengths, strict=False):
        arrival += draw.expovariate(rate)
        jobs.append(unit_job(index, arrival, draw.randint(1, prompt), int(length)))
    return jobs


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 4), st.booleans(), st.sampled_from([None, 20.0]))
def test_until_it_has_learned_it_is_skip_join(seed: int, batch: int, lumped: bool, limit: float) -> None:
    lengths = random.Random(seed).choices([1, 2, 5, 17, 60], k=90)
    servers = [
        UnitServer(made, batch, lumped=lumped)
        for made in (policy(starvation_limit=limit), skip_join(starvation_limit=limit))
    ]
    for server in servers:
        server.run(trace(seed, 90, 0.1 * batch, lengths))
    assert servers[0].schedule == servers[1].schedule


@pytest.mark.parametrize("lumped", [False, True])
@pytest.mark.parametrize("rate", [0.03, 0.06, 0.1])
def test_on_constant_lengths_it_is_fcfs(rate: float, lumped: bool) -> None:
    schedules = []
    for made in (policy(learned([60] * 300)), FirstComeFirstServed()):
        server = UnitServer(made, 3, lumped=lumped)
        server.run(trace(7, 120, rate, [60] * 120, prompt=1))
        schedules.append([tuple(sorted(ran)) for ran in server.schedule])
    assert schedules[0] == schedules[1]


def mean_jct(made: object, jobs: list[Job], first: int, batch: int = 4) -> float:
    server = UnitServer(made, batch, lumped=True)  # type: ignore[arg-type]
    server.run(jobs)
    return float(np.mean([server.finish[job.index] - job.arrival for job in jobs[first:]]))


def test_learning_as_it_goes_it_is_near_fcfs_on_constant_lengths_and_beats_skip_join_on_two() -> None:
    constant = [mean_jct(made, trace(1, 500, 0.095, [40] * 500, 1), 250) for made in (
        policy(), FirstComeFirstServed(), skip_join()
    )]  # fmt: skip
    assert constant[0] <= 1.03 * constant[1] < constant[2]
    lengths = random.Random(2).choices([10, 300], weights=[9, 1], k=500)
    two = [mean_jct(made, trace(2, 500, 0.095, lengths, 1), 250) for made in (
        policy(), FirstComeFirstServed(), skip_join()
    )]  # fmt: skip
    assert two[0] < two[2] and two[0] < two[1]


def test_an_overload_of_constant_lengths_is_not_half_done_when_enough_is_learned() -> None:
    lengths = LengthDistribution()
    made = policy(lengths)
    server = UnitServer(made, 16, lumped=True)
    waiting = trace(3, 600, 1.2 * 16 / 40, [40] * 600, 1)[::-1]
    while not lengths.learned:
        while waiting and waiting[-1].arrival <= server.now:
            server.add(waiting.pop())
        server.step()
    assert 64 <= len(server.finish) < 64 + 16
    assert sum(job.served > 0 for job in made._places) < 150  # all the 400 left, after 200 completions


def run_to(made: Gittins, job: Job, tokens: int, now: float = 0.0) -> None:
    """As the scheduler reports it: in one lump, the last token not appended yet."""
    prompt = len(job.prompt)
    seconds = prompt + tokens - 1 - job.served
    job.served, job.output, job.next_seconds = prompt + tokens - 1, [0] * (tokens - 1), 1.0
    job.attained += seconds
    made.on_service(job, float(seconds), now)
    job.output.append(0)


def best(made: Gittins, now: float = 0.0) -> list[int]:
    return [job.index for job in made.iter_best(now)]


def test_a_job_found_to_be_long_makes_way_until_it_is_nearly_done() -> None:
    """Nine in ten end at 32 tokens, the rest at 1024: a new job has 32/0.9 s to go for each that is done."""
    made = policy(learned(random.Random(0).choices([32, 1024], weights=[9, 1], k=2000)))
    long, new = unit_job(0, 0.0, 1, 1024), unit_job(1, 0.0, 1, 32)
    made.add(long, 0.0)
    made.add(new, 0.0)
    assert best(made) == [0, 1]
    for tokens, order in ((5, [0, 1]), (31, [0, 1]), (33, [1, 0]), (500, [1, 0]), (1010, [1, 0])):
        run_to(made, long, tokens)
        assert best(made) == order, tokens
        assert sorted([long, new], key=made.rank) == [(long, new)[index] for index in order]
    made.add(unit_job(2, 0.0, 40, 32), 0.0)  # a longer prefill waits
    assert best(made) == [1, 2, 0]


def test_max_output_and_prefill_count() -> None:
    made = policy(learned([100] * 300))
    for index, (prompt, max_output) in enumerate([(2, 4096), (2, 8), (200, 8), (200, 4096)]):
        made.add(unit_job(index, 0.0, prompt, 4, max_output=max_output), 0.0)
    assert best(made) == [1, 0, 2, 3]


def test_a_prompt_weighs_more_than_its_solo_time_says_in_a_batch() -> None:
    """A decode takes 1 s alone and in a batch of 10 0.1 s of the others' time; a prompt of 64 takes 1.63 s and 0.74.

    One job has 63 decodes left, the other its prompt and then 16 decodes: 6.3 s against 2.24; alone, 63 against 17.64.
    A prompt of 1024 costs 10.34 s + 1.6 s in the batch, and alone 11.23 s + 16 s.
    """
    cost = CostModel(per_iteration=0.99, per_token=0.01)

    def order(batch: int, prompt: int) -> list[int]:
        made = Gittins(cost=cost, lengths=learned([4000] * 300), num_levels=12, batch=batch, starvation_limit=None)
        jobs = [unit_job(0, 0.0, 1, 99, max_output=64), unit_job(1, 0.0, prompt, 99, max_output=16)]
        for job in jobs:
            job.next_seconds = cost.prefill_seconds(0, len(job.prompt))
            made.add(job, 0.0)
        return best(made)

    assert order(1, 64) == order(10, 64) == order(1, 1024) == [1, 0]
    assert order(10, 1024) == [0, 1]


def test_the_horizon_ends_at_the_edge_of_the_bucket() -> None:
    made = policy(learned([100] * 300))
    job = unit_job(0, 0.0, 5, 100)
    made.add(job, 0.0)
    assert best(made) == [0] and made.horizon(job) == pytest.approx(5.0)
    for tokens, left in ((1, 1), (2, 1), (8, 2), (9, 1), (33, 7)):
        run_to(made, job, tokens)
        assert made.horizon(job) == pytest.approx(left), tokens


def test_who_waited_too_long_goes_to_the_front_until_it_is_done() -> None:
    """Charged eight decodes at a time, of 8 s; in an eighth of the time they are paid for 64 s later."""
    made = policy(learned(random.Random(0).choices([32, 1024], weights=[9, 1], k=2000)), starvation_limit=50.0)
    long, new, late = unit_job(0, 0.0, 1, 1024), unit_job(1, 0.0, 1, 32), unit_job(2, 0.0, 5, 1024)
    made.add(long, 0.0)
    best(made)
    long.waiting_since = None
    run_to(made, long, 40)
    long.waiting_since, new.waiting_since, late.waiting_since = 40.0, 80.0, 45.0
    made.add(late, 45.0)
    made.add(new, 80.0)
    assert best(made, 89.0) == [1, 2, 0] and made.deadline(long) == 90.0 == made.next_deadline()
    assert best(made, 90.0) == [0, 1, 2] and made.deadline(long) == math.inf
    assert made.work_ahead(long, 90.0) == 0.0 < made.work_ahead(new, 90.0)
    # The next, due at 95 and 130, are promoted 59 s late.
    assert made.next_deadline() == made.deadline(late) == 90 + 64
    assert made.deadline(new) == 130 + 59
    long.waiting_since = None
    assert made.horizon(long) == pytest.approx(9.0)
    run_to(made, long, 48)
    assert best(made, 98.0) == [0, 1, 2] and made.next_deadline() == 90 + 64
    run_to(made, long, 49)
    assert best(made, 99.0) == [0, 1, 2] and made.next_deadline() == 90 + 2 * 64
    assert made.horizon(long) == pytest.approx(8.0)
    new.waiting_since = None
    assert best(made, 217.9) == [0, 1, 2]
    assert best(made, 218.0) == [0, 2, 1]  # its prompt of 5 s, and eight decodes
    assert made.next_deadline() == 218 + 8 * (5 + 8)
    assert sorted([new, late, long], key=made.rank) == [long, late, new]


def promoted_share(load: float, limit: float | None) -> tuple[float, float]:
    """The share of rows that promoted jobs got while others had waited for more than 60 s, and the mean JCT."""
    draw = random.Random(4)
    lengths = draw.choices([10, 20, 300], weights=[6, 3, 1], k=700)
    known = learned(draw.choices([10, 20, 300], weights=[6, 3, 1], k=2000))
    made = Gittins(cost=CostModel.constant(1.0), batch=4, lengths=known, num_levels=12, starvation_limit=limit)
    server = UnitServer(made, 4, lumped=True)
    jobs = trace(4, 700, load * 4 / 42, lengths, 1)
    waiting, rows, front = jobs[::-1], 0, 0
    while waiting or len(made):
        if not len(made):
            server.now = max(server.now, waiting[-1].arrival)
        while waiting and waiting[-1].arrival <= server.now:
            server.add(waiting.pop())
        overdue = any(job.waiting_since is not None and server.now - job.waiting_since > 60 for job in made._places)
        ran = server.step()
        if overdue:
            rows += 4
            front += sum(job in made._places and made.rank(job)[0] == 0 for job in ran)
    return front / max(1, rows), float(np.mean([server.finish[job.index] - job.arrival for job in jobs]))


def test_in_an_overload_those_that_waited_too_long_get_their_share_and_no_more() -> None:
    share, limited = promoted_share(1.5, 60.0)
    assert PROMOTED_SHARE * 0.9 < share < PROMOTED_SHARE * 1.02
    never, unlimited = promoted_share(1.5, None)
    assert never == 0 and limited < 1.02 * unlimited


@pytest.mark.parametrize("keyed", [False, True])
def test_many_tenants_together_promote_no_more_than_one(keyed: bool) -> None:
    """Eight tenants, an eighth of the device for each, all of which is more than is done: promoted jobs of all of them
    get an eighth of the rows, not eight."""
    draw = random.Random(4)
    lengths = draw.choices([10, 20, 300], weights=[6, 3, 1], k=1200)
    known = learned(draw.choices([10, 20, 300], weights=[6, 3, 1], k=2000))

    def make() -> Gittins:
        cost = CostModel.constant(1.0)
        return Gittins(cost=cost, batch=8, lengths=known, num_levels=12, starvation_limit=60.0)

    made = ByTenant(make, quantum=1 / 8, rows=8.0, weights={}, name=sharer_of)
    server = UnitServer(made, 8, lumped=True)
    waiting, rows, front = trace(4, 1200, 2.0 * 8 / 42, lengths, 1)[::-1], 0, 0
    for job in waiting:
        job.tenant = f"key {job.index % 2}/{job.index % 8}" if keyed else str(job.index % 8)
    while waiting:
        while waiting and waiting[-1].arrival <= server.now:
            server.add(waiting.pop())
        ran = server.step()
        if server.now > 1000:
            rows += len(ran)
            front += sum(not job.finished and policy_of(made, job)._places[job].cohort is None for job in ran)
    assert 0.5 * PROMOTED_SHARE < front / rows < 1.25 * PROMOTED_SHARE


def policy_of(tenants: ByTenant, job: Job) -> Gittins:
    """The one that has the job."""
    policy: Policy = tenants
    while isinstance(policy, ByTenant):
        policy = policy._tenants[policy._name(job.tenant)].policy
    assert isinstance(policy, Gittins)
    return policy


def test_work_ahead_is_what_better_jobs_are_expected_to_need() -> None:
    made = policy(learned([64] * 50_000))
    jobs = [unit_job(index, 0.0, 1, 64) for index in range(4)]
    for job in jobs:
        made.add(job, 0.0)
    best(made)
    run_to(made, jobs[3], 32)
    assert best(made) == [3, 0, 1, 2]
    one = 60.5  # the last bucket is that of 57 … 64
    ahead = [made.work_ahead(jobs[index], 0.0) for index in (3, 0, 1, 2)]
    assert ahead == pytest.approx([0, one - 32, 2 * one - 32, 3 * one - 32], rel=0.1)
    assert made.backlog(0.0) == pytest.approx(4 * one - 32, rel=0.1)


def test_waiting_jobs_share_an_index() -> None:
    made = policy(learned(np.random.default_rng(0).geometric(0.01, 500)))
    for index in range(5000):
        made.add(unit_job(index, 0.0, 1 + index % 300, 10), 0.0)
    assert len(best(made)) == 5000
    assert len(made._order) < 40


def test_after_drift_it_is_skip_join_and_learns_again() -> None:
    made = policy(LengthDistribution(100))
    server = UnitServer(made, 4, lumped=True)
    lengths = [20] * 400 + random.Random(3).choices([4, 5, 150], k=800)
    modes: list[tuple[int, bool]] = []
    jobs = trace(3, 1200, 0.06, lengths, 1)
    waiting = jobs[::-1]
    while waiting or len(made):
        if not len(made):
            server.now = max(server.now, waiting[-1].arrival)
        while waiting and waiting[-1].arrival <= server.now:
            server.add(waiting.pop())
        server.step()
        if not modes or modes[-1][1] != made._lengths.learned:
            modes.append((len(server.finish), made._lengths.learned))
    assert [mode for _, mode in modes] == [False, True, False, True]
    assert 400 < modes[2][0] < 800 and modes[3][0] - modes[2][0] >= 100
    assert len(server.finish) == 1200


def test_a_job_cut_by_max_tokens_is_not_taken_to_have_ended() -> None:
    distribution = LengthDistribution(100)
    server = UnitServer(policy(distribution), 2)
    server.run([unit_job(index, 0.0, 1, 50, max_output=10) for index in range(120)])
    assert distribution.learned
    assert max(distribution.hazard(index) for index in range(bucket(10))) < 0.15  # the prior's


def test_an_aborted_job_was_seen_to_survive() -> None:
    distribution = LengthDistribution(1)
    made = policy(distribution)
    job = unit_job(0, 0.0, 1, 50)
    made.add(job, 0.0)
    run_to(made, job, 11)
    job.finish_reason = FinishReason.ABORT
    made.remove(job)
    assert not distribution.learned
    assert [distribution._slow.counts(index) for index in range(10)] == [(1, 0)] * 9 + [(0.5, 0)]
    assert len(made) == 0 and best(made) == []


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 3), st.booleans(), st.sampled_from([None, 3.0]))
def test_no_job_is_lost_and_the_order_is_that_of_ranks(seed: int, batch: int, lumped: bool, slowdown: float) -> None:
    """Through learning, drift and promotions."""
    made = policy(LengthDistribution(5), slowdown_limit=slowdown)
    server = UnitServer(made, batch, lumped=lumped)
    draw = random.Random(seed)
    jobs = trace(seed, 80, 0.15 * batch, [draw.choice([1, 3, 9, 40] if i < 40 else [20]) for i in range(80)])
    waiting = jobs[::-1]
    while waiting or len(made):
        if not len(made):
            server.now = max(server.now, waiting[-1].arrival)
        while waiting and waiting[-1].arrival <= server.now:
            server.add(waiting.pop())
        if draw.random() < 0.02:
            made._lengths._forget()
        order = list(made.iter_best(server.now))
        assert len(order) == len(set(order)) == len(made) == server._live
        assert order == sorted(order, key=made.rank)
        if made._unlearned is None and draw.random() < 0.2:
            ahead = [made.work_ahead(job, server.now) for job in order]
            assert ahead == sorted(ahead) and ahead[0] == 0 and ahead[-1] <= made.backlog(server.now) + 1e-6
        server.step()
    assert len(server.finish) == 80
    total = sum(len(job.prompt) + len(job.output) - 1 for job in jobs)
    assert sum(map(len, server.schedule)) == total


def test_instances_share_what_is_learned() -> None:
    made = create_policy(SchedulerConfig(policy="gittins"), COST)
    server = UnitServer(made)
    server.run([unit_job(index, 0.0, 1, 3, priority=index % 2) for index in range(250)])
    late = unit_job(1000, 0.0, 1, 3, priority=9)
    server.add(late)
    assert [job.index for job in made.iter_best(0.0)] == [1000]
    assert made.rank(late)[:2] == (9, 1)  # of a cohort, not of a level
