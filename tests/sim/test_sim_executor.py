"""The simulated device and its copy streams, on timelines worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fastserve.cost import CostModel, Link
from fastserve.simulator import SimExecutor, VirtualClock
from fastserve.types import OFFLOAD, UPLOAD, BatchPlan, InvalidRequest, StepResult

# A copy of n blocks takes 1 + 2n seconds out and 0.5n in.
LINK = Link(offload_block=2.0, upload_block=0.5)
SLOW_START = Link(offload_block=2.0, upload_block=0.5, latency=1.0)


def device(seconds: float = 10.0, link: Link | None = LINK, stages: int = 1) -> tuple[SimExecutor, VirtualClock]:
    clock = VirtualClock()
    return SimExecutor(CostModel.constant(seconds), clock, link=link, stages=stages), clock


def plan(plan_id: int, *rows: tuple[int, int, int, int], copies: tuple[tuple[int, int, int], ...] = ()) -> BatchPlan:
    """`copies` are (copy, direction, blocks)."""
    moved = [(copy, direction, block, block) for copy, direction, blocks in copies for block in range(blocks)]
    return BatchPlan(
        plan_id=plan_id,
        rows=np.array(rows, np.int32).reshape(-1, 4),
        tokens=np.zeros(sum(row[2] for row in rows), np.int32),
        copies=np.array(moved, np.int32).reshape(-1, 4),
    )


ROW = (0, 0, 1, 1)


def taken(executor: SimExecutor) -> StepResult:
    result = executor.poll(None)
    assert result is not None
    return result


def acknowledged(executor: SimExecutor) -> list[tuple[int, float]]:
    result = taken(executor)
    return list(zip(result.copies.tolist(), result.copy_seconds.tolist(), strict=True))


# --- copies -----------------------------------------------------------------------------------------------------------


def test_copies_run_beside_the_iteration_and_are_acknowledged_at_its_end() -> None:
    executor, clock = device()
    # out: 1 at 0–4, 2 at 4–10; in: 3 at 0–1
    executor.submit(plan(1, ROW, copies=((1, OFFLOAD, 2), (2, OFFLOAD, 3), (3, UPLOAD, 2))))
    assert acknowledged(executor) == [(3, 1.0), (1, 4.0), (2, 6.0)]
    assert clock.now == 10.0
    out, back = executor.copies
    assert (out.copies, out.blocks, out.seconds) == (2, 5, 10.0)
    assert (back.copies, back.blocks, back.seconds) == (1, 2, 1.0)


def test_a_copy_that_is_late_is_acknowledged_later() -> None:
    executor, clock = device(link=SLOW_START)
    executor.submit(plan(1, ROW, copies=((1, OFFLOAD, 2), (2, OFFLOAD, 3))))  # 0–5, 5–12
    assert acknowledged(executor) == [(1, 5.0)]
    executor.submit(plan(2, ROW, copies=((3, OFFLOAD, 5),)))  # 12–23: behind the one under way
    assert acknowledged(executor) == [(2, 7.0)]
    executor.submit(plan(3, ROW, copies=((4, UPLOAD, 2),)))  # 20–22
    assert acknowledged(executor) == [(4, 2.0), (3, 11.0)]
    assert clock.now == 30.0


def test_copies_start_when_the_plan_is_submitted_not_when_it_runs() -> None:
    executor, _ = device()
    executor.submit(plan(1, ROW))
    executor.submit(plan(2, ROW, copies=((1, UPLOAD, 4),)))  # 0–2, while the first plan runs
    assert acknowledged(executor) == [(1, 2.0)]
    assert acknowledged(executor) == []


def test_a_plan_without_rows_ends_with_the_next_copy() -> None:
    executor, clock = device()
    executor.submit(plan(1, copies=((1, OFFLOAD, 1), (2, OFFLOAD, 1), (3, UPLOAD, 5))))  # 0–2, 2–4; 0–2.5
    assert acknowledged(executor) == [(1, 2.0)]
    assert clock.now == 2.0
    executor.submit(plan(2))
    assert acknowledged(executor) == [(3, 2.5)]
    executor.submit(plan(3, copies=((4, UPLOAD, 1),)))  # 2.5–3
    assert acknowledged(executor) == [(4, 0.5)]
    executor.submit(plan(4))
    assert acknowledged(executor) == [(2, 2.0)]
    assert clock.now == 4.0
    executor.submit(plan(5))
    assert acknowledged(executor) == []
    assert clock.now == 4.0
    assert executor.iterations == 0


def test_a_copy_that_finished_while_nobody_looked_ends_a_plan_without_rows_at_once() -> None:
    executor, clock = device()
    executor.submit(plan(1, copies=((1, UPLOAD, 2), (2, OFFLOAD, 4))))  # 0–1, 0–8
    assert acknowledged(executor) == [(1, 1.0)]
    clock.advance_to(9.0)
    executor.submit(plan(2))
    assert acknowledged(executor) == [(2, 8.0)]
    assert clock.now == 9.0


def test_a_plan_without_rows_waits_its_turn() -> None:
    executor, clock = device()
    executor.submit(plan(1, ROW))
    executor.submit(plan(2, copies=((1, OFFLOAD, 6), (2, UPLOAD, 2))))  # 0–12; 0–1, with the first plan's result
    assert acknowledged(executor) == [(2, 1.0)]
    assert acknowledged(executor) == [(1, 12.0)]
    assert clock.now == 12.0


def test_copies_need_a_link() -> None:
    executor, _ = device(link=None)
    with pytest.raises(InvalidRequest, match="link: is needed"):
        executor.submit(plan(1, copies=((1, UPLOAD, 1),)))


# --- plans ------------------------------------------------------------------------------------------------------------


def test_poll_waits_no_longer_than_it_is_told() -> None:
    executor, clock = device()
    executor.submit(plan(1, ROW))
    assert executor.poll(4.0) is None
    assert clock.now == 4.0
    executor.submit(plan(2, ROW))
    assert executor.poll(0.0) is None
    assert executor.poll(5.5) is None
    assert (taken(executor).plan_id, clock.now) == (1, 10.0)
    assert (taken(executor).plan_id, clock.now) == (2, 20.0)
    with pytest.raises(RuntimeError, match="nothing was submitted"):
        executor.poll(None)


def test_idle_time_is_what_lies_between_iterations() -> None:
    executor, clock = device()
    executor.skip_to(100.0)  # nobody had work
    executor.submit(plan(1, ROW))
    taken(executor)
    executor.submit(plan(2, copies=((1, OFFLOAD, 1),)))
    taken(executor)
    executor.submit(plan(3, ROW))
    taken(executor)
    assert clock.now == 122.0
    assert (executor.busy_seconds, executor.idle_seconds, executor.iterations) == (20.0, 2.0, 2)


def opened(*slots: tuple[int, int, int]) -> BatchPlan:
    """(slot, prompt length, seed)"""
    rows = [(slot, prompt, 0, 0, -1, 0, 0, 0) for slot, prompt, _ in slots]
    seeds = np.array([seed for *_, seed in slots], np.uint64)
    return BatchPlan(plan_id=0, opened=np.array(rows, np.int32).reshape(-1, 8), opened_seeds=seeds)


def test_the_last_token_is_end_of_sequence() -> None:
    executor, _ = device(1.0)
    executor.expect(70, 3)
    executor.expect(71, 1)
    executor.expect(72, None)
    executor.submit(opened((2, 10, 70), (0, 4, 71), (1000, 4, 72)))
    taken(executor)
    # Whole prompts sample the first token; a row without logits samples nothing.
    executor.submit(plan(1, (2, 0, 9, 0), (0, 0, 4, 1), (1000, 0, 4, 1)))
    result = taken(executor)
    assert result.tokens.tolist() == [1, 0]
    assert np.isnan(result.logprobs).tolist() == [True, True]
    assert result.top_tokens.shape == result.top_logprobs.shape == (2, 0)
    executor.submit(plan(2, (2, 9, 1, 1), (1000, 4, 1, 1)))
    assert taken(executor).tokens.tolist() == [0, 0]
    executor.submit(plan(3, (2, 10, 1, 1)))
    executor.submit(plan(4, (2, 11, 1, 1)))  # queued before the one ahead has returned
    assert [taken(executor).tokens.tolist() for _ in range(2)] == [[0], [1]]
    assert (executor.prefill_tokens, executor.decode_tokens, executor.rows) == (9 + 4 + 4 + 1, 3, 7)
    # Opened again in another slot, the prompt and two tokens of output are computed again.
    executor.submit(opened((5, 10, 70)))
    taken(executor)
    executor.submit(plan(5, (5, 0, 12, 1)))
    assert taken(executor).tokens.tolist() == [1]
    executor.forget(70)
    executor.submit(opened((5, 10, 70)))
    taken(executor)
    executor.submit(plan(6, (5, 0, 12, 1)))
    assert taken(executor).tokens.tolist() == [0]


def test_more_rows_than_ever_before() -> None:
    executor, _ = device()
    executor.submit(plan(1, *((slot % 60, 0, 1, 1) for slot in range(1000))))
    result = taken(executor)
    assert len(result.tokens) == len(result.logprobs) == len(result.top_tokens) == len(result.top_logprobs) == 1000


# --- pipelines --------------------------------------------------------------------------------------------------------


def decode(slot: int) -> BatchPlan:
    """A row that reads the token its slot sampled last."""
    made = plan(slot, (slot, 5, 1, 1))
    made.tokens[0] = -1
    return made


def test_stages_hold_one_plan_each() -> None:
    executor, clock = device(9.0, stages=3)
    for slot in range(3):
        executor.submit(decode(slot))
    ends = []
    for slot in range(3, 8):
        taken(executor)
        ends.append(clock.now)
        executor.submit(decode(slot))
    assert ends == [9.0, 12.0, 15.0, 18.0, 21.0]
    assert executor.busy_seconds == 21.0
    assert executor.idle_seconds == 0.0


def test_a_row_waits_for_the_token_it_reads() -> None:
    executor, clock = device(9.0, stages=3)
    executor.submit(decode(0))  # 0–9
    executor.submit(decode(1))  # 3–12
    executor.submit(decode(0))  # from 9
    executor.submit(decode(2))  # from 12: plans keep their order
    ends = []
    for _ in range(4):
        taken(executor)
        ends.append(clock.now)
    assert ends == [9.0, 12.0, 18.0, 21.0]


def test_a_plan_that_is_slow_holds_up_the_next() -> None:
    clock = VirtualClock()
    executor = SimExecutor(CostModel(per_iteration=0, per_token=1.0), clock, stages=2)
    executor.submit(plan(1, (0, 0, 8, 0)))  # 0–4–8
    executor.submit(plan(2, (1, 0, 2, 1)))  # 4–5, then 8–9
    executor.submit(plan(3, (0, 8, 4, 1)))  # 5–7, then 9–11
    ends = []
    for _ in range(3):
        taken(executor)
        ends.append(clock.now)
    assert ends == [8.0, 9.0, 11.0]
