"""Nobody waits longer than the limit and what it takes to serve those promoted before.

The bound, for iterations that all take c seconds, B rows, k plans in flight, n jobs, and memory and tokens for all:

    waiting ≤ limit + c · (k + ⌊(n − 1) · r / B⌋)

- `limit`: a job left out of a batch since `w` is overdue at w + min(α, s · (its own service and its next iteration)),
  α the starvation_limit and s the slowdown_limit.
- The next decision is made when the next plan returns, at most c later, and puts the job at the tail of the first
  queue. The plan then made starts when those in flight have ended, of which there are k − 1. Together: c · k.
- Who comes later, or is demoted, is behind it. Each of the n − 1 others has at most one quantum there before it is
  demoted, or done, which is r rows: one in level 0 of an MLFQ, where one decode is a quantum; PROMOTED_QUANTA of them
  with a slowdown_limit. An iteration without the job has B rows of theirs.

Under gittins, once it has learned, promoted jobs run to completion, one after the other, in a share σ of the time:

    waiting ≤ limit + c · (k + Σ (p + r / (B · σ) + r / B))    over the others that were overdue, too

- Who is overdue later is promoted later. Each of the others is charged in p parts: for its prompt and PROMOTED_QUANTA
  decodes, and again for as many decodes, until it is done: in all for r rows, of c / B seconds of the device's time.
  That is paid for after r · c / (B · σ), and for each part the next decision may be c later.
- At the front, the job is behind those that are there: r rows, B an iteration.

fcfs and srpt promote nobody: a job waits while B rows are taken by jobs before it, so at most for all of their rows.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
from audited import Audited, Given
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastserve import policies
from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel, Link
from fastserve.policies.gittins import PROMOTED_SHARE
from fastserve.policies.lengths import LengthDistribution
from fastserve.policies.mlfq import PROMOTED_QUANTA


def long_tailed() -> LengthDistribution:
    """What is known after a thousand jobs, of which most are short; it makes gittins leave long ones behind."""
    lengths = LengthDistribution()
    for length in random.Random(0).choices([2, 5, 40], weights=[10, 5, 1], k=1000):
        lengths.saw_prompt(4)
        lengths.ended(0, length)
    assert lengths.learned
    return lengths


def start(policy: str, rows: int, in_flight: int, **limits: float | None) -> Audited:
    config = SchedulerConfig(
        policy=policy,
        max_num_seqs=rows,
        max_num_batched_tokens=4096,
        num_blocks=4096,
        max_model_len=128,
        max_in_flight=in_flight,
        num_levels=8,
        **{"starvation_limit": None, **limits},  # type: ignore[arg-type]
    )
    return Audited(config, CostModel.constant(1.0), Link(offload_block=0.0, upload_block=0.0))


def waits(run: Audited) -> list[list[float]]:
    """Of each job: the seconds without service before each of its rows."""
    since = [job.arrival for job in run.jobs]
    result: list[list[float]] = [[] for _ in run.jobs]
    for record in run.records:
        for name in record.job_ids:
            number = int(name)
            result[number].append(record.completed - record.seconds - since[number])
            since[number] = record.completed
    return result


@st.composite
def traces(draw: st.DrawFn) -> list[Given]:
    """Jobs of which the queue is never short for a while: a burst, or one job an iteration."""
    number = draw(st.integers(2, 24))
    between = draw(st.sampled_from([0.0, 0.25, 1.0, 2.0]))
    outputs = draw(st.lists(st.sampled_from([1, 2, 3, 7, 30]), min_size=number, max_size=number))
    prompts = draw(st.lists(st.sampled_from([1, 3, 40]), min_size=number, max_size=number))
    return [Given(i * between, prompt, output) for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))]


@st.composite
def streams(draw: st.DrawFn, rows: int) -> list[Given]:
    """A few long jobs, and short ones that come as fast as they can be served; learned of, they are always better."""
    long = [Given(0.0, 1, output) for output in draw(st.lists(st.sampled_from([14, 25, 38]), min_size=2, max_size=3))]
    between = 3 / rows * draw(st.sampled_from([0.9, 1.0]))  # two of three take 2 rows, the others 5
    return [*long, *(Given(i * between, 1, 5 if i % 3 == 0 else 2) for i in range(80 * rows))]


most = {"of the bound": 0.0}  # the longest wait seen where one had to be promoted


@pytest.mark.parametrize("policy", ["mlfq", "skip-join-mlfq", "gittins"])
def test_nobody_waits_beyond_the_bound(policy: str) -> None:
    most["of the bound"] = 0.0

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(
        traces(),
        st.integers(1, 4),
        st.integers(1, 3),
        st.sampled_from([(0.5, None), (6.0, None), (25.0, None), (None, 0.5), (None, 4.0), (10.0, 1.5)]),
    )
    def check(trace: list[Given], rows: int, in_flight: int, limits: tuple[float | None, float | None]) -> None:
        starvation, slowdown = limits
        run = start(policy, rows, in_flight, starvation_limit=starvation, slowdown_limit=slowdown)
        run.run(trace)
        rows_each = 1 if slowdown is None else PROMOTED_QUANTA
        ahead = in_flight + (len(trace) - 1) * rows_each // rows
        for gaps in waits(run):
            for served, gap in enumerate(gaps):
                of_own_service = None if slowdown is None else slowdown * (served + 1)
                limit = min(value for value in (starvation, of_own_service) if value is not None)
                assert gap <= limit + ahead + 1e-9
                if gap > limit:
                    most["of the bound"] = max(most["of the bound"], gap / (limit + ahead))

    check()
    assert most["of the bound"] > 0.6, "the bound is so wide that it says nothing"


def charged(job: Given) -> tuple[int, int]:
    """In how many parts, and for how many rows, a promoted job is charged at most."""
    parts = max(1, math.ceil((job.output - 1) / PROMOTED_QUANTA))
    return parts, 1 + PROMOTED_QUANTA * parts


def test_nobody_waits_beyond_the_bound_of_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    known = long_tailed()
    monkeypatch.setattr(policies, "LengthDistribution", lambda: copy.deepcopy(known))
    most["of the bound"] = 0.0

    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data(), st.integers(1, 3), st.integers(1, 3), st.booleans())
    def check(data: st.DataObject, rows: int, in_flight: int, stream: bool) -> None:
        trace = data.draw(streams(rows) if stream else traces())
        limits = [(25.0, None), (40.0, None)] if stream else [(0.5, None), (6.0, None), (None, 0.5), (10.0, 1.5)]
        starvation, slowdown = data.draw(st.sampled_from(limits))
        run = start("gittins", rows, in_flight, starvation_limit=starvation, slowdown_limit=slowdown)
        run.run(trace)

        def overdue(number: int) -> Iterator[tuple[float, float, float]]:
            """Of each of a job's waits that took too long: when it did, the limit, and how long it was."""
            since, waited = trace[number].arrival, 0.0
            for served, gap in enumerate(gaps[number]):
                own = math.inf if slowdown is None else max(0.0, slowdown * (served + 1) - waited)
                limit = min(own, math.inf if starvation is None else starvation)
                if gap >= limit:
                    yield since + limit, limit, gap
                since, waited = since + gap + 1, waited + gap

        gaps = waits(run)
        found = [list(overdue(number)) for number in range(len(trace))]
        for number, each in enumerate(found):
            for when, limit, gap in each:
                # A wait begins with the decision to leave a job out, up to k iterations before its last one ends.
                before = [i for i, one in enumerate(found) if i != number and one and one[0][0] <= when + in_flight]
                parts = [charged(trace[i]) for i in before]
                late = in_flight + sum(part + row / rows * (1 / PROMOTED_SHARE + 1) for part, row in parts)
                assert gap <= limit + late + 1e-9
                if gap > limit + in_flight:
                    most["of the bound"] = max(most["of the bound"], gap / (limit + late))

    check()
    assert most["of the bound"] > 0.6, "the bound is so wide that it says nothing"


@pytest.mark.parametrize("policy", ["fcfs", "srpt"])
def test_without_promotion_a_job_waits_for_those_before_it(policy: str) -> None:
    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(traces(), st.integers(1, 4), st.integers(1, 3))
    def check(trace: list[Given], rows: int, in_flight: int) -> None:
        run = start(policy, rows, in_flight)
        run.run(trace)
        for number, gaps in enumerate(waits(run)):
            others = trace[:number] if policy == "fcfs" else trace[:number] + trace[number + 1 :]
            assert sum(gaps) <= in_flight + sum(job.output for job in others) / rows
            assert policy != "fcfs" or not any(gaps[1:])  # to completion

    check()


@pytest.mark.parametrize("policy", sorted(policies.POLICIES))
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(trace=traces(), rows=st.integers(1, 4))
def test_no_row_is_empty_while_somebody_could_have_it(policy: str, trace: list[Given], rows: int) -> None:
    run = start(policy, rows, 1, starvation_limit=5.0)
    run.run(trace)
    for record in run.records:
        assert len(record.job_ids) == min(rows, len(record.job_ids) + record.waiting)


def waits_of_a_long_job(**limits: Any) -> list[float]:
    """Of a job of 30 tokens among jobs of 2, of which one comes every two seconds: all the rows there are."""
    run = start("mlfq", 1, 1, **limits)
    run.run([Given(0.0, 1, 30), *(Given(1.0 + 2 * i, 1, 2) for i in range(60))])
    return waits(run)[0]


def test_a_long_job_starves_without_a_limit() -> None:
    """Worked by hand: it gets a token of level 0 and, ahead of the first two newcomers, the two of level 1, until 5.

    Then it is in level 2, and one newcomer after the other has its two tokens above: 120 in all, until 123.
    """
    assert waits_of_a_long_job()[:5] == [0, 1, 1, 118, 0]
    # Promoted at 5 + 10, behind the newcomer of that second.
    assert waits_of_a_long_job(starvation_limit=10.0)[:4] == [0, 1, 1, 11]
