"""Groups of jobs get tables of lengths of their own where they are unlike the others, and only there."""

from __future__ import annotations

import random

import numpy as np
import pytest
from unit_server import COST, UnitServer, unit_job

from fastserve.policies import groups as groups_module
from fastserve.policies.gittins import Gittins
from fastserve.policies.hazards import bucket
from fastserve.policies.lengths import LengthDistribution
from fastserve.types import Job


def member(index: int, *, tenant: str = "", group: int | None = None, program: str | None = None) -> Job:
    job = unit_job(index, 0.0, 1, 10)
    job.tenant, job.group, job.program = tenant, group, program
    return job


def tell(lengths: LengthDistribution, job: Job, length: int) -> None:
    lengths.ended(0, length, lengths.groups_of(job))


def table(lengths: LengthDistribution, job: Job) -> int:
    return next((group.table for group in lengths.groups_of(job) if group.table), 0)


def survival(lengths: LengthDistribution, of: int, length: int) -> float:
    return float(np.prod([1 - lengths.hazard(index, of) for index in range(bucket(length))]))


SORTS = ({"tenant": "{}"}, {"group": 0}, {"tenant": "a", "program": "{}"})


def of_sort(sort: dict[str, object], number: int) -> Job:
    fields = {key: value.format(number) if isinstance(value, str) else number for key, value in sort.items()}
    return member(0, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("sort", SORTS)
def test_groups_that_differ_get_tables_which_are_theirs(sort: dict[str, object]) -> None:
    lengths, draw = LengthDistribution(), np.random.default_rng(0)
    samples: dict[int, list[int]] = {0: [], 1: []}
    for number, scale in ((n, (8.0, 300.0)[n]) for n in draw.integers(0, 2, 3000).tolist()):
        length = 1 + int(draw.exponential(scale))
        samples[number].append(length)
        tell(lengths, of_sort(sort, number), length)
    for number in (0, 1):
        own = table(lengths, of_sort(sort, number))
        assert own > 0
        for length in (4, 16, 64, 256):
            exact = float(np.mean(np.array(samples[number][-1000:]) > length))
            assert survival(lengths, own, length) == pytest.approx(exact, abs=0.07)
    assert table(lengths, of_sort(sort, 2)) == 0  # nothing is known of it


def test_groups_that_are_alike_share_the_table() -> None:
    lengths, draw = LengthDistribution(), np.random.default_rng(1)
    for _ in range(20_000):
        job = member(0, tenant=str(draw.integers(20)), group=int(draw.integers(20)), program=str(draw.integers(20)))
        tell(lengths, job, 1 + int(draw.lognormal(3, 1)))
    assert lengths.regrouped == 0


def test_few_do_not_tell() -> None:
    lengths = LengthDistribution()
    for number in range(2000):
        tell(lengths, member(0, group=0), 100)
        if number < 20:
            tell(lengths, member(0, group=1), 2)
    assert table(lengths, member(0, group=1)) == 0


def test_a_program_is_compared_with_its_tenant() -> None:
    """All of a tenant's programs are short, and so is each: that is told once."""
    lengths, draw = LengthDistribution(), np.random.default_rng(2)
    for number in range(6000):
        if number % 2:
            tell(lengths, member(0, tenant="short", program=str(number % 5)), 1 + int(draw.exponential(5)))
        else:
            tell(lengths, member(0, tenant="long"), 1 + int(draw.exponential(200)))
    tables = {table(lengths, member(0, tenant="short", program=str(number))) for number in range(5)}
    assert tables == {table(lengths, member(0, tenant="short"))} != {0}


def test_a_group_that_becomes_like_the_others_loses_its_table() -> None:
    lengths, draw = LengthDistribution(), np.random.default_rng(3)
    for turn in range(12_000):
        tell(lengths, member(0, group=0), 1 + int(draw.exponential(50)))
        if turn % 4 == 0:
            tell(lengths, member(0, group=1), 1 + int(draw.exponential(10 if turn < 3000 else 50)))
        if turn == 2999:
            assert table(lengths, member(0, group=1)) > 0
    assert table(lengths, member(0, group=1)) == 0


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "_MOST", 10)
    lengths = LengthDistribution()
    for number in range(6000):
        tell(lengths, member(0, group=number // 60), 2 if number // 60 % 2 else 200)
    groups = lengths._groups
    assert len(groups._prompts._groups) == 10 and len(groups._tables) <= 10
    assert table(lengths, member(0, group=0)) == 0


def test_after_drift_of_all_nothing_is_left_of_groups() -> None:
    lengths, draw = LengthDistribution(), np.random.default_rng(4)
    live = member(0, group=0)
    told = lengths.groups_of(live)
    for number in range(2000):
        tell(lengths, member(0, group=number % 2), 1 + int(draw.exponential((5, 80)[number % 2])))
    assert told[0].table
    number = 0
    while lengths.learned:
        tell(lengths, member(0, group=number % 2), 1000)
        number += 1
    assert not told[0].table and not lengths._groups._tables
    lengths.ended(0, 5, told)  # of a job that came before
    assert table(lengths, live) == 0


def test_when_only_the_mix_drifts_groups_are_as_they_were() -> None:
    lengths, draw = LengthDistribution(), np.random.default_rng(6)
    short, long = member(0, tenant="short"), member(0, tenant="long")
    for number in range(4000):
        tell(lengths, (short, long)[number % 8 == 0], 1 + int(draw.exponential((5, 300)[number % 8 == 0])))
    before = table(lengths, short), table(lengths, long)
    assert all(before)
    while lengths.learned:
        tell(lengths, long, 1 + int(draw.exponential(300)))
    assert (table(lengths, short), table(lengths, long)) == before
    assert survival(lengths, before[1], 256) == pytest.approx(np.exp(-256 / 300), abs=0.07)


def test_a_group_that_drifts_is_learned_anew_and_no_other() -> None:
    lengths, draw = LengthDistribution(), np.random.default_rng(7)
    of = [member(0, group=number) for number in range(3)]
    groups = [lengths.groups_of(job)[0] for job in of]
    scales = [50.0, 10.0, 200.0]
    for number in range(8000):
        which = max(0, number % 10 - 7)
        if number == 4000:
            tables = [group.table for group in groups]
            assert tables[1] and tables[2]
            scales[1] = 400.0
        tell(lengths, of[which], 1 + int(draw.exponential(scales[which])))
        assert lengths.learned or number < 64
    assert survival(lengths, groups[1].table, 64) == pytest.approx(np.exp(-64 / 400), abs=0.12)
    assert groups[2].table == tables[2]


def gittins(lengths: LengthDistribution) -> Gittins:
    return Gittins(cost=COST, lengths=lengths, num_levels=12, starvation_limit=None)


def test_short_groups_go_first_and_those_that_wait_are_told() -> None:
    lengths, draw = LengthDistribution(), np.random.default_rng(5)
    policy = gittins(lengths)
    waiting = [member(1000 + index, group=index % 2) for index in range(600)]
    for number in range(64):
        tell(lengths, member(0, group=number % 2), 1 + int(draw.exponential(50)))
    for job in waiting:
        policy.add(job, 0.0)
    assert [job.index for job in policy.iter_best(0.0)] == [job.index for job in waiting]
    for number in range(3000):
        tell(lengths, member(0, group=number % 2), 1 + int(draw.exponential((100, 10)[number % 2])))
        if not lengths.learned:
            pytest.fail("it is no drift")
    for _ in range(3):  # some in each decision
        order = list(policy.iter_best(0.0))
        assert order == sorted(order, key=policy.rank) and len(order) == 600
    assert [job.group for job in order] == [1] * 300 + [0] * 300


def mean_jct(grouped: bool, alike: bool, seed: int) -> float:
    draw = random.Random(seed)
    server = UnitServer(gittins(LengthDistribution()), 4, lumped=True)
    jobs, arrival = [], 0.0
    for index in range(1500):
        arrival += draw.expovariate(0.92 * 4 / 62)
        kind = draw.randrange(2)
        length = draw.choice([20, 100]) if alike else (20, 100)[kind]
        job = unit_job(index, arrival, draw.randint(1, 3), max(1, round(length * draw.uniform(0.7, 1.3))))
        job.group = kind if grouped else None
        jobs.append(job)
    server.run(jobs)
    return float(np.mean([server.finish[job.index] - job.arrival for job in jobs[300:]]))


def test_groups_help_where_they_differ_and_harm_nobody_where_not() -> None:
    assert mean_jct(True, False, 0) < 0.93 * mean_jct(False, False, 0)
    assert mean_jct(True, True, 0) == mean_jct(False, True, 0)
