"""What the engine says of itself, against what happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from toy import Toy

from fastserve.cost import CostModel
from fastserve.engine import Engine, IterationRecord
from fastserve.ipc import JobStatus, Status
from fastserve.monitor import Monitor
from fastserve.policies import ONLINE_POLICIES
from fastserve.types import OFFLOAD, UPLOAD, BatchPlan, FinishReason, Job, SamplingParams

COST = CostModel(per_iteration=1.0, per_token=0.05)
BLOCK = 100  # bytes


class Watched(Toy):
    """A toy whose iterations a monitor sees, too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(COST, **options)
        self.monitor = Monitor(self.config, COST, block_bytes=BLOCK)

        def both(record: Any) -> None:
            self.records.append(record)
            self.monitor.on_iteration(record)

        plain = self.executor.submit

        def submit(plan: BatchPlan) -> None:
            self.monitor.on_submit(plan)
            plain(plan)

        self.executor.submit = submit  # type: ignore[method-assign]
        self.engine = Engine(self.config, self.executor, COST, clock=self.clock, on_iteration=both)

    def status(self) -> Status:
        return self.monitor.status(self.engine, self.clock.now)


@pytest.mark.parametrize("policy", ONLINE_POLICIES)
def test_counters_are_the_sums_of_what_happened(policy: str) -> None:
    toy = Watched(
        policy=policy, max_num_seqs=3, num_blocks=12, block_size=4, num_host_blocks=40, max_in_flight=2,
        swap_mode="reactive", starvation_limit=6.0, repayment=1.0,
    )  # fmt: skip
    jobs = [toy.add(str(k), 4 + 3 * k, 20) for k in range(8)]
    earlier = toy.status()
    while toy.engine.has_work:
        toy.engine.step()
        status = toy.status()
        counters = Status.__struct_fields__[10:]  # from iterations on
        for name in counters[: counters.index("device_blocks_cached")]:
            assert getattr(status, name) >= getattr(earlier, name), f"{name} fell"
        assert status.live == len(toy.engine.jobs) == sum(level.waiting + level.running for level in status.levels)
        assert status.running <= 2 * 3
        earlier = status
    status = toy.status()
    assert status.iterations == sum(bool(record.job_ids) for record in toy.records)
    assert status.prefill_tokens == sum(record.prefill_tokens for record in toy.records)
    assert status.decode_tokens == sum(record.decode_tokens for record in toy.records)
    assert status.preemptions == sum(job.metrics.preemptions for job in jobs)
    assert status.recomputed_tokens == sum(job.metrics.recomputed_tokens for job in jobs)
    assert status.busy_seconds == pytest.approx(sum(record.seconds for record in toy.records if record.job_ids))
    computed = status.prefill_tokens + status.decode_tokens  # what was computed again is among the first
    assert status.modelled_seconds == pytest.approx(status.iterations * 1.0 + 0.05 * computed)
    assert status.offloaded_bytes == toy.executor.copied[OFFLOAD] * BLOCK
    assert status.uploaded_bytes == toy.executor.copied[UPLOAD] * BLOCK
    assert 0 <= status.hidden_copy_seconds <= status.copy_seconds
    if policy in ("mlfq", "skip-join-mlfq"):
        assert status.preemptions > 0 and status.offloaded_bytes > 0
    assert (status.live, status.running, status.backlog, status.device_blocks_used) == (0, 0, 0.0, 0)


def test_levels_of_the_queue() -> None:
    toy = Watched(policy="skip-join-mlfq", num_levels=4, max_num_seqs=1, starvation_limit=None)
    short = toy.add("0", 1, 9)
    toy.clock.now = 2.0
    toy.add("1", 60, 9)  # 4 s of prefill, 4 quanta of 1.05 s: level 2
    toy.add("2", 60, 9)
    toy.engine.step()
    status = toy.status()
    assert [level.quantum for level in status.levels] == [1.05, 2.1, 4.2, 8.4]
    assert [(level.waiting, level.running) for level in status.levels][2] == (2, 0)
    assert [level.oldest_wait for level in status.levels] == [0, 0, toy.clock.now - 2.0, 0]
    assert status.running == 1 and status.live == 3 and status.device_blocks_used == 1
    assert short.waiting_since is None and status.backlog > 0


@pytest.mark.parametrize("policy", ONLINE_POLICIES)
def test_levels_are_told_before_the_first_job_and_with_priorities(policy: str) -> None:
    toy = Watched(policy=policy, num_levels=4)
    count = 1 if policy == "fcfs" else 4
    assert [(level.waiting, level.running) for level in toy.status().levels] == [(0, 0)] * count
    assert (toy.status().levels[0].quantum is None) == (policy == "fcfs")
    for name, priority in (("1", 1), ("2", -1)):
        job = toy.add(name, 5, 3)
        assert job.priority == 0
        toy.engine.abort(name)
        toy.engine.add_job(name, job.prompt, job.params, seed=0, vocab_size=61, priority=priority)
    assert len(toy.status().levels) == count and toy.status().live == 2


def test_the_jobs_listed_are_in_the_order_in_which_they_run() -> None:
    toy = Watched(policy="skip-join-mlfq", num_levels=6, max_num_seqs=1, num_blocks=20, block_size=4)
    toy.add("7", 40, 9)
    toy.engine.step()
    toy.add("8", 2, 9)
    toy.engine.step()
    toy.clock.now += 0.5
    first, second = toy.monitor.jobs(toy.engine, 3, toy.clock.now).jobs
    assert toy.monitor.jobs(toy.engine, 3, toy.clock.now).query == 3
    assert first == JobStatus(8, 1, True, "device", 2, 2, 1, 9, pytest.approx(1.1), 0.0, 0)
    assert second == JobStatus(7, 2, False, "device", 40, 40, 1, 9, pytest.approx(3.0), second.waiting, 1)
    assert second.waiting == pytest.approx(0.5 + 1.1)


def test_listing_tells_of_service_that_the_policy_has_not_heard_of() -> None:
    toy = Watched(policy="fcfs")
    toy.add("1", 4, 30)
    for _ in range(11):
        toy.engine.step()
    (job,) = toy.monitor.jobs(toy.engine, 1, toy.clock.now).jobs
    assert job.output_tokens == 11 and job.computed_tokens == 4 + 10
    assert job.attained == pytest.approx(1.2 + 10 * 1.05)


def test_what_the_device_waited_for_was_not_hidden() -> None:
    def record(submitted: float, completed: float, *job_ids: str, waiting: int = 0) -> IterationRecord:
        return IterationRecord(0, submitted, completed, 0.5, job_ids, (), 0, 0, waiting, 0)

    toy = Watched()
    residency = toy.engine.scheduler.residency
    toy.monitor.on_iteration(record(0.0, 1.0, "a", waiting=1))
    toy.monitor.on_iteration(record(0.5, 1.75, waiting=2))  # stands still from the end of the one before: 0.75
    toy.monitor.on_iteration(record(2.0, 2.5, waiting=2))  # what lies between is Python's
    toy.monitor.on_iteration(record(3.0, 4.0))  # nobody waits: the last slots are closed
    residency.copy_seconds = 3.0
    assert toy.status().hidden_copy_seconds == 3.0 - 1.25
    toy.monitor.on_iteration(record(4.0, 5.0, waiting=1))  # for a copy that is not done yet
    assert toy.status().hidden_copy_seconds == 1.75, "a counter never falls"
    residency.copy_seconds = 5.0
    assert toy.status().hidden_copy_seconds == 5.0 - 2.25
    assert (toy.status().iterations, toy.status().busy_seconds) == (1, 0.5)


def test_tenants_are_told_of_what_they_were_served_since_the_last_time() -> None:
    """Whoever leaves in whatever way, and what a lost engine had served is not told again."""
    toy = Watched(policy="skip-join-mlfq", max_num_seqs=2)
    served: Counter[str] = Counter()

    def tell() -> None:
        served.update({tenant.name: tenant.seconds for tenant in toy.status().tenants})

    def add(name: str, tenant: str, output: Sequence[int] = ()) -> Job:
        job = toy.add(name, 4, 6)
        toy.engine.abort(name)
        job = toy.engine.add_job(name, job.prompt, job.params, seed=0, vocab_size=61, tenant=tenant, output=output)
        toy.monitor.added(job)
        return job

    jobs = [add("0", "ann"), add("1", "bob"), add("2", "ann"), add("3", "", output=[5, 6])]
    before = jobs[3].attained
    assert before > 0 and toy.status().tenants == []
    while toy.engine.has_work:
        for job, _ in toy.engine.step():
            if job.finished:
                toy.monitor.ended(job)
        tell()
        if len(jobs[1].output) == 2 and not jobs[1].finished:
            toy.engine.abort("1")
            toy.monitor.ended(jobs[1])
    tell()
    assert jobs[1].finish_reason is FinishReason.ABORT
    assert served == pytest.approx(
        {"ann": jobs[0].attained + jobs[2].attained, "bob": jobs[1].attained, "": jobs[3].attained - before}
    )
    assert jobs[0].attained == pytest.approx(1.2 + 5 * 1.05) and not toy.monitor._told and toy.status().tenants == []


def test_the_cache_in_figures() -> None:
    toy = Watched(policy="fcfs")
    counters = toy.engine.scheduler.residency.cache_counters
    counters.queries, counters.hits, counters.evicted = 30, 20, 4
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    job = toy.engine.add_job("1", [1, 2, 3], params, seed=0, vocab_size=61, program="agent")
    job.metrics.cached_tokens = 3
    status = toy.status()
    assert (status.prefix_queries, status.prefix_hits, status.evicted_blocks, status.programs) == (30, 20, 4, 1)
    (told,) = toy.monitor.jobs(toy.engine, 1, 0.0).jobs
    assert (told.cached_tokens, told.in_cache) == (3, 0)
    while toy.engine.has_work:
        toy.engine.step()
    assert toy.status().programs == 1, "it is thinking"


def test_what_a_job_leaves_is_cache_and_counts_as_hit() -> None:
    """Eleven prompt tokens and three of output fill three blocks of four; the same prompt finds two of them."""
    toy = Watched(policy="fcfs", block_size=4, num_blocks=20, enable_prefix_caching=True)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    for name in ("1", "2"):
        job = toy.engine.add_job(name, list(range(4, 15)), params, seed=0, vocab_size=61)
        while toy.engine.has_work:
            toy.engine.step()
    status = toy.status()
    assert (status.prefix_queries, status.prefix_hits, job.metrics.cached_tokens) == (22, 8, 8)
    assert (status.device_blocks_used, status.device_blocks_cached) == (0, 3)
    assert status.prefill_tokens == 11 + 3
