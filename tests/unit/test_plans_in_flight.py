"""Plans that overlap, results that come late, and what the runtime is told of jobs."""

from __future__ import annotations

import numpy as np
import pytest
from toy import Toy

from fastserve.cost import CostModel
from fastserve.types import StepResult


def test_a_successor_plan_decodes_a_token_not_yet_known() -> None:
    toy = Toy(max_in_flight=2)
    job = toy.add("a", 3, 4)
    toy.engine.step()
    first, second = toy.executor.plans
    assert first.tokens.tolist() == job.prompt and second.tokens.tolist() == [-1]
    toy.run()
    assert job.output == toy.expected(job)
    assert len(toy.records) == 4  # nothing is computed past max_tokens


def test_a_result_for_a_job_that_turned_out_finished_is_dropped() -> None:
    toy = Toy(max_in_flight=2)
    alone = toy.add("alone", [5, 6], 5)
    toy.run()
    job = toy.add("a", [5, 6], 30, stop_token_ids=alone.output[-1:])
    expected = toy.expected(job)
    while not job.finished:
        toy.engine.step()
        toy.engine.check_integrity()
    free = toy.engine.scheduler.blocks.free_blocks
    assert toy.engine.has_work and free < toy.config.num_blocks  # its successor plan is still out
    assert toy.engine.step() == []
    assert not toy.engine.has_work and toy.engine.scheduler.blocks.free_blocks == toy.config.num_blocks
    assert job.output == expected == alone.output and len(toy.records) == 5 + 5 + 1


def test_a_job_in_flight_is_no_victim() -> None:
    toy = Toy(policy="fcfs", max_in_flight=2, max_num_seqs=2, block_size=2, num_blocks=8, max_num_batched_tokens=16)
    jobs = [toy.add("a", 5, 11), toy.add("b", 5, 11)]
    toy.run()  # ToyExecutor and check_integrity would notice
    assert jobs[0].metrics.recomputed_tokens == 0 < jobs[1].metrics.recomputed_tokens
    assert [job.output for job in jobs] == [toy.expected(job) for job in jobs]


def test_jobs_in_flight_pause_for_one_that_needs_their_blocks() -> None:
    """With two plans in flight, a job that runs in every plan could otherwise keep its blocks from a better one."""
    toy = Toy(CostModel(per_iteration=0, per_token=1), max_in_flight=2, max_num_seqs=2, num_blocks=3, repayment=0.0)
    long = toy.add("long", 33, 15)  # holds all 3 blocks from its first plan on
    toy.engine.step()
    short = toy.add("short", 20, 2)
    for _ in range(4):
        toy.engine.step()
    assert short.finished and len(long.output) < 4
    toy.run()
    assert (long.output, short.output) == (toy.expected(long), toy.expected(short))


@pytest.mark.parametrize("max_in_flight", [4, 6])
def test_integrity_holds_for_an_aborted_job_with_many_plans_in_flight(max_in_flight: int) -> None:
    """Tokens dropped on their return leave more computed than is known."""
    toy = Toy(max_in_flight=max_in_flight, policy="fcfs")
    job = toy.add("a", 3, 20)
    toy.engine.step()
    toy.engine.step()
    toy.engine.abort("a")
    toy.engine.check_integrity()
    toy.run()
    assert job.output == toy.expected(job)[:2]


def test_slots_are_used_again() -> None:
    toy = Toy(policy="fcfs", max_num_seqs=2)
    for number in range(10):
        toy.add(str(number), 2, 2)
    toy.run()
    assert {slot for plan in toy.executor.plans for slot in plan.opened[:, 0].tolist()} == {0, 1}


def test_a_result_that_belongs_to_no_plan_is_refused() -> None:
    toy = Toy()
    toy.add("a", 3)
    owner = toy.engine.scheduler
    plan = owner.schedule(0.0)
    assert plan is not None
    toy.executor.submit(plan)
    result = toy.executor.poll(None)
    assert result is not None
    result.plan_id += 1
    with pytest.raises(RuntimeError, match="matches no plan"):
        owner.complete(result, 1.0)


def test_a_result_without_a_plan_is_refused() -> None:
    none, reals = np.zeros(0, np.int32), np.zeros(0, np.float32)
    result = StepResult(plan_id=1, tokens=none, logprobs=reals, top_tokens=none, top_logprobs=reals, seconds=0.0)
    with pytest.raises(RuntimeError, match="matches no plan"):
        Toy().engine.scheduler.complete(result, 0.0)


def test_integrity_notices_a_leak() -> None:
    toy = Toy()
    toy.add("a", 3)
    toy.engine.step()
    toy.engine.scheduler.blocks.grow(99, 1)
    with pytest.raises(RuntimeError, match="a block belongs to no job"):
        toy.engine.check_integrity()


def test_a_plan_tells_the_runtime_all_about_a_job_once() -> None:
    toy = Toy()
    toy.add(
        "a", [5, 6, 7], 9, seed=2**64 - 1, top_k=-1, top_p=0.5, temperature=0.25, min_tokens=2, logprobs=3,
        repetition_penalty=1.5, presence_penalty=-0.5, logit_bias={8: 1.5, 9: -2.0}, stop_token_ids=[11, 10],
    )  # fmt: skip
    toy.add("b", [1], 9, min_p=0.125, top_k=4)
    toy.engine.step()
    toy.engine.step()
    plan, later = toy.executor.plans
    assert plan.opened.tolist() == [[1, 1, 0, 4, -1, 0, 0, 0], [0, 3, 3, 0, 3, 2, 2, 2]][::-1]
    assert plan.opened_params.tolist() == [[0.25, 0.5, 0, 1.5, -0.5, 0], [1, 1, 0.125, 1, 0, 0]]
    assert plan.opened_seeds.tolist() == [2**64 - 1, 0]
    assert plan.history.tolist() == [5, 6, 7]
    assert (plan.bias_tokens.tolist(), plan.bias_values.tolist()) == ([8, 9], [1.5, -2.0])
    assert plan.stop_tokens.tolist() == [10, 11]
    assert len(plan.table) == 2
    assert len(later.opened) == len(later.history) == len(later.table) == 0
    assert {a.dtype.name for a in (plan.rows, plan.tokens, plan.opened, plan.table, plan.closed)} == {"int32"}


def test_a_job_opened_again_brings_its_output_as_history() -> None:
    toy = Toy(policy="fcfs", max_num_seqs=2, block_size=4, num_blocks=7, max_num_batched_tokens=16)
    toy.add("a", 7, 14)
    b = toy.add("b", 6, 9, presence_penalty=0.5)
    toy.run()
    again = [plan for plan in toy.executor.plans[1:] if len(plan.opened)]
    assert again and len(again[0].history) > 6
    assert again[0].history.tolist() == (b.prompt + b.output)[: len(again[0].history)]
    assert b.output == toy.expected(b)
