"""SRPT against a schedule worked out by brute force: every second, the jobs with the least left."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_server import COST, UnitServer, unit_job

from fastserve.cost import CostModel
from fastserve.policies.srpt import ShortestRemainingTime
from fastserve.types import InvalidRequest


def brute_force(jobs: list[tuple[int, int]], batch: int) -> list[tuple[int, ...]]:
    """Who runs in each second, of jobs (arrival, seconds)."""
    left = {index: seconds for index, (_, seconds) in enumerate(jobs)}
    now, schedule = 0, []
    while left:
        here = sorted((seconds, index) for index, seconds in left.items() if jobs[index][0] <= now)
        if here:
            schedule.append(tuple(sorted(index for _, index in here[:batch])))
        for _, index in here[:batch]:
            left[index] -= 1
            if not left[index]:
                del left[index]
        now += 1
    return schedule


trace = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6), st.integers(1, 12)), min_size=1, max_size=25)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(trace, st.integers(1, 4), st.booleans())
def test_the_schedule_is_that_of_brute_force(trace: list[tuple[int, int, int]], batch: int, lumped: bool) -> None:
    server = UnitServer(ShortestRemainingTime(COST), batch, lumped=lumped)
    trace = sorted(trace)
    server.run([unit_job(i, float(arrival), prompt, output) for i, (arrival, prompt, output) in enumerate(trace)])
    expected = brute_force([(arrival, prompt + output - 1) for arrival, prompt, output in trace], batch)
    assert [tuple(sorted(ran)) for ran in server.schedule] == expected


def test_unknown_lengths_are_refused() -> None:
    policy = ShortestRemainingTime(COST)
    job = unit_job(0, 0.0, 3, 4)
    job.known_output = None
    with pytest.raises(InvalidRequest, match="policy: srpt needs output lengths: simulator and replay only"):
        policy.add(job, 0.0)
    assert len(policy) == 0 and list(policy.iter_best(0.0)) == []


def test_remaining_time_is_the_sum_of_its_iterations() -> None:
    """By a cost linear in the context, whatever is done already; the token under way is not yet in the output."""
    cost = CostModel(per_iteration=0.01, per_token=0.001, per_read=1e-4, per_pair=1e-5)
    policy = ShortestRemainingTime(cost)
    job = unit_job(0, 0.0, 20, 9)
    job.next_seconds = cost.prefill_charge(0, 20)
    policy.add(job, 0.0)

    def decodes(first: int) -> float:
        return sum(cost.decode_seconds(20 + k - 1) for k in range(first, 10))

    assert policy.rank(job)[0] == pytest.approx(cost.prefill_seconds(0, 20) + decodes(2), abs=2e-9)
    job.served, job.next_seconds = 8, cost.prefill_charge(8, 20)
    policy.on_service(job, 1.0, 1.0)
    assert policy.rank(job)[0] == pytest.approx(cost.prefill_charge(8, 20) + decodes(2), abs=2e-9)
    job.served, job.output = 22, [1, 1]  # tokens 1 and 2; 3 is being appended
    policy.on_service(job, 1.0, 2.0)
    assert policy.rank(job)[0] == pytest.approx(decodes(4), abs=2e-9)


def test_work_ahead_is_what_better_jobs_have_left() -> None:
    policy = ShortestRemainingTime(COST)
    jobs = [unit_job(0, 0.0, 64, 1), unit_job(1, 0.0, 1, 2), unit_job(2, 0.0, 10, 1), unit_job(3, 0.0, 64, 1)]
    for job in jobs:
        policy.add(job, 0.0)
    assert policy.work_ahead(jobs[1], 0.0) == 0.0
    assert policy.work_ahead(jobs[2], 0.0) == 2.0
    assert policy.work_ahead(jobs[0], 0.0) == 12.0 + 64 / 2  # of its like, half are taken to go before it
    assert policy.backlog(0.0) == 140.0
    for job in jobs:
        policy.remove(job)
    assert policy.backlog(0.0) == 0.0 and len(policy) == 0
