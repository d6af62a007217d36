from __future__ import annotations

import pytest
from toy import VOCAB, ToyExecutor

from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel
from fastserve.profiler import measure
from fastserve.types import StepResult

TRUE = CostModel(per_iteration=0.01, per_row=2e-4, per_token=1e-3, per_read=1e-6, per_pair=2e-8)


def seconds_of(executor: ToyExecutor) -> float:
    return sum(
        TRUE.iteration_seconds([(start, count) for _, start, count, _ in plan.rows.tolist()]) for plan in executor.plans
    )


def test_full_mode_recovers_the_model_of_the_machine() -> None:
    config = SchedulerConfig(num_blocks=512)
    executor = ToyExecutor(config, TRUE)
    shapes: list[list[tuple[int, int]]] = []
    found = measure(
        executor, config, vocab_size=VOCAB, full=True, model="m", device="d", version="v",
        on_sample=lambda rows, seconds: shapes.append(rows),
    )  # fmt: skip
    assert found.belongs_to(model="m", device="d", version="v")
    for rows in ([(0, 1)], [(1500, 1)], [(0, 512)], [(1000, 300)], [(100, 1)] * 32, [(50, 100), (900, 1), (3, 1)]):
        assert found.iteration_seconds(rows) == pytest.approx(TRUE.iteration_seconds(rows), rel=1e-3)
    assert max(start + count for rows in shapes for start, count in rows) > 2000
    assert seconds_of(executor) < 21


def test_quick_mode_is_quick_and_close() -> None:
    config = SchedulerConfig()
    executor = ToyExecutor(config, TRUE)
    found = measure(executor, config, vocab_size=VOCAB)
    assert seconds_of(executor) < 0.45
    for rows in ([(0, 1)], [(0, 64)], [(20, 1)] * 8, [(0, 512)]):
        assert found.iteration_seconds(rows) == pytest.approx(TRUE.iteration_seconds(rows), rel=0.1)


def test_a_machine_too_slow_for_the_budget_is_measured_once() -> None:
    slow = CostModel(per_iteration=3.0, per_token=0.1)
    config = SchedulerConfig()
    found = measure(ToyExecutor(config, slow), config, vocab_size=VOCAB)
    assert found.decode_seconds(1) == pytest.approx(slow.decode_seconds(1), rel=0.05)


class Disturbed(ToyExecutor):
    """Other programs make every other iteration three times as long."""

    def poll(self, timeout: float | None) -> StepResult | None:
        result = super().poll(timeout)
        if result is not None and result.plan_id % 2:
            result.seconds *= 3
        return result


@pytest.mark.parametrize("full", [False, True])
def test_a_busy_machine_is_measured_as_if_it_were_idle(full: bool) -> None:
    config = SchedulerConfig(num_blocks=512)
    found = measure(Disturbed(config, TRUE), config, vocab_size=VOCAB, full=full)
    for rows in ([(0, 1)], [(0, 64)], [(20, 1)] * 8):
        assert found.iteration_seconds(rows) == pytest.approx(TRUE.iteration_seconds(rows), rel=0.15)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1, "max_num_batched_tokens": 1},
        {"num_blocks": 1, "block_size": 4},
        {"max_model_len": 2},
        {"max_num_seqs": 64, "max_num_batched_tokens": 64, "num_blocks": 70, "block_size": 1},
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_measuring_stays_within_the_limits(options: dict[str, int], full: bool) -> None:
    config = SchedulerConfig(**{"max_num_seqs": 4, **options})  # type: ignore[arg-type]
    executor = ToyExecutor(config, TRUE)  # checks every plan against the limits
    assert measure(executor, config, vocab_size=VOCAB, full=full).decode_seconds(1) > 0


def test_slots_are_given_back() -> None:
    config = SchedulerConfig()
    executor = ToyExecutor(config, TRUE)
    measure(executor, config, vocab_size=VOCAB)
    measure(executor, config, vocab_size=VOCAB)  # opens the same slots again
    assert len(executor.plans[-1].rows) == 0 and len(executor.plans[-1].closed) == 1
