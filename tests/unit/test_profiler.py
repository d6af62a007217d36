from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from toy import VOCAB, ToyExecutor

from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel, Link
from fastserve.profiler import measure, measure_link
from fastserve.types import OFFLOAD, BatchPlan, StepResult

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
    assert seconds_of(executor) < 31


def test_quick_mode_is_quick_and_close() -> None:
    config = SchedulerConfig()
    executor = ToyExecutor(config, TRUE)
    found = measure(executor, config, vocab_size=VOCAB)
    assert seconds_of(executor) < 0.65
    for rows in ([(0, 1)], [(0, 64)], [(20, 1)] * 8, [(0, 512)]):
        assert found.iteration_seconds(rows) == pytest.approx(TRUE.iteration_seconds(rows), rel=0.1)


def test_a_machine_too_slow_for_the_budget_is_measured_once() -> None:
    slow = CostModel(per_iteration=3.0, per_token=0.1)
    config = SchedulerConfig()
    found = measure(ToyExecutor(config, slow), config, vocab_size=VOCAB)
    assert found.decode_seconds(1) == pytest.approx(slow.decode_seconds(1), rel=0.05)


class Disturbed(ToyExecutor):
    """Other programs make every so many iterations three times as long."""

    def __init__(self, config: SchedulerConfig, cost: CostModel, every: int) -> None:
        super().__init__(config, cost)
        self._every = every

    def poll(self, timeout: float | None) -> StepResult | None:
        result = super().poll(timeout)
        if result is not None and result.plan_id % self._every == 0:
            result.seconds *= 3
        return result


@pytest.mark.parametrize(("full", "every"), [(False, 2), (True, 3)])
def test_a_busy_machine_is_measured_as_if_it_were_idle(full: bool, every: int) -> None:
    config = SchedulerConfig(num_blocks=512)
    found = measure(Disturbed(config, TRUE, every), config, vocab_size=VOCAB, full=full)
    for rows in ([(0, 1)], [(0, 64)], [(20, 1)] * 8):
        assert found.iteration_seconds(rows) == pytest.approx(TRUE.iteration_seconds(rows), rel=0.15)


@pytest.mark.parametrize("first", range(1, 30))
def test_a_moment_in_which_others_run_is_not_taken_for_the_machine(first: int) -> None:
    """Some iterations in a row, wherever in a quick measurement, take 20 ms longer: decodes up to six times as long."""
    quick = CostModel(per_iteration=0.004, per_token=2e-4, per_read=5e-7, per_pair=8e-8)

    class Interrupted(ToyExecutor):
        def poll(self, timeout: float | None) -> StepResult | None:
            result = super().poll(timeout)
            if result is not None and first <= result.plan_id < first + 4:
                result.seconds += 0.02
            return result

    config = SchedulerConfig(num_blocks=512)
    found = measure(Interrupted(config, quick), config, vocab_size=VOCAB)
    for rows in ([(0, 1)], [(0, 64)], [(20, 1)] * 8, [(300, 1)] * 32):
        assert found.iteration_seconds(rows) == pytest.approx(quick.iteration_seconds(rows), rel=0.2)


def test_full_mode_tells_what_a_run_takes_where_others_slow_most_of_it() -> None:
    """Two of three iterations take three times as long."""

    class Crowded(ToyExecutor):
        def poll(self, timeout: float | None) -> StepResult | None:
            result = super().poll(timeout)
            if result is not None and result.plan_id % 3:
                result.seconds *= 3
            return result

    config = SchedulerConfig(num_blocks=512)
    found = measure(Crowded(config, TRUE), config, vocab_size=VOCAB, full=True)
    assert found.decode_seconds(20) == pytest.approx(3 * TRUE.decode_seconds(20), rel=0.15)


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


def test_full_mode_measures_batches_with_a_context() -> None:
    """Where positions read by many rows cost more than those that one row reads, batches come out right."""

    class ManyReaders(ToyExecutor):
        def poll(self, timeout: float | None) -> StepResult | None:
            result = super().poll(timeout)
            rows = self.plans[result.plan_id].rows if result is not None else []
            if result is not None and len(rows) > 1:
                result.seconds += 2e-6 * int((rows[:, 1] + rows[:, 2]).sum())
            return result

    config = SchedulerConfig(num_blocks=2048)
    seen: list[list[tuple[int, int]]] = []
    found = measure(
        ManyReaders(config, TRUE),
        config,
        vocab_size=VOCAB,
        full=True,
        on_sample=lambda rows, seconds: seen.append(rows),
    )
    decodes = {(len(rows), rows[0][0] >= 128) for rows in seen if rows[0][1] == 1}
    assert {(rows, deep) for rows in (1, 2, 4, 8, 16) for deep in (False, True)} <= decodes
    truth = TRUE.iteration_seconds([(128, 1)] * 8) + 2e-6 * 8 * 129
    assert found.iteration_seconds([(128, 1)] * 8) == pytest.approx(truth, rel=0.1)


def test_full_mode_measures_prompts_beside_decodes() -> None:
    """As most iterations with a prompt are; a machine that is slower at these gets a model that is."""
    seen: list[list[tuple[int, int]]] = []

    class Mixing(ToyExecutor):
        def poll(self, timeout: float | None) -> StepResult | None:
            result = super().poll(timeout)
            counts = self.plans[result.plan_id].rows[:, 2] if result is not None else np.zeros(0)
            if result is not None and len(counts) and counts.min() < counts.max():
                result.seconds *= 2
            return result

    config = SchedulerConfig(num_blocks=512)
    found = measure(
        Mixing(config, TRUE), config, vocab_size=VOCAB, full=True, on_sample=lambda rows, seconds: seen.append(rows)
    )
    mixed = [sorted(tokens for _, tokens in rows) for rows in seen if len({tokens for _, tokens in rows}) > 1]
    assert [1, 1, 1, 1, 1, 1, 64] in mixed and [1, 1, 1, 1, 32, 32, 32, 32] in mixed
    rows = [(100, 1)] * 6 + [(0, 40)]
    assert found.iteration_seconds(rows) > 1.03 * TRUE.iteration_seconds(rows)


def test_slots_are_given_back() -> None:
    config = SchedulerConfig()
    executor = ToyExecutor(config, TRUE)
    measure(executor, config, vocab_size=VOCAB)
    measure(executor, config, vocab_size=VOCAB)  # opens the same slots again
    assert len(executor.plans[-1].rows) == 0 and len(executor.plans[-1].closed) == 1


class LinkExecutor:
    """Nothing but two pools of numbered blocks and a link between them; `noise` stretches copies, in turn."""

    def __init__(self, blocks: int, host_blocks: int, link: Link, noise: tuple[float, ...] = (1.0,)) -> None:
        self.device, self.host = np.arange(blocks), np.full(host_blocks, -1)
        self.seconds: list[float] = []
        self._link, self._noise = link, deque(noise)
        self._submitted: deque[BatchPlan] = deque()

    def submit(self, plan: BatchPlan) -> None:
        assert len(plan.rows) == 0
        self._submitted.append(plan)

    def poll(self, timeout: float | None) -> StepResult:
        plan = self._submitted.popleft()
        (copy,), (direction,) = set(plan.copies[:, 0].tolist()), set(plan.copies[:, 1].tolist())
        _, _, source, destination = plan.copies.T
        assert min(source.min(), destination.min()) >= 0
        if direction == OFFLOAD:
            self.host[destination] = self.device[source]
            seconds = self._link.offload_seconds(len(source))
        else:
            self.device[destination] = self.host[source]
            seconds = self._link.upload_seconds(len(source))
        self.seconds.append(seconds * self._noise[0])
        self._noise.rotate(-1)
        empty = BatchPlan(plan_id=0)
        return StepResult(
            plan_id=plan.plan_id, tokens=empty.tokens, logprobs=empty.bias_values, top_tokens=empty.tokens,
            top_logprobs=empty.bias_values, seconds=self.seconds[-1], copies=np.array([copy], np.int32),
            copy_seconds=np.array(self.seconds[-1:], np.float32),
        )  # fmt: skip

    @property
    def idle(self) -> bool:
        return not self._submitted


TRUE_LINK = Link(offload_block=2e-4, upload_block=3e-4, latency=5e-5)


@pytest.mark.parametrize("noise", [(1.0,), (40.0, 40.0, 40.0, 40.0, 1.0, 1.0, 1.0, 1.0, 3.0, 3.0)])
@pytest.mark.parametrize(("blocks", "host_blocks"), [(100, 100), (5, 100), (100, 2)])
def test_the_link_is_found_however_small_the_pools(blocks: int, host_blocks: int, noise: tuple[float, ...]) -> None:
    executor = LinkExecutor(blocks, host_blocks, TRUE_LINK, noise)
    found = measure_link(executor, blocks, host_blocks)
    assert found is not None
    for name in ("offload_block", "upload_block", "latency"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE_LINK, name), rel=1e-3)
    assert executor.idle
    assert executor.device.tolist() == list(range(blocks)), "the device's blocks hold what they held"
    assert sum(executor.seconds) < 0.3


@pytest.mark.parametrize("pools", [(1, 100), (100, 1)])
def test_one_block_tells_nothing_of_latency(pools: tuple[int, int]) -> None:
    found = measure_link(LinkExecutor(*pools, TRUE_LINK), *pools)
    assert found is not None and found.latency == 0
    assert found.offload_seconds(1) == pytest.approx(TRUE_LINK.offload_seconds(1), rel=1e-3)
    assert found.upload_seconds(1) == pytest.approx(TRUE_LINK.upload_seconds(1), rel=1e-3)


def test_a_link_too_slow_for_the_budget_is_measured_with_one_block() -> None:
    slow = Link(offload_block=3.0, upload_block=4.0)
    executor = LinkExecutor(9, 9, slow)
    assert measure_link(executor, 9, 9) == slow
    assert executor.seconds == [3.0, 4.0]


def test_noise_makes_no_link_free() -> None:
    found = measure_link(LinkExecutor(9, 9, TRUE_LINK, (9.0, 9.0, 0.1, 0.1)), 9, 9)
    assert found is not None
    assert 0 < found.offload_block < 9 * TRUE_LINK.offload_seconds(1)
    assert 0 < found.upload_block < 9 * TRUE_LINK.upload_seconds(1)


def test_without_a_host_pool_there_is_no_link() -> None:
    assert measure_link(LinkExecutor(9, 0, TRUE_LINK), 9, 0) is None
