"""Prefills that are cut so that they do not hold up those who decode beside them."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import toy_llm
from hypothesis import example, given
from hypothesis import strategies as st
from toy_llm import ToyWorld

from fastserve.chunking import Chunks
from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel
from fastserve.engine import IterationRecord
from fastserve.simulator import simulate
from fastserve.types import InvalidRequest, Job
from fastserve.workloads.job import SimJob

COST = CostModel(per_iteration=1.0, per_row=0.125, per_token=0.25, per_read=0.0001, per_pair=0.0002)
LIMITS: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 512, "num_blocks": 4096, "max_model_len": 4096}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    return toy_llm.enter(monkeypatch)


# A prefill of n tokens takes 10 ms + 0.1 ms for each, and so do decodes: 500 tokens 60 ms.
QUICK = CostModel(per_iteration=0.01, per_row=0.0, per_token=0.0001, per_read=0.0, per_pair=0.0)


def decodes(*positions: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array([[slot, position, 1, 1] for slot, position in enumerate(positions)], np.int32).reshape(-1, 4)


def allowed(limit: float, rows: list[tuple[int, int]]) -> float:
    """Seconds of an iteration of these decodes and a prefill: as many more as the limit says or, of a batch of 4 that
    is not full, 1.9 times what they take alone, but no more than 4 of them."""
    alone, four = COST.iteration_seconds(rows), COST.iteration_seconds((rows * 4)[:4])
    return max(limit * alone, min(1.9 * alone, four))


def run(jobs: list[SimJob], policy: str, stall_limit: float | None) -> tuple[list[Job], list[IterationRecord]]:
    done: list[Job] = []
    records: list[IterationRecord] = []
    config = SchedulerConfig(policy=policy, stall_limit=stall_limit, **LIMITS)
    simulate(jobs, config, COST, on_finish=done.append, on_iteration=records.append)
    return done, records


def test_worked_example() -> None:
    """One decode at position 0 takes 1.3753 s, so that as much is left: 1.2503 beside the row. From position 0 on, n
    tokens take 0.2501 n + 0.0001 n (n + 1): 1.0024 for 4 and 1.2535 for 5."""
    chunks = Chunks(COST, 2.0, decodes(0), 1)
    assert chunks.cut(0, 100, 100) == 4
    assert chunks.cut(0, 100, 100) == 0  # no time is left


def test_a_batch_that_is_not_full_leaves_more_time() -> None:
    """A decode takes 1.3753 s, two 1.7506 s and eight 4.0024 s. With a limit of 1.1 that leaves, beside the row, 0.0125
    s (one token, as always), 0.2503 s in a batch of two (a token is 0.2503 s) and in a batch of eight 1.9 times the
    1.3753 s: 1.2378 s (4 tokens are 1.0024 s, 5 would be 1.2535 s)."""
    for rows, tokens in ((1, 1), (2, 1), (8, 4)):
        assert Chunks(COST, 1.1, decodes(0), rows).cut(0, 100, 100) == tokens
    assert Chunks(COST, 1.1, decodes(*[0] * 8), 8).cut(0, 100, 100) == 1  # 10 % of 4.0024 s
    assert Chunks(COST, 3.0, decodes(0), 8).cut(0, 100, 100) == 10  # three times is what was asked for: 2.6256 s


def test_short_prompts_are_computed_at_once_while_nobody_waits_for_a_row() -> None:
    """Alone, 500 tokens take 60 ms, 1,000 110 ms and 2,048 215 ms. Beside a decode, with a limit of 1.5 and 10.1 ms
    alone, there is time for 50 tokens; of a batch of four, 10.4 ms, as well."""
    chunks = Chunks(QUICK, 1.5, decodes(7), 4)
    assert chunks.cut(0, 500, 500, at_once=True) == 500
    assert chunks.cut(0, 1000, 1000, at_once=True) == 1000  # 170 ms in all
    assert chunks.cut(0, 500, 500, at_once=True) == 0  # 230 ms would be too long a gap
    for known, start, tokens, at_once, taken in (
        (500, 0, 500, False, 50),  # somebody waits for a row
        (2048, 0, 2048, True, 50),
        (2048, 2000, 48, True, 48),  # as cut: there is time for 50
        (2048, 1900, 148, True, 50),  # the rest of a long prompt is no short one
        (600, 0, 512, True, 512),  # what the token budget leaves of a short one
    ):
        assert Chunks(QUICK, 1.5, decodes(7), 4).cut(start, tokens, known, at_once=at_once) == taken


@pytest.mark.parametrize("limit", [None, 1.5])
def test_prompts_beyond_their_tenants_shares_have_what_is_spare(limit: float | None) -> None:
    """QUICK takes 0.1 ms a token: 2.05 ms are 20 of them, whatever else is cut, and together."""
    chunks = Chunks(QUICK, limit, decodes(7), 4, 0.00205)
    whole = chunks.cut(0, 30, 30)
    assert whole == 30
    assert chunks.cut(0, 12, 100, at_once=True, beyond=True) == 12
    assert chunks.cut(0, 100, 100, at_once=True, beyond=True) == 8
    assert chunks.cut(0, 100, 100, beyond=True) == 0


def test_a_short_prompt_is_one_iteration_of_a_batch_that_has_a_row_for_it() -> None:
    jobs = [SimJob(0.0, 8, 40)] * 3 + [SimJob(0.1, 300, 4)]
    records: list[IterationRecord] = []
    config = SchedulerConfig(policy="fcfs", stall_limit=1.5, **LIMITS)
    simulate(jobs, config, QUICK, on_finish=lambda job: None, on_iteration=records.append)
    assert [record.prefill_tokens for record in records if record.prefill_tokens and record.submitted > 0.1] == [300]


@example(positions=[400], wants=[(0, 7), (2000, 512), (0, 512)], limit=2.0)  # no time for the second
@given(
    positions=st.lists(st.integers(0, 3000), max_size=4),
    wants=st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 512)), min_size=1, max_size=5),
    limit=st.one_of(st.none(), st.floats(1.01, 10)),
)
def test_as_much_as_there_is_time_for(positions: list[int], wants: list[tuple[int, int]], limit: float | None) -> None:
    rows = [(position, 1) for position in positions]
    chunks = Chunks(COST, limit, decodes(*positions), 4)
    longest = float("inf") if limit is None or not rows else allowed(limit, rows)
    for number, (start, tokens) in enumerate(wants):
        taken = chunks.cut(start, tokens, start + tokens)  # more than 0.2 s: no prompt is short by COST
        assert 0 <= taken <= tokens
        assert taken > 0 or number > 0, "a prefill that is first always moves on"
        if taken > (number == 0):
            assert COST.iteration_seconds([*rows, (start, taken)]) <= longest * (1 + 1e-9)
        if taken < tokens:
            assert COST.iteration_seconds([*rows, (start, taken + 1)]) > longest * (1 - 1e-9)
        if taken:
            rows.append((start, taken))


@pytest.mark.parametrize("policy", ["fcfs", "skip-join-mlfq", "gittins", "srpt"])
def test_a_long_prompt_does_not_hold_up_those_who_decode(policy: str) -> None:
    """Without a limit the others wait for minutes between two tokens, since 512 tokens of it are an iteration."""
    jobs = [SimJob(0.0, 8, 60)] * 3 + [SimJob(20.0, 2048, 4)]
    longest = {}
    for limit in (None, 1.5):
        done, records = run(jobs, policy, limit)
        assert sorted(len(job.output) for job in done) == [4, 60, 60, 60]
        assert sum(record.prefill_tokens for record in records) == 3 * 8 + 2048
        longest[limit] = max(record.seconds for record in records if record.decode_tokens and record.submitted > 20)
    assert longest[None] > 100
    assert longest[1.5] <= allowed(1.5, [(68, 1)] * 3)


@given(
    jobs=st.lists(st.tuples(st.floats(0, 60), st.integers(1, 700), st.integers(1, 20)), min_size=1, max_size=12).map(
        sorted
    ),
    policy=st.sampled_from(["fcfs", "mlfq", "skip-join-mlfq", "gittins", "srpt"]),
    limit=st.floats(1.05, 4),
)
def test_no_iteration_is_longer_than_its_decodes_allow(
    jobs: list[tuple[float, int, int]], policy: str, limit: float
) -> None:
    done, records = run([SimJob(*job) for job in jobs], policy, limit)
    assert sorted(len(job.output) for job in done) == sorted(output for _, _, output in jobs)
    for record in records:
        if record.decode_tokens and record.prefill_tokens > 1:
            # Contexts are not in the record: the longest there are bound the time of the decodes from above.
            assert record.seconds <= allowed(limit, [(720, 1)] * record.decode_tokens) + 1e-9
    for job in done:  # bounds on waiting hold for those, too, who had no time in an iteration
        first, finish = job.metrics.first_scheduled, job.metrics.finish
        assert first is not None and finish is not None
        left_out = (r for r in records if first <= r.submitted < finish and job.job_id not in r.job_ids)
        passed = sum(record.completed - record.submitted for record in left_out)
        assert job.waited == pytest.approx(first - job.metrics.arrival + passed)


def test_readers_of_a_stream_are_not_held_up_unless_told(world: ToyWorld) -> None:
    async def told(**options: object) -> object:
        async with world.async_llm(**options) as llm:
            return llm.info["stall_limit"]

    assert asyncio.run(told()) == 1.5
    assert asyncio.run(told(stall_limit=None)) is None
    with world.llm() as llm, world.llm(stall_limit=3) as limited:
        assert (llm.info["stall_limit"], limited.info["stall_limit"]) == (None, 3.0)


@pytest.mark.parametrize("value", [1, 0.5, -1, float("nan"), "twice", True])
def test_a_limit_that_is_none(value: object) -> None:
    with pytest.raises(InvalidRequest, match="stall_limit: must be above 1, or none"):
        SchedulerConfig(stall_limit=value)  # type: ignore[arg-type]
