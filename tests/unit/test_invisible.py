"""Preemption is invisible: whatever the arrivals, policy, limits, shortages and aborts, a job's tokens are its own."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import EOS, VOCAB, Toy

from fastserve.config import ADMISSIONS, SWAP_MODES
from fastserve.cost import CostModel
from fastserve.policies import ONLINE_POLICIES
from fastserve.types import OFFLOAD, UPLOAD, FinishReason, Job

Trace = list[tuple[int, dict[str, Any], int | None]]

COSTS = [
    CostModel.constant(1.0),
    CostModel(per_iteration=1.0, per_row=0.05, per_token=0.2, per_read=0.01, per_pair=0.003),
]


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    rows = draw(st.integers(1, 5))
    return {
        "policy": draw(st.sampled_from(sorted(ONLINE_POLICIES))),
        "max_num_seqs": rows,
        "max_num_batched_tokens": rows + draw(st.integers(0, 20)),
        "block_size": draw(st.sampled_from([1, 2, 3, 4, 8])),
        "num_blocks": draw(st.integers(6, 24)),
        "num_host_blocks": draw(st.sampled_from([0, 0, 4, 40])),
        "swap_mode": draw(st.sampled_from(SWAP_MODES)),
        "admission": draw(st.sampled_from(ADMISSIONS)),
        "max_model_len": 40,
        "slowness": draw(st.integers(1, 4)),
        "max_in_flight": draw(st.integers(1, 6)),
        "num_levels": draw(st.integers(1, 5)),
        "starvation_limit": draw(st.sampled_from([None, 0.5, 3.0, 20.0])),
        "cost": draw(st.sampled_from(COSTS)),
    }


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, Any]:
    max_tokens = draw(st.one_of(st.none(), st.integers(1, 16)))
    return {
        "prompt": draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24)),
        "max_tokens": max_tokens,
        "min_tokens": draw(st.integers(0, max_tokens or 5)),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "ignore_eos": draw(st.booleans()),
        "stop_token_ids": draw(st.lists(st.integers(0, VOCAB - 1), max_size=3)),
        "temperature": draw(st.sampled_from([0.0, 0.7])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3])),
        "logit_bias": draw(st.dictionaries(st.integers(0, VOCAB - 1), st.just(0.1), max_size=2)),
        "logprobs": draw(st.sampled_from([None, 0, 2])),
    }


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Jobs with the step at which each arrives, and how many steps later it is aborted, if it is."""
    return draw(
        st.lists(
            st.tuples(st.integers(0, 30), jobs(), st.one_of(st.none(), st.none(), st.integers(0, 12))),
            min_size=1,
            max_size=9,
        )
    )


seen_in_examples = {"preempted": 0, "recomputed": 0, "offloaded": 0, "uploaded": 0}


def test_preemption_is_invisible() -> None:
    tokens_are_those_of_running_alone()
    assert all(seen_in_examples.values()), f"no example did what this is about: {seen_in_examples}"


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(options(), traces())
def tokens_are_those_of_running_alone(options: dict[str, Any], trace: Trace) -> None:
    slowness = options.pop("slowness")
    toy = Toy(**options)
    toy.executor.slowness = slowness
    pool = toy.config.num_blocks * toy.config.block_size
    live: dict[str, Job] = {}
    seen: dict[str, list[int]] = {}
    for step in range(4000):
        for number, (arrival, job, abort) in enumerate(trace):
            name = str(number)
            if arrival == step and len(job["prompt"]) + (job["max_tokens"] or 1) - 1 <= pool:
                live[name], seen[name] = toy.add(name, **job), []
            if abort is not None and arrival + abort == step and name in live:
                was_live = not live[name].finished
                assert toy.engine.abort(name) == was_live
                toy.engine.check_integrity()
        if step > 30 + 12 and not toy.engine.has_work:
            break
        for updated, token in toy.engine.step():
            assert token is not None
            seen[updated.job_id].append(token)
        toy.engine.check_integrity()
    else:
        raise AssertionError("jobs did not finish")
    toy.check_nothing_is_held()
    seen_in_examples["offloaded"] += toy.executor.copied[OFFLOAD] > 0
    seen_in_examples["uploaded"] += toy.executor.copied[UPLOAD] > 0
    for name, job in live.items():
        assert job.output == seen[name]
        expected = toy.expected(job)[: job.max_output]  # with max_tokens None, the pool may be the shorter context
        if job.finish_reason is FinishReason.ABORT:
            assert job.output == expected[: len(job.output)]
            continue
        assert job.output == expected
        stops = {*job.params.stop_token_ids, *(() if job.params.ignore_eos else (EOS,))}
        assert job.finish_reason is (FinishReason.STOP if job.output[-1] in stops else FinishReason.LENGTH)
        if job.params.logprobs is not None:
            assert [(entry.token, entry.logprob) for entry in job.logprobs] == [(t, -float(t)) for t in job.output]
            assert all(len(entry.top) == job.params.logprobs for entry in job.logprobs)
    seen_in_examples["preempted"] += any(job.metrics.preemptions for job in live.values())
    seen_in_examples["recomputed"] += any(job.metrics.recomputed_tokens for job in live.values())
