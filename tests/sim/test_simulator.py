"""The simulator against an independent reference, closed forms and timelines worked out by hand."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import reference_queue
from hypothesis import example, given
from hypothesis import strategies as st

from fastserve.config import SchedulerConfig
from fastserve.cost import Cost, CostModel, Link
from fastserve.engine import Engine
from fastserve.simulator import SimExecutor, SimulationTotals, VirtualClock, simulate
from fastserve.types import FinishReason, InvalidRequest, Job, SamplingParams
from fastserve.workloads.job import SimJob

ROOMY = {"max_num_seqs": 4, "max_num_batched_tokens": 4096, "num_blocks": 100_000, "max_model_len": 4096}


def run(
    jobs: Iterable[SimJob], cost: Cost | None = None, *, stages: int = 1, link: Link | None = None, **options: object
) -> tuple[list[Job], SimulationTotals]:
    """The finished jobs by number, and the totals."""
    finished: list[Job] = []
    config = SchedulerConfig(**{**ROOMY, **options})  # type: ignore[arg-type]
    totals = simulate(
        jobs, config, cost or CostModel.constant(1.0), link=link, pipeline_stages=stages, on_finish=finished.append
    )
    return sorted(finished, key=lambda job: job.index), totals


def finishes(jobs: Iterable[Job]) -> list[float]:
    return [job.metrics.finish for job in jobs if job.metrics.finish is not None]


# --- constant iterations: the reference, and formulas -----------------------------------------------------------------

TRACES = st.lists(
    st.tuples(
        st.floats(0, 20, allow_nan=False),
        st.integers(1, 50),
        st.one_of(st.integers(1, 6), st.integers(1, 40)),
        st.sampled_from([0, 0, 0, -1, 1]),
    ),
    min_size=1,
    max_size=40,
).map(sorted)
ORDERS = {"fcfs": reference_queue.fcfs, "srpt": reference_queue.srpt}


@pytest.mark.parametrize("policy", ["fcfs", "srpt"])
@example(trace=[(0.0, 1, 5, 0), (1.57, 1, 3, 0), (3.53, 1, 1, -1)], batch=2, seconds=1.0)  # one makes way: a tie
@given(trace=TRACES, batch=st.integers(1, 5), seconds=st.sampled_from([1.0, 0.1, 0.037]))
def test_finish_times_are_the_references(
    policy: str, trace: list[tuple[float, int, int, int]], batch: int, seconds: float
) -> None:
    jobs = [SimJob(*job[:3], priority=job[3]) for job in trace]
    done, totals = run(jobs, CostModel.constant(seconds), policy=policy, max_num_seqs=batch)
    expected = reference_queue.serve(trace, ORDERS[policy], batch=batch, seconds=seconds)
    assert finishes(done) == [customer.finish for customer in expected]
    assert [job.metrics.first_token for job in done] == [customer.first_token for customer in expected]
    assert [len(job.output) for job in done] == [job.output_tokens for job in jobs]
    assert totals.rows == sum(job.output_tokens for job in jobs) == totals.decode_tokens + len(trace)
    assert totals.prefill_tokens == sum(job.prompt_tokens for job in jobs)


@pytest.mark.parametrize("batch", [1, 4])
def test_equal_jobs_that_arrive_together(batch: int) -> None:
    """n jobs of m tokens in n / B rounds: round k ends at k·m·s, so the mean JCT is m·s·(n / B + 1) / 2."""
    n, m, s = 32, 7, 0.25
    done, totals = run([SimJob(0.0, 3, m)] * n, CostModel.constant(s), policy="fcfs", max_num_seqs=batch)
    assert np.mean(finishes(done)) == m * s * (n / batch + 1) / 2
    assert (totals.iterations, totals.busy_seconds, totals.seconds) == (n // batch * m, 56 / batch, 56 / batch)
    assert totals.stall_seconds == 0


def test_single_server_queue_of_constant_service() -> None:
    """M/D/1: the mean wait is ρ·S / 2(1 − ρ), plus what is left of the slot of the iteration under way (none: one
    iteration serves a job, and an idle server starts at once)."""
    load, count = 0.7, 12_000
    arrivals = np.random.default_rng(3).exponential(1 / load, count).cumsum()
    done, totals = run((SimJob(float(t), 5, 1) for t in arrivals), policy="fcfs", max_num_seqs=1)
    waits = np.array([job.metrics.jct for job in done]) - 1.0
    assert waits.mean() == pytest.approx(load / (2 * (1 - load)), rel=0.08)
    assert totals.busy_seconds == pytest.approx(count)
    assert totals.stall_seconds == pytest.approx(0)


def test_a_single_server_obeys_lindley() -> None:
    """Wait(n + 1) = max(0, wait(n) + service(n) − gap(n)), exactly where every number is a binary fraction."""
    rng = np.random.default_rng(5)
    gaps, lengths = rng.integers(1, 40, 500) / 4, rng.integers(1, 9, 500)
    arrivals = gaps.cumsum()
    jobs = [SimJob(float(t), 2, int(m)) for t, m in zip(arrivals, lengths, strict=True)]
    done, totals = run(jobs, policy="fcfs", max_num_seqs=1)
    wait, stall = 0.0, []
    for n, job in enumerate(done):
        assert job.metrics.jct == wait + lengths[n]
        if n + 1 < len(done):
            stall.append(max(0.0, gaps[n + 1] - wait - lengths[n]))
            wait = max(0.0, wait + lengths[n] - gaps[n + 1])
    assert totals.seconds == arrivals[0] + sum(stall) + lengths.sum()
    assert totals.stall_seconds == 0


# --- how jobs end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "tokens", "reason"),
    [
        (SimJob(0, 10, 5), 5, FinishReason.STOP),
        (SimJob(0, 10, 1), 1, FinishReason.STOP),
        (SimJob(0, 10, 5, max_tokens=6), 5, FinishReason.STOP),
        (SimJob(0, 10, 5, max_tokens=5), 5, FinishReason.LENGTH),
        (SimJob(0, 10, 5, max_tokens=3), 3, FinishReason.LENGTH),
        (SimJob(0, 10, 500), 54, FinishReason.LENGTH),  # a context of 64
    ],
)
@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_job_ends_where_it_ends(job: SimJob, tokens: int, reason: FinishReason, in_flight: int) -> None:
    (done,), _ = run([job], max_model_len=64, max_in_flight=in_flight)
    assert (len(done.output), done.finish_reason) == (tokens, reason)
    assert done.output == [0] * (tokens - 1) + [1 if reason is FinishReason.STOP else 0]
    assert done.known_output == tokens


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_job_that_lost_its_blocks_ends_where_it_would_have(in_flight: int) -> None:
    """Computed again, it is opened again with its output as part of the positions."""
    jobs = [SimJob(0, 7, 30 - number) for number in range(3)]
    done, totals = run(
        jobs, policy="fcfs", max_num_seqs=3, block_size=4, num_blocks=20, max_model_len=40, max_in_flight=in_flight
    )
    assert totals.recomputed_tokens > 0
    assert [(len(job.output), job.finish_reason) for job in done] == [(30 - n, FinishReason.STOP) for n in range(3)]


def test_a_chunked_prompt_samples_once_it_is_complete() -> None:
    done, totals = run([SimJob(0, 10, 2), SimJob(0, 1, 3)], max_num_batched_tokens=4, max_num_seqs=2, policy="fcfs")
    # 4, 4 and 2 + 1 prompt tokens: the second prompt comes after the first, and fits beside its last chunk.
    assert [job.metrics.first_token for job in done] == [3.0, 3.0]
    assert (totals.prefill_tokens, totals.decode_tokens) == (11, 3)


# --- time -------------------------------------------------------------------------------------------------------------


def test_an_arrival_joins_the_next_iteration() -> None:
    done, totals = run([SimJob(0.25, 1, 3), SimJob(1.0, 1, 1), SimJob(9.5, 1, 1)], policy="fcfs")
    assert finishes(done) == [3.25, 2.25, 10.5]
    assert (totals.iterations, totals.busy_seconds, totals.stall_seconds, totals.seconds) == (4, 4.0, 0.0, 10.5)


def test_a_second_plan_starts_when_the_first_ends() -> None:
    """Two in flight: what arrives during the first plan finds the second already queued, unless there is room."""
    done, totals = run([SimJob(0, 1, 3), SimJob(0.5, 1, 1)], policy="fcfs", max_in_flight=2)
    # 0–1 and 1–2 are queued at 0; at 1 the third joins them, with the new job. The one after it is dropped.
    assert finishes(done) == [3.0, 3.0]
    assert totals.busy_seconds == totals.iterations == 4
    done, _ = run([SimJob(0, 1, 1, max_tokens=1), SimJob(0.5, 1, 1)], policy="fcfs", max_in_flight=2)
    assert finishes(done) == [1.0, 2.0]  # queued at 0.5


def test_a_pipeline_overlaps_plans_of_different_jobs() -> None:
    """Two stages of half a second; a batch of one, so that each plan holds another job."""
    config = {"policy": "fcfs", "max_num_seqs": 1}
    jobs = [SimJob(0, 1, 1, max_tokens=1)] * 4
    done, totals = run(jobs, stages=2, **config)
    assert finishes(done) == [1.0, 1.5, 2.0, 2.5]
    assert (totals.busy_seconds, totals.stall_seconds) == (2.5, 0.0)
    done, _ = run(jobs, stages=4, **config)
    assert finishes(done) == [1.0, 1.25, 1.5, 1.75]


def test_a_token_must_leave_the_pipeline_before_it_is_read() -> None:
    done, _ = run([SimJob(0, 1, 4, max_tokens=4)], stages=2, policy="fcfs", max_num_seqs=1)
    assert finishes(done) == [4.0]


def test_in_a_pipeline_a_job_is_charged_its_time_in_a_stage() -> None:
    """Five jobs of one iteration, 8 s through two stages: one enters every 4 s, which is what the last is told."""
    clock, cost = VirtualClock(), CostModel.constant(8.0)
    config = SchedulerConfig(policy="fcfs", max_num_seqs=1, max_in_flight=2, pipeline_parallel_size=2)
    engine = Engine(config, SimExecutor(cost, clock, stages=2), cost, clock=clock)
    params = SamplingParams(temperature=0.0, max_tokens=1)
    jobs = [engine.add_job(str(k), [1, 2, 3], params, seed=k, vocab_size=9) for k in range(5)]
    ahead = engine.scheduler.policy.work_ahead(jobs[-1], 0.0)
    while engine.has_work:
        engine.step()
    assert [job.metrics.first_scheduled for job in jobs] == [0.0, 0.0, 8.0, 12.0, 16.0]  # two plans are in flight
    assert finishes(jobs) == [8.0, 12.0, 16.0, 20.0, 24.0]
    assert ahead == 16.0
    assert [engine.scheduler.progress(job)[1] for job in jobs] == [4.0] * 5


def test_a_job_is_in_one_plan_of_a_pipeline_at_most() -> None:
    done, _ = run([SimJob(0, 12, 1, max_tokens=1)], stages=2, max_num_seqs=1, max_num_batched_tokens=4, policy="fcfs")
    assert finishes(done) == [3.0]


# --- memory -----------------------------------------------------------------------------------------------------------


def jobs_in_memory() -> int:
    gc.collect()
    return sum(isinstance(thing, (Job, SimJob)) for thing in gc.get_objects())


def test_memory_is_that_of_the_live_jobs() -> None:
    """20,000 jobs come from a generator; never more than some are alive."""
    most, before = 0, jobs_in_memory()

    def jobs() -> Iterator[SimJob]:
        nonlocal most
        for number in range(20_000):
            if number % 4000 == 3999:
                most = max(most, jobs_in_memory() - before)
            yield SimJob(number * 1.0, 8, 2)

    ended = 0

    def count(job: Job) -> None:
        nonlocal ended
        ended += 1

    totals = simulate(jobs(), SchedulerConfig(**ROOMY, policy="fcfs"), CostModel.constant(0.9), on_finish=count)
    assert (ended, totals.jobs) == (20_000, 20_000)
    assert 0 < most <= 8


# --- limits and errors ------------------------------------------------------------------------------------------------


def test_it_stops_after_so_many_iterations() -> None:
    heard: list[float] = []
    totals = simulate(
        (SimJob(0.0, 1, 3000) for _ in range(2)),
        SchedulerConfig(**ROOMY),
        CostModel.constant(1.0),
        on_finish=lambda job: None,
        max_iterations=2500,
        progress=heard.append,
    )
    assert (totals.iterations, totals.seconds, totals.jobs) == (2500, 2500.0, 0)
    assert heard == [1024.0, 2048.0]


@pytest.mark.parametrize(
    ("jobs", "field", "number"),
    [
        ([SimJob(1.0, 1, 1), SimJob(0.5, 1, 1)], "arrival", 1),
        ([SimJob(-1.0, 1, 1)], "arrival", 0),
        ([SimJob(math.nan, 1, 1)], "arrival", 0),
        ([SimJob(0.0, 1, 1), SimJob(0.0, 1, 0)], "output_tokens", 1),
        ([SimJob(0.0, 1, 1), SimJob(0.0, 0, 1)], "prompt", 1),
        ([SimJob(0.0, 9999, 1)], "prompt", 0),
    ],
)
def test_a_job_that_cannot_be_is_refused_with_its_number(jobs: list[SimJob], field: str, number: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        run(jobs)
    assert (caught.value.field, caught.value.request) == (field, number)


def test_host_memory_without_a_link_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="link: is needed"):
        run([SimJob(0, 1, 1)], num_host_blocks=8)
    with pytest.raises(InvalidRequest, match="pipeline_parallel_size"):
        run([SimJob(0, 1, 1)], stages=0)


def test_the_same_trace_gives_the_same_schedule() -> None:
    """Wherever in memory its jobs lie: what was allocated before must not matter."""
    rng = np.random.default_rng(0)
    gaps, prompts, outputs = rng.exponential(0.1, 300), rng.integers(1, 200, 300), rng.integers(1, 100, 300)
    trace = [SimJob(*job) for job in zip(gaps.cumsum().tolist(), prompts.tolist(), outputs.tolist(), strict=True)]
    cost = CostModel(per_iteration=0.02, per_row=1e-4, per_token=1e-4, per_read=1e-7, per_pair=1e-9)
    kept, metrics = [], []
    for turn in range(3):
        done, _ = run(trace, cost, policy="skip-join-mlfq", num_blocks=100, max_model_len=512, max_num_seqs=8)
        metrics.append([job.metrics for job in done])
        kept.append((done[:: turn + 2], [bytearray(int(size)) for size in rng.integers(1, 900, 5000)]))
    assert metrics[0] == metrics[1] == metrics[2]


def test_moving_kv_to_the_host_and_back() -> None:
    """The device holds a tenth of what the trace needs. Nothing is computed twice, and nothing is lost."""
    rng = np.random.default_rng(1)
    arrivals, outputs = rng.exponential(0.2, 100).cumsum(), rng.integers(1, 120, 100)
    trace = [SimJob(float(t), 40, int(n)) for t, n in zip(arrivals, outputs, strict=True)]
    done, totals = run(
        trace, CostModel.constant(0.05), link=Link(offload_block=1e-3, upload_block=1e-3, latency=1e-4),
        policy="skip-join-mlfq", num_blocks=40, num_host_blocks=2000, max_model_len=256,
    )  # fmt: skip
    assert [len(job.output) for job in done] == outputs.tolist()
    assert totals.offloaded_blocks > 0 and totals.uploaded_blocks > 0  # uploads leave a copy behind, good for another
    assert totals.offload_seconds == pytest.approx(1e-3 * totals.offloaded_blocks + 1e-4 * totals.offload_copies)
    assert totals.upload_seconds == pytest.approx(1e-3 * totals.uploaded_blocks + 1e-4 * totals.upload_copies)
    assert totals.busy_seconds == pytest.approx(0.05 * totals.iterations)
    assert totals.busy_seconds + totals.stall_seconds <= totals.seconds
