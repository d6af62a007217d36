"""What holds on every trace, whatever the policy, the limits, the tiers and the pipeline, in virtual time.

That tokens are those of running alone is test_invisible.py's; here it is work, waiting, memory and order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from audited import Audited, Given
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from toy import bare_job

from fastserve import swapping
from fastserve.config import ADMISSIONS, SWAP_MODES, SchedulerConfig
from fastserve.cost import CostModel, Link
from fastserve.kv import Holder, Moves, Want, plan_moves
from fastserve.policies import POLICIES
from fastserve.types import OFFLOAD, UPLOAD, FinishReason, Job

COSTS = [
    CostModel.constant(1.0),
    CostModel(per_iteration=1.0, per_row=0.05, per_token=0.2, per_read=0.01, per_pair=0.003),
    CostModel(per_iteration=0.1, per_token=0.5),
]
LINKS = [
    Link(offload_block=0.01, upload_block=0.02),
    Link(offload_block=0.5, upload_block=0.4, latency=0.3),
    Link(offload_block=6.0, upload_block=3.0),
    Link(offload_block=0.0, upload_block=0.0),
]


def givens(*, aborts: bool = True) -> st.SearchStrategy[Given]:
    times = st.integers(0, 120).map(lambda quarters: quarters / 4)
    return st.builds(
        Given,
        arrival=times,
        prompt=st.one_of(st.integers(1, 6), st.integers(1, 40)),
        output=st.one_of(st.integers(1, 4), st.integers(1, 30)),
        limited=st.booleans(),
        abort=st.one_of(st.none(), st.none(), times) if aborts else st.none(),
        priority=st.sampled_from([0, 0, 0, 1]),
    )


@dataclass(frozen=True)
class Setup:
    config: SchedulerConfig
    cost: CostModel
    link: Link
    trace: list[Given]

    def start(self) -> Audited:
        return Audited(self.config, self.cost, self.link)


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    trace = draw(st.lists(givens(), min_size=1, max_size=12))
    rows, stages = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    size = draw(st.sampled_from([1, 2, 4, 8]))
    largest = max(-(-(job.prompt + job.output + 2) // size) for job in trace)
    config = SchedulerConfig(
        policy=draw(st.sampled_from(sorted(POLICIES))),
        max_num_seqs=rows,
        max_num_batched_tokens=rows + draw(st.integers(0, 40)),
        block_size=size,
        num_blocks=largest + draw(st.sampled_from([0, 1, 4, 12, 200])),
        max_model_len=80,
        max_in_flight=draw(st.integers(1, 4 if stages == 1 else stages)),
        pipeline_parallel_size=stages,
        num_levels=draw(st.integers(1, 6)),
        starvation_limit=draw(st.sampled_from([None, 0.5, 8.0, 40.0])),
        slowdown_limit=draw(st.sampled_from([None, None, 0.5, 3.0])),
        admission=draw(st.sampled_from(ADMISSIONS)),
        num_host_blocks=draw(st.sampled_from([0, 3, 12, 200])),
        swap_mode=draw(st.sampled_from(SWAP_MODES)),
        repayment=draw(st.sampled_from([1.0, 4.0, 16.0])),
    )
    return Setup(config, draw(st.sampled_from(COSTS)), draw(st.sampled_from(LINKS)), trace)


# --- on every trace ---------------------------------------------------------------------------------------------------

seen_in_examples = {"preempted": 0, "recomputed": 0, "offloaded": 0, "uploaded": 0, "moved for the reserve": 0}


def test_on_every_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapping, "plan_moves", watched_plan_moves)
    every_trace()
    assert all(seen_in_examples.values()), f"no example did what this is about: {seen_in_examples}"


# One row, almost no room on the host: the best job has to come back, into room that another makes by starting over.
_TIGHT = SchedulerConfig(
    policy="mlfq",
    max_num_seqs=1,
    max_num_batched_tokens=1,
    block_size=2,
    num_blocks=16,
    max_model_len=80,
    num_levels=2,
    starvation_limit=None,
    slowdown_limit=0.5,
    num_host_blocks=3,
    swap_mode="reactive",
    repayment=1.0,
)
_COMES_BACK_LATE = [
    Given(2.75, 6, 10, limited=False, priority=1),
    Given(27.25, 4, 22, limited=False, priority=1),
    Given(23.5, 2, 26, abort=6.75),
    Given(28.75, 5, 12),
    Given(27.5, 13, 13, limited=False, abort=27.5),
    Given(8.75, 17, 3, limited=False),
    Given(17.75, 2, 1, limited=False),
]


@example(Setup(_TIGHT, COSTS[2], LINKS[0], _COMES_BACK_LATE))
@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(setups())
def every_trace(setup: Setup) -> None:
    run = setup.start()
    watch_movements(run)
    run.run(setup.trace)
    run.check_nothing_is_held()
    for job in run.jobs:
        everybody_gets_what_was_asked(run, job)
        work_is_conserved(run, job)
        swapping_is_waiting(run, job)
    again = setup.start()
    elsewhere_in_memory()
    again.run(setup.trace)
    assert again.auditor.digests == run.auditor.digests, "the same trace, another schedule"
    assert again.records == run.records and [j.metrics for j in again.jobs] == [j.metrics for j in run.jobs]
    seen_in_examples["preempted"] += any(job.metrics.preemptions for job in run.jobs)
    seen_in_examples["recomputed"] += any(job.metrics.recomputed_tokens for job in run.jobs)
    seen_in_examples["offloaded"] += run.auditor.copied[OFFLOAD] > 0
    seen_in_examples["uploaded"] += run.auditor.copied[UPLOAD] > 0


def watched_plan_moves(wants: Iterable[Want], victims: Iterable[Holder], **room: Any) -> Moves:
    """Nobody loses KV to a job behind it, and those of the batch, whose ENST is 0, lose none but to the batch."""
    asked, offered = [], dict[Job, Holder]()

    def asking() -> Iterator[Want]:
        for want in wants:
            asked.append(want)
            yield want

    def offering() -> Iterator[Holder]:
        for victim in victims:
            offered[victim.job] = victim
            yield victim

    moves = plan_moves(asking(), offering(), **room)
    losers = [*moves.pauses, *moves.drops, *(job for job, _ in moves.offloads)]
    for job in losers:
        if offered[job].enst <= 0.0:
            assert any(want.urgent and want.rank < offered[job].rank for want in asked), "the batch lost to the reserve"
    assert not {want.job for want in asked if want.job in moves.uploads} & set(losers)
    seen_in_examples["moved for the reserve"] += bool(losers) and not any(want.urgent for want in asked)
    return moves


def elsewhere_in_memory() -> None:
    """Have the jobs made next lie in another order in memory: what is decided must not depend on where they are."""
    holes = [bare_job(number, 1.0) for number in range(60)]
    for step in (7, 3, 1):
        del holes[::step]


def everybody_gets_what_was_asked(run: Audited, job: Job) -> None:
    wanted = job.known_output
    assert wanted is not None
    if job.finish_reason is FinishReason.ABORT:
        assert len(job.output) < wanted
        return
    assert len(job.output) == wanted
    limited = job.max_output == wanted
    assert job.finish_reason is (FinishReason.LENGTH if limited else FinishReason.STOP)
    assert job.metrics.jct is not None and job.metrics.jct > 0


def work_is_conserved(run: Audited, job: Job) -> None:
    """Every position once and no more; recomputation is known as such; service is what a stage takes alone."""
    work = run.auditor.work.get(job.seed)
    computed = work.computed if work else 0
    needed = len(job.prompt) + len(job.output) - 1
    # Plans that were in flight when the job ended unexpectedly computed a token each for nothing.
    ahead = run.config.max_in_flight - 1 if run.config.pipeline_parallel_size == 1 else 0
    if job.finish_reason is FinishReason.LENGTH:
        assert computed == needed
    elif job.finish_reason is FinishReason.STOP:
        assert needed <= computed <= needed + ahead
    else:
        assert computed <= needed + 1 + ahead
    assert job.metrics.recomputed_tokens == (work.again if work else 0)
    if job.finish_reason is FinishReason.LENGTH:
        decodes = range(len(job.prompt) + 1, needed + 1)
        alone = run.cost.prefill_seconds(0, len(job.prompt)) + sum(map(run.cost.decode_seconds, decodes))
        assert job.attained == pytest.approx(alone / run.config.pipeline_parallel_size, rel=1e-9)


def swapping_is_waiting(run: Audited, job: Job) -> None:
    """A job waits for its KV as long as copies bring it back, and for nothing else; no iteration works on it then."""
    metrics, work = job.metrics, run.auditor.work.get(job.seed)
    uploads = work.uploads if work else []
    assert metrics.queue_seconds is not None and 0.0 <= metrics.swap_seconds <= metrics.queue_seconds + 1e-9
    if job.finish_reason is FinishReason.ABORT:  # who waited to the end has not waited to the end of the copy
        return
    if run.config.max_in_flight == 1:
        assert metrics.swap_seconds == pytest.approx(sum(uploads))
    else:  # a copy may have to wait for the plan that takes it along
        assert metrics.swap_seconds >= sum(uploads) - 1e-9
        assert uploads or metrics.swap_seconds == 0.0


def watch_movements(run: Audited) -> None:
    """Have it noticed when KV that was brought back leaves before it was used."""
    blocks = run.engine.scheduler.blocks
    fresh: set[int] = set()  # brought back and not in a row since; seeds are the indices of jobs
    upload, offload = blocks.upload, blocks.offload

    def watched_upload(owner: int) -> Any:
        fresh.add(owner)
        return upload(owner)

    def watched_offload(owner: int, count: int) -> Any:
        assert owner not in fresh, "KV was brought back for nothing"
        return offload(owner, count)

    blocks.upload = watched_upload  # type: ignore[method-assign]
    blocks.offload = watched_offload  # type: ignore[method-assign]
    run.auditor.on_row = fresh.discard
