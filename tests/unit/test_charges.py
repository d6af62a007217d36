"""What jobs are charged, worked by hand: a token takes 1 s if it is alone, 0.8 s of which an iteration costs empty."""

from __future__ import annotations

import pytest
from toy import Toy, bare_job

from fastserve.cost import CostModel, quantum_of, shared_seconds
from fastserve.policies.mlfq import MultiLevelFeedbackQueue

COST = CostModel(per_iteration=0.8, per_token=0.2)
BATCH = 4
SHARED = 0.8 * 3 / 4  # of an iteration that is paid by four, the part of the other three
DECODE = 0.2 + 0.8 / 4


def test_what_a_full_batch_shares_is_what_an_iteration_costs_empty() -> None:
    assert shared_seconds(COST, BATCH) == pytest.approx(SHARED) and quantum_of(COST, BATCH) == pytest.approx(DECODE)
    assert shared_seconds(COST, 1) == 0 and quantum_of(COST, 1) == 1.0
    assert shared_seconds(CostModel(per_iteration=0.0, per_token=0.2), BATCH) == 0


@pytest.mark.parametrize("budget", [64, 4])
def test_a_job_is_charged_its_share_of_iterations_and_what_it_adds(budget: int) -> None:
    """Once for a prefill, in however many chunks, and for every decode; alone it takes as long as ever."""
    toy = Toy(COST, max_num_seqs=BATCH, max_num_batched_tokens=budget)
    job = toy.add("a", 10, 5)
    toy.run()
    assert job.attained == pytest.approx(0.8 + 10 * 0.2 + 4 * 1.0)
    assert job.charged == pytest.approx(0.8 / 4 + 10 * 0.2 + 4 * DECODE)


def test_decodes_weigh_what_they_add_to_a_full_batch() -> None:
    """A prompt of 20 tokens is charged as much as 10 decodes are, though alone these take twice as long."""
    toy = Toy(COST, max_num_seqs=BATCH)
    prompt, decodes = toy.add("p", 20, 1), toy.add("d", 1, 11)
    toy.run()
    assert prompt.charged == pytest.approx(0.8 / 4 + 20 * 0.2)
    assert decodes.charged == pytest.approx(11 * DECODE)
    assert decodes.attained > 2 * prompt.attained


@pytest.mark.parametrize("policy", ["fcfs", "skip-join-mlfq"])
def test_decodes_are_charged_the_same_however_often_they_are_told(policy: str) -> None:
    """Decodes grow with their contexts, and are told in lumps."""
    cost = CostModel(per_iteration=1e-2, per_row=1e-3, per_token=1e-4, per_read=1e-6)
    toy = Toy(cost, policy=policy, max_num_seqs=64, num_blocks=400, max_model_len=3000)
    job = toy.add("a", 16, 2000)
    toy.run()
    exact = cost.prefill_seconds(0, 16) + sum(cost.decode_seconds(n) for n in range(17, 2016))
    assert job.attained == pytest.approx(exact)
    assert job.charged == pytest.approx(exact - 2000 * 1e-2 * 63 / 64, rel=1e-6)


def queue(**options: object) -> MultiLevelFeedbackQueue:
    defaults = {"quantum": 1.0, "shared": 3.0, "num_levels": 8, "starvation_limit": None, "skip_join": True}
    return MultiLevelFeedbackQueue(**{**defaults, **options})  # type: ignore[arg-type]


def test_levels_go_by_charges_and_horizons_by_solo_time() -> None:
    """A prefill of 11 s solo is charged 8; then level 3 is spent, and level 4 holds 16 decodes of 4 s each."""
    policy = queue()
    job = bare_job(0, 11.0)
    policy.add(job, 0.0)
    assert policy.level(job) == 3
    job.served, job.next_seconds = len(job.prompt), 4.0
    policy.on_service(job, 8.0, 0.0)
    assert policy.level(job) == 4 and policy.horizon(job) == pytest.approx(16 * 4.0)
    policy.on_service(job, 15.0, 0.0)
    assert policy.level(job) == 4 and policy.horizon(job) == pytest.approx(4.0)
    policy.on_service(job, 1.0, 0.0)
    assert policy.level(job) == 5
    assert list(policy.quanta()) == [4.0 * 2**level for level in range(8)]  # as decodes take them


def test_who_joins_by_the_rest_of_a_prompt_keeps_a_quantum_of_the_whole() -> None:
    """Of 30 tokens, charged 1 s each, 28 are cached: level 1, with the 32 s of level 5; then level 2's own."""
    policy = queue(shared=0.0, prefill=float)
    job = bare_job(0, 2.0)
    job.prompt, job.cached, job.served = range(30), 28, 28
    policy.add(job, 0.0)
    assert policy.level(job) == 1
    job.served, job.next_seconds = 30, 1.0
    policy.on_service(job, 2.0, 0.0)
    assert policy.level(job) == 1 and policy.horizon(job) == pytest.approx(30.0)
    policy.on_service(job, 30.0, 0.0)
    assert policy.level(job) == 2 and policy.horizon(job) == pytest.approx(4.0)


def test_where_nothing_is_cached_the_first_quantum_is_the_levels() -> None:
    policy = queue(shared=0.0, prefill=float)
    job = bare_job(0, 3.0)
    job.prompt = range(3)
    policy.add(job, 0.0)
    assert policy.level(job) == 2 and policy.horizon(job) == pytest.approx(4.0)
