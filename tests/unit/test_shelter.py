"""Which rows beyond their tenants' shares one iteration has time for, beside those of who asks for little."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from toy import bare_job

from fastserve.cost import CostModel
from fastserve.decode_rows import DecodeRows
from fastserve.policies.fcfs import FirstComeFirstServed
from fastserve.shelter import Shelter
from fastserve.types import Job

ROWS = CostModel(per_iteration=7.0, per_row=1.0)  # 8 s alone: one more row is an eighth
FREE = CostModel.constant(1.0)


class Fixed(FirstComeFirstServed):
    """An order in which jobs named so are beyond their tenants' shares, and nobody else's tenant asks for much."""

    def __init__(self) -> None:
        super().__init__()
        self._given: Job | None = None

    def order(self, jobs: list[Job]):  # type: ignore[no-untyped-def]
        for self._given in jobs:
            yield self._given

    @property
    def beyond(self) -> bool:
        return self._given is not None and self._given.tenant == "flood"

    def is_small(self, job: Job) -> bool:
        return job.tenant != "flood"

    is_sheltered = is_small


def jobs_of(*tenants: str, tokens: int = 1) -> list[Job]:
    jobs = [bare_job(number, 1.0) for number in range(len(tenants))]
    for job, tenant in zip(jobs, tenants, strict=True):
        job.tenant, job.primed, job.prompt = tenant, tokens == 1, [0] * tokens
    return jobs


def chosen(cost: CostModel, jobs: list[Job], limit: int = 100, away: Collection[Job] = ()) -> tuple[Shelter, list[Job]]:
    """All that have time get rows, but those whose KV is `away`."""
    policy, taken = Fixed(), list[Job]()
    made = Shelter(cost, policy, DecodeRows(100, cost))
    for job in made.best(policy.order(jobs), lambda: taken, limit):
        if job not in away:
            taken.append(job)
        if len(taken) == limit:
            break
    return made, taken


def test_rows_beyond_make_an_iteration_an_eighth_longer_at_most() -> None:
    """7 s and one a row: 9 s with two, so that a third has time (10 s is less than 10.125 s) and a fourth has not."""
    jobs = jobs_of("a", "b", *["flood"] * 5)
    made, taken = chosen(ROWS, jobs)
    assert taken == jobs[:3] and made.full


def test_the_time_of_those_whose_kv_is_away_is_others() -> None:
    """Else rows would stay empty that others beyond their shares have time for."""
    jobs = jobs_of("a", *["flood"] * 9)
    made, taken = chosen(ROWS, jobs, away=jobs[1:4])
    assert taken == [jobs[0], jobs[4]] and made.full
    made, taken = chosen(ROWS, jobs, away=jobs[1:9])
    assert taken == [jobs[0], jobs[9]] and not made.full
    made, taken = chosen(FREE, jobs, 3, away=jobs[2:5])
    assert taken == [*jobs[:2], jobs[5]]


def test_those_whose_kv_is_there_have_the_time_of_those_that_find_no_room() -> None:
    """The first of those beyond finds none, so nobody else may start, and the order is given up."""
    jobs, policy = jobs_of("a", *["flood"] * 9), Fixed()
    taken = jobs[:1]
    made = Shelter(ROWS, policy, DecodeRows(100, ROWS))
    order = made.best(policy.order(jobs), lambda: taken, 100)
    assert [next(order), next(order)] == jobs[:2]
    for job in made.here(jobs[3:], lambda: taken, 100):
        taken.append(job)
    assert taken == [jobs[0], jobs[3]] and made.full


def test_where_rows_are_free_all_have_time_up_to_the_limit() -> None:
    jobs = jobs_of("a", *["flood"] * 50)
    made, taken = chosen(FREE, jobs, 20)
    assert taken == jobs[:20] and not made.full


def test_without_others_nothing_is_left_out() -> None:
    jobs = jobs_of(*["flood"] * 9)
    made, taken = chosen(ROWS, jobs)
    assert taken == jobs and not made.full


def test_a_prefill_beyond_has_the_time_that_is_left() -> None:
    """Alone 16 s (15 and a row): 2 s more, which is 8 tokens of 0.25 s; a decode of the flood's before it takes a half.

    Without a decode of others, their prefill counts: 15 s and 12 tokens leave 2.25 s.
    """
    cost = CostModel(per_iteration=15.75, per_token=0.25)
    (own,), (decode,) = jobs_of("a"), jobs_of("flood")
    prompt = jobs_of("flood", tokens=40)[0]
    made, taken = chosen(cost, [own, prompt])
    assert taken == [own, prompt] and made.prefills == {prompt} and made.spare == pytest.approx(2.0)
    made, taken = chosen(cost, [own, decode, prompt, *jobs_of("flood")])
    assert taken == [own, decode, prompt] and made.spare == pytest.approx(1.75)
    made, taken = chosen(cost, [jobs_of("a", tokens=9)[0], prompt])
    assert made.prefills == {prompt} and made.spare == pytest.approx(18.0 / 8)
