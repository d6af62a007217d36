"""A job goes on in another engine where a lost one left it, and nobody can tell by its tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_invisible import Trace, options, traces
from toy import EOS, VOCAB, Toy

from fastserve.cost import CostModel
from fastserve.types import OFFLOAD, FinishReason, InvalidRequest, Job, SamplingParams

COST = CostModel(per_iteration=1.0, per_token=0.05)


def resume(
    toy: Toy,
    job: Job,
    output: list[int] | None = None,
    arrival: float | None = None,
    waiting_since: float | None = None,
) -> Job:
    """The same job, with what it had put out, in another engine."""
    return toy.engine.add_job(
        job.job_id,
        job.prompt,
        job.params,
        seed=job.seed,
        vocab_size=VOCAB,
        eos_token_ids=(EOS,),
        priority=job.priority,
        arrival=arrival,
        output=job.output if output is None else output,
        waiting_since=waiting_since,
    )


# --- tokens -----------------------------------------------------------------------------------------------------------


@st.composite
def engines(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Options of several engines, each of which is lost. They hold equally much, which decides where jobs end."""
    first, *others = draw(st.lists(options(), min_size=2, max_size=4))
    same = {name: first[name] for name in ("block_size", "num_blocks", "max_model_len")}
    return [first, *({**other, **same} for other in others)]


seen_in_examples = {"resumed": 0, "resumed twice": 0, "preempted": 0, "computed again twice": 0, "offloaded": 0}


def test_tokens_go_on_as_if_no_engine_had_been_lost() -> None:
    tokens_go_on()
    assert all(seen_in_examples.values()), f"no example did what this is about: {seen_in_examples}"


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(engines(), traces(), st.lists(st.integers(0, 25), min_size=3, max_size=3))
def tokens_go_on(engines: list[dict[str, Any]], trace: Trace, cuts: list[int]) -> None:
    pool = engines[0]["num_blocks"] * engines[0]["block_size"]
    wanted = [job for _, job, _ in trace if len(job["prompt"]) + (job["max_tokens"] or 1) - 1 <= pool]
    output: dict[str, list[int]] = {}
    times: dict[str, int] = {}
    ended: dict[str, Job] = {}
    jobs: dict[str, Job] = {}
    for life, given_options in enumerate(engines):
        given_options = dict(given_options)
        slowness = given_options.pop("slowness")
        toy = Toy(**given_options)
        toy.executor.slowness = slowness
        if life == 0:
            jobs = {str(number): toy.add(str(number), **job) for number, job in enumerate(wanted)}
            output = {name: [] for name in jobs}
        else:
            jobs = {name: resume(toy, job, output[name]) for name, job in jobs.items() if name not in ended}
        times = {name: times.get(name, 0) + bool(output[name]) for name in jobs}
        before = {name: len(output[name]) for name in jobs}
        for _ in range(cuts[life] if life + 1 < len(engines) else 4000):
            if not toy.engine.has_work:
                break
            for job, token in toy.engine.step():
                assert token is not None
                output[job.job_id].append(token)
                if job.finished:
                    ended[job.job_id] = job
            toy.engine.check_integrity()
        for name, job in jobs.items():
            assert job.output == output[name]
            if job.params.logprobs is not None:
                assert [entry.token for entry in job.logprobs] == job.output[before[name] :]
        seen_in_examples["preempted"] += any(job.metrics.preemptions and before[name] for name, job in jobs.items())
        seen_in_examples["computed again twice"] += any(
            job.metrics.recomputed_tokens > len(job.prompt) + before[name] for name, job in jobs.items() if before[name]
        )
        seen_in_examples["offloaded"] += toy.executor.copied[OFFLOAD] > 0
    assert ended.keys() == output.keys() and not toy.engine.has_work
    toy.check_nothing_is_held()
    for name, job in ended.items():
        assert output[name] == toy.expected(job)[: job.max_output]
        stops = {*job.params.stop_token_ids, *(() if job.params.ignore_eos else (EOS,))}
        assert job.finish_reason is (FinishReason.STOP if output[name][-1] in stops else FinishReason.LENGTH)
    seen_in_examples["resumed"] += any(times.values())
    seen_in_examples["resumed twice"] += any(count > 1 for count in times.values())


def test_only_new_tokens_are_reported() -> None:
    lost, toy = Toy(), Toy()
    job = lost.add("a", 5, 6, logprobs=1)
    for _ in range(4):
        lost.engine.step()
    given = list(job.output)
    assert len(given) == 4
    again = resume(toy, job, given)
    assert toy.engine.step() == [(again, again.output[4])]
    toy.run()
    assert again.output == toy.expected(job) and given == again.output[:4], "what was given is not written to"
    assert [entry.token for entry in again.logprobs] == again.output[4:]
    assert again.finish_reason is FinishReason.LENGTH and again.metrics.recomputed_tokens == 8
    assert again.metrics.first_token is None, "another engine put it out"


# --- what cannot be resumed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "params", "message"),
    [
        ([1] * 6, {}, "output: is complete: it has 6 tokens, and the job ends at 6"),
        ([1] * 7, {}, "output: is complete: it has 7 tokens, and the job ends at 6"),
        ([1] * 38, {"max_tokens": None}, "output: is complete: it has 38 tokens, and the job ends at 38"),
        ([1, VOCAB], {}, f"output: holds the token id {VOCAB}, and the vocabulary ends at {VOCAB - 1}"),
        ([-1], {}, "output: holds the token id -1"),
        (["1"], {}, "output: must hold token ids, which are integers"),
        ([1, EOS], {"ignore_eos": False}, f"output: is complete: it holds {EOS}, which ends it"),
        ([9, 1], {"stop_token_ids": [9]}, "output: is complete: it holds 9, which ends it"),
    ],
)
def test_an_output_that_cannot_go_on_is_refused(output: list[Any], params: dict[str, Any], message: str) -> None:
    toy = Toy(max_model_len=40)
    sampling = SamplingParams(**{"max_tokens": 6, "ignore_eos": True, **params})
    with pytest.raises(InvalidRequest, match=message):
        toy.engine.add_job("a", [1, 2], sampling, seed=0, vocab_size=VOCAB, eos_token_ids=(EOS,), output=output)
    assert not toy.engine.has_work and not len(toy.engine.scheduler.policy)


def test_what_would_end_it_does_not_before_min_tokens() -> None:
    toy = Toy()
    params = SamplingParams(max_tokens=9, min_tokens=3, stop_token_ids=[9])
    job = toy.engine.add_job("a", [1, 2], params, seed=0, vocab_size=VOCAB, output=[9, 9])
    toy.engine.step()
    assert len(job.output) == 3 and job.output[-1] != 9, "masked: the third of at least three"
    with pytest.raises(InvalidRequest, match="it holds 9"):
        toy.engine.add_job("b", [1, 2], params, seed=0, vocab_size=VOCAB, output=[9, 9, 9, 9])


# --- accounts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fcfs", "mlfq", "skip-join-mlfq", "gittins"])
@pytest.mark.parametrize("cut", [1, 2, 7, 30, 61])
def test_service_is_what_it_is_undisturbed(policy: str, cut: int) -> None:
    """What is computed again is charged to nobody, and what was served before is not forgotten."""
    undisturbed, lost, toy = (Toy(COST, policy=policy, max_num_batched_tokens=16, max_num_seqs=2) for _ in range(3))
    done = undisturbed.add("a", 40, 64)
    undisturbed.run()
    job = lost.add("a", 40, 64)
    while len(job.output) < cut:
        lost.engine.step()
    again = resume(toy, job)
    toy.run()
    assert again.attained == pytest.approx(done.attained)
    assert again.served == done.served == 40 + 63
    assert again.metrics.recomputed_tokens == 40 + cut - 1


def test_it_joins_about_where_it_was() -> None:
    lost = Toy(COST, num_levels=12)
    job = lost.add("a", 20, 200)
    for _ in range(200):
        level = lost.engine.scheduler.policy.level(job) if not job.finished else 0
        if job.output and not job.finished:
            toy = Toy(COST, num_levels=12)
            again = resume(toy, job)
            assert level <= toy.engine.scheduler.policy.level(again) <= level + 1
        lost.engine.step()
    assert level >= 6, "it sank"


def test_it_joins_by_all_that_has_to_be_computed() -> None:
    """However little service the tokens took that it had put out: computing them again keeps others waiting."""
    toy = Toy(CostModel(per_iteration=0.001, per_token=1.0), max_num_batched_tokens=64)
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    few = toy.engine.add_job("few", [1], params, seed=0, vocab_size=VOCAB, output=[2])
    many = toy.engine.add_job("many", [1], params, seed=0, vocab_size=VOCAB, output=[2] * 40)
    level = toy.engine.scheduler.policy.level
    assert few.next_seconds == pytest.approx(2.001) and level(few) == 1
    assert many.next_seconds == pytest.approx(41.001) and level(many) >= 6


def test_it_has_not_been_starving() -> None:
    """It ran until its engine was lost, so it is not overdue the moment it is back, however old it is."""
    lost, toy = (Toy(COST, max_num_seqs=1, starvation_limit=50.0) for _ in range(2))
    old = lost.add("old", 4, 100)
    for _ in range(40):
        lost.engine.step()
    toy.clock.now = 1000.0
    again = resume(toy, old, arrival=0.0)
    new = toy.add("new", 2, 2)
    toy.engine.step()
    assert toy.records[-1].job_ids == ("new",)
    toy.run()
    assert again.metrics.arrival == 0.0 and new.finished and again.output == toy.expected(again)


def test_waits_outlast_engines() -> None:
    """One without a token for longer than the limit is overdue the moment it is back: restarts would starve it."""
    toy = Toy(COST, max_num_seqs=1, starvation_limit=50.0)
    lost = Toy(COST)
    old = lost.add("old", 4, 100)
    for _ in range(40):
        lost.engine.step()
    toy.clock.now = 1000.0
    resume(toy, old, arrival=0.0, waiting_since=940.0)
    toy.add("new", 2, 2)
    toy.engine.step()
    assert toy.records[-1].job_ids == ("old",)
    toy.run()
