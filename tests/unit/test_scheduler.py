from __future__ import annotations

import math
import random
import sys
from types import FrameType
from typing import Any

import pytest
from toy import Toy

from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel, shared_seconds
from fastserve.scheduler import Scheduler
from fastserve.types import InvalidRequest, Job, SamplingParams


def rows(toy: Toy) -> list[list[tuple[int, int]]]:
    """(start, tokens) of the rows of every plan so far."""
    return [[(start, count) for _, start, count, _ in plan.rows.tolist()] for plan in toy.executor.plans]


# --- the token budget -------------------------------------------------------------------------------------------------


def test_each_stage_of_a_pipeline_has_its_share_of_the_jobs() -> None:
    """Else all were in one plan, and the other stages had nothing to do."""
    config = SchedulerConfig(max_num_seqs=8, pipeline_parallel_size=2, max_in_flight=2, num_blocks=64)
    scheduler = Scheduler(config, CostModel(per_iteration=1.0))
    for number in range(5):
        params = SamplingParams(max_tokens=4)
        scheduler.add(Job(str(number), [1, 2], params, 0, 0.0, 4, frozenset(), number), 0.0)
    plans = [scheduler.schedule(0.0) for _ in range(2)]
    slots = [plan.rows[:, 0].tolist() for plan in plans if plan is not None]
    assert sorted(map(len, slots)) == [2, 3] and len({*slots[0], *slots[1]}) == 5


def test_a_long_prefill_does_not_stall_its_neighbours() -> None:
    toy = Toy(policy="fcfs", max_num_seqs=4, max_num_batched_tokens=64, max_model_len=4096)
    talkers = [toy.add(name, 1, 60) for name in "abc"]
    toy.engine.step()
    long = toy.add("long", 2048, 2)
    while not long.output:
        before = [len(job.output) for job in talkers]
        toy.engine.step()
        assert [len(job.output) for job in talkers] == [count + 1 for count in before]
    assert [counts[-1] for counts in rows(toy)[1:3]] == [(0, 61), (61, 61)]
    toy.run()
    assert long.output == toy.expected(long)


def test_a_prefill_of_higher_priority_leaves_decodes_their_token() -> None:
    toy = Toy(CostModel(per_iteration=0, per_token=1), policy="mlfq", max_num_seqs=4, max_num_batched_tokens=16)
    for name in "abc":
        toy.add(name, 4, 10)
    toy.engine.step()  # now all three decode, in level 1 or below
    toy.add("urgent", 100, 1)
    toy.engine.step()
    assert toy.records[-1].job_ids == ("a", "b", "c", "urgent")
    assert rows(toy)[-1] == [(4, 1), (4, 1), (4, 1), (0, 13)]


def test_prefills_share_what_is_left_in_order_of_priority() -> None:
    toy = Toy(policy="fcfs", max_num_seqs=4, max_num_batched_tokens=10)
    for name, prompt in (("a", 1), ("b", 6), ("c", 8), ("d", 3)):
        toy.add(name, prompt, 2)
    toy.engine.step()
    # "a" costs one token like a decode; "b" and "c" share nine; nothing is left for "d", which takes no row.
    assert rows(toy) == [[(0, 1), (0, 6), (0, 3)]]


def test_a_prefill_without_tokens_gives_its_row_to_a_decode() -> None:
    toy = Toy(CostModel(per_iteration=0, per_token=1), policy="mlfq", max_num_seqs=4, max_num_batched_tokens=4)
    talkers = [toy.add(name, 1, 9) for name in "abc"]
    toy.engine.step()
    toy.add("p", 3, 1)
    toy.add("q", 20, 1)
    toy.engine.step()
    # "p" and "q" come first, but three decodes leave one token: "p" has it, and a row for "q" would stand empty.
    assert toy.records[-1].job_ids == ("a", "b", "c", "p")
    assert rows(toy)[-1] == [(1, 1), (1, 1), (1, 1), (0, 1)]
    toy.run()
    assert [job.output for job in talkers] == [toy.expected(job) for job in talkers]


def calls_to_schedule(waiting: int, policy: str) -> int:
    """Function calls of one decision while `waiting` jobs wait behind a batch that runs."""
    toy = Toy(policy=policy, max_num_seqs=8, max_num_batched_tokens=64, starvation_limit=1000.0)
    for number in range(8):
        toy.add(f"runs{number}", 1, 50)
    toy.engine.step()
    params, prompt = SamplingParams(), [1] * 90
    for number in range(8, 8 + waiting):
        waits = Job(str(number), prompt, params, 0, 0.0, 16, frozenset(), number)
        toy.engine.scheduler.add(waits, 0.0)
    calls = 0

    def count(frame: FrameType, happening: str, argument: Any) -> None:
        nonlocal calls
        calls += happening in ("call", "c_call")

    sys.setprofile(count)
    try:
        toy.engine.step()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("policy", ["fcfs", "mlfq", "skip-join-mlfq"])
def test_a_hundred_thousand_waiting_jobs_cost_no_more_than_a_thousand(policy: str) -> None:
    few, many = calls_to_schedule(1_000, policy), calls_to_schedule(100_000, policy)
    assert many <= few * 1.2


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_the_latest_arrival_loses_its_blocks_first() -> None:
    toy = Toy(policy="fcfs", max_num_seqs=3, max_num_batched_tokens=64, block_size=4, num_blocks=20)
    jobs = [toy.add(name, 7, 30) for name in "abc"]  # 2 blocks each at first, 9 in the end
    toy.run()
    assert [job.metrics.recomputed_tokens > 0 for job in jobs] == [False, False, True]
    assert [job.output for job in jobs] == [toy.expected(job) for job in jobs]


def test_a_job_starts_only_where_it_can_stay() -> None:
    """Each job that runs is owed a block to grow into."""
    toy = Toy(policy="fcfs", max_num_seqs=3, max_num_batched_tokens=64, block_size=4, num_blocks=6)
    jobs = [toy.add("a", 7, 9), toy.add("b", 12, 2), toy.add("c", 1, 1)]
    toy.run()
    # 2 + 1 blocks for "a" and 3 + 1 for "b" are too many; "c" must not overtake "b" into the memory it waits for.
    assert toy.ran == "a a a a a a a a a b+c b"
    assert sum(job.metrics.recomputed_tokens for job in jobs) == 0
    toy = Toy(policy="fcfs", max_num_seqs=3, max_num_batched_tokens=64, block_size=4, num_blocks=6)
    toy.add("a", 7, 9)
    toy.add("c", 1, 1)
    toy.run()
    assert toy.ran == "a+c a a a a a a a a"


MACHINE = CostModel(per_iteration=0.008, per_row=0.0005, per_token=0.0006)  # about SmolLM2 on two cores


def test_a_job_that_cannot_start_leaves_its_row_to_one_that_holds_blocks() -> None:
    """And takes its blocks only once what they hold has been repaid many times over."""
    toy = Toy(MACHINE, max_num_seqs=1, num_blocks=5, max_model_len=100, starvation_limit=None)
    toy.add("long", 40, 41)  # all 5 blocks, in the end
    toy.engine.step()
    toy.add("short", 33, 2)  # 3 blocks, of which 2 are free
    toy.run()
    assert toy.ran == " ".join(["long"] * 41 + ["short"] * 2)
    cheap = CostModel(per_iteration=0.1, per_token=0.001)
    toy = Toy(cheap, max_num_seqs=1, num_blocks=5, max_model_len=100, starvation_limit=None)
    long = toy.add("long", 40, 41)
    toy.engine.step()
    toy.add("short", 33, 2)
    toy.run()
    # n decodes after a prefill of 0.14 s: 0.14 + 0.101 n reaches 16 (0.14 + 0.001 n) with n = 25.
    assert toy.ran == " ".join(["long"] * 26 + ["short"] * 2 + ["long"] * 15)
    assert long.metrics.recomputed_tokens == 65


def trace_under_shortage(policy: str) -> tuple[float, float]:
    """60 jobs at once, 8 rows and memory for four long ones: mean JCT, and tokens computed again per useful one."""
    toy = Toy(MACHINE, policy=policy, max_num_seqs=8, num_blocks=64, max_model_len=300, max_in_flight=2)
    rng = random.Random(0)
    jobs = [toy.add(str(i), rng.choice([20, 100]), rng.choice([10, 150]), seed=i) for i in range(60)]
    while toy.engine.has_work:
        toy.engine.step()
    assert [job.output for job in jobs[::7]] == [toy.expected(job) for job in jobs[::7]]
    useful = sum(len(job.prompt) + len(job.output) for job in jobs)
    return (
        sum(job.metrics.jct or math.inf for job in jobs) / len(jobs),
        sum(job.metrics.recomputed_tokens for job in jobs) / useful,
    )


def test_preemption_does_not_drown_in_recomputation() -> None:
    """When every better job took the blocks it needed, skip-join computed 1.8 tokens again for every useful one."""
    (fcfs, _), (skip_join, again) = trace_under_shortage("fcfs"), trace_under_shortage("skip-join-mlfq")
    assert 0 < again <= 0.3
    assert skip_join <= fcfs


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("budget", [8, 9, 23, 512])
def test_a_prefill_costs_the_same_in_however_many_chunks(rows: int, budget: int) -> None:
    """Its neighbours decide how it is cut; they must not decide which level it reaches."""
    cost = CostModel(per_iteration=0.5, per_row=0.25, per_token=0.125, per_read=2**-6, per_pair=2**-12)  # no rounding
    toy = Toy(cost, max_num_seqs=8, max_num_batched_tokens=budget, starvation_limit=None)
    for number in range(rows - 1):
        toy.add(str(number), 1, 100)
    toy.engine.step()
    charged: list[float] = []
    shared = shared_seconds(cost, 8)
    policy = toy.engine.scheduler.policy
    charge = policy.on_service
    job = toy.add("a", 64, 3)
    joined = policy.level(job)

    def spy(served: Job, seconds: float, now: float) -> None:
        if served is job:
            charged.append(seconds)
            if not job.output and job.served < 64:
                assert sum(charged) + job.next_seconds == cost.prefill_seconds(0, 64) - shared
        charge(served, seconds, now)

    policy.on_service = spy  # type: ignore[method-assign]
    while not job.output:
        assert policy.level(job) == joined
        toy.engine.step()
    toy.engine.step()
    assert sum(charged) == cost.prefill_seconds(0, 64) - shared
    charged.clear()
    toy.run()
    alone = cost.decode_seconds(65) + cost.decode_seconds(66)
    assert job.attained == cost.prefill_seconds(0, 64) + alone
    assert sum(charged) == pytest.approx(alone - 2 * shared, rel=1e-2)  # their lengths differ by one


def test_recomputation_is_not_charged() -> None:
    toy = Toy(CostModel(per_iteration=0, per_token=1), policy="fcfs", num_blocks=10, block_size=4, max_num_seqs=2)
    charged: dict[str, float] = {}
    charge = toy.engine.scheduler.policy.on_service

    def spy(job: Job, own_seconds: float, now: float) -> None:
        charged[job.job_id] = charged.get(job.job_id, 0) + own_seconds
        charge(job, own_seconds, now)

    toy.engine.scheduler.policy.on_service = spy  # type: ignore[method-assign]
    jobs = [toy.add("a", 7, 30), toy.add("b", 7, 30)]
    toy.run()
    assert jobs[1].metrics.recomputed_tokens > 7
    assert charged == {"a": 7 + 29, "b": 7 + 29}
    assert [job.output for job in jobs] == [toy.expected(job) for job in jobs]


def test_a_preempted_job_keeps_its_blocks_while_nobody_needs_them() -> None:
    toy = Toy(CostModel(per_iteration=0, per_token=1), max_num_seqs=1, starvation_limit=None)
    long = toy.add("long", 8, 3)
    toy.engine.step()
    toy.add("short", 1, 3)
    toy.run()
    assert (long.metrics.preemptions, long.metrics.recomputed_tokens) == (1, 0)


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_job_that_has_all_its_tokens_under_way_is_not_preempted(max_in_flight: int) -> None:
    toy = Toy(policy="fcfs", max_num_seqs=2, max_in_flight=max_in_flight)
    jobs = [toy.add("neighbour", 3, 6), toy.add("one", 3, 1), toy.add("two", 3, 2)]
    toy.run()
    assert [job.metrics.preemptions for job in jobs] == [0, 0, 0]
    assert all(len(job.output) == job.max_output for job in jobs)


def test_a_job_that_can_never_fit_is_refused() -> None:
    toy = Toy(block_size=4, num_blocks=5, max_model_len=100)
    fits = toy.add("fits", 15, 6)  # the last token's KV is never held
    with pytest.raises(InvalidRequest, match=r"max_tokens: .* need 6 KV blocks .* there are 5"):
        toy.add("one more", 15, 7)
    with pytest.raises(InvalidRequest, match=r"prompt: .* need 6 KV blocks"):
        toy.add("prompt alone", 21, 1)
    toy.run()
    assert fits.output == toy.expected(fits)


def test_the_context_ends_where_the_pool_does() -> None:
    toy = Toy(block_size=4, num_blocks=5, max_model_len=100)
    job = toy.add("a", 15, None)
    toy.run()
    assert len(job.output) == 6
