from __future__ import annotations

from typing import Any

import pytest
from toy import EOS, VOCAB, Clock, Toy, ToyExecutor

from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel
from fastserve.engine import Engine
from fastserve.types import BatchPlan, FinishReason, InvalidRequest, SamplingParams, StepResult


def test_an_idle_engine_does_nothing() -> None:
    toy = Toy()
    assert not toy.engine.has_work and toy.engine.step() == [] and toy.executor.plans == []


def test_each_step_is_one_iteration() -> None:
    toy = Toy()
    job = toy.add("a", 3, 2)
    assert toy.engine.step() == [(job, job.output[0])] and not job.finished
    assert list(toy.engine.jobs) == [job]
    assert toy.engine.step() == [(job, job.output[1])] and job.finished
    assert list(toy.engine.jobs) == []
    assert job.finish_reason is FinishReason.LENGTH


def on(kind: type[ToyExecutor], params: SamplingParams) -> tuple[Engine, ToyExecutor]:
    """An engine with one job on another executor."""
    config, cost, clock = SchedulerConfig(), CostModel.constant(1.0), Clock()
    executor = kind(config, cost, clock)
    engine = Engine(config, executor, cost, clock=clock)
    engine.add_job("a", [1, 2], params, seed=0, vocab_size=VOCAB)
    return engine, executor


def test_an_idle_executor_holds_nothing() -> None:
    toy = Toy()
    for name in "abc":
        toy.add(name, 3, 2)
    toy.run()
    assert not toy.executor._slots
    assert len(toy.executor.plans[-1].rows) == 0 and len(toy.records) == len(toy.executor.plans) - 1


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "prompt: must hold at least one token"),
        ({"prompt": [1, VOCAB]}, f"prompt: holds the token id {VOCAB}, and the vocabulary ends at {VOCAB - 1}"),
        ({"prompt": [-1]}, "prompt: holds the token id -1"),
        ({"prompt": [1.5]}, "prompt: must hold token ids, which are integers"),
        ({"prompt": [1] * 40}, "prompt: has 40 tokens; .* allows 39"),
        ({"prompt": [1] * 30}, "max_tokens: .* need 6 KV blocks"),
        ({"params": SamplingParams(logit_bias={VOCAB: 1.0})}, f"logit_bias: holds the token id {VOCAB}"),
        ({"params": SamplingParams(stop_token_ids=[99])}, "stop_token_ids: holds the token id 99"),
        (
            {"params": SamplingParams(min_tokens=1, stop_token_ids=range(VOCAB))},
            f"min_tokens: must be 0 when every one of the {VOCAB} tokens stops the output",
        ),
        (
            {
                "params": SamplingParams(min_tokens=1, stop_token_ids=range(1, VOCAB)),
                "eos_token_ids": (0, VOCAB + 5),
            },
            "min_tokens: must be 0 when",
        ),
        ({"seed": 2**64}, "seed: must be between 0 and"),
        ({"job_id": "fine"}, "job_id: 'fine' is in use"),
    ],
)
def test_bad_input_is_named_and_leaves_the_others_alone(change: dict[str, Any], message: str) -> None:
    toy = Toy(max_model_len=40, num_blocks=5, block_size=8, max_num_batched_tokens=32)
    fine = toy.add("fine", 5, 9)
    toy.engine.step()
    config = {"max_model_len": 40, "num_blocks": 5, "block_size": 8}
    if "need" in message:  # a context the pool cannot hold
        toy = Toy(**{**config, "max_model_len": 100})
        fine = toy.add("fine", 5, 9)
    asked = {"job_id": "bad", "prompt": [1, 2], "params": SamplingParams(), "seed": 0, "vocab_size": VOCAB, **change}
    with pytest.raises(InvalidRequest, match=message) as caught:
        toy.engine.add_job(**asked)
    assert caught.value.field == message.split(":")[0]
    assert list(toy.engine.jobs) == [fine]
    toy.run()
    assert fine.output == toy.expected(fine)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="policy: must be one of"):
        Toy(policy="random")


def test_an_id_is_free_again_once_its_job_has_finished() -> None:
    toy = Toy(max_in_flight=2)
    toy.add("a", 3)
    toy.engine.step()
    toy.engine.abort("a")  # with a plan in flight
    again = toy.add("a", 4)
    toy.run()
    assert again.output == toy.expected(again)


# --- how a job ends ---------------------------------------------------------------------------------------------------


def first_at(toy: Toy, prompt: list[int]) -> list[int]:
    job = toy.add("probe", prompt, 12)
    toy.run()
    return job.output


def test_a_stop_token_ends_the_job_and_is_part_of_its_output() -> None:
    output = first_at(Toy(), [5, 6])
    toy = Toy()
    stopped = toy.add("a", [5, 6], 12, stop_token_ids=[output[4]])
    toy.run()
    assert stopped.output == output[: output.index(output[4]) + 1]
    assert stopped.finish_reason is FinishReason.STOP


def test_end_of_sequence_ends_a_job_unless_it_is_ignored() -> None:
    toy = Toy()
    jobs = {ignored: toy.add(str(ignored), [5, 6], 200, ignore_eos=ignored) for ignored in (False, True)}
    toy.run()
    assert jobs[False].output[-1] == EOS and jobs[False].finish_reason is FinishReason.STOP
    assert EOS in jobs[True].output[:-1] and len(jobs[True].output) == 200


class Stubborn(ToyExecutor):
    """Samples the same token every time, masked or not."""

    def poll(self, timeout: float | None) -> StepResult | None:
        result = super().poll(timeout)
        if result is not None:
            result.tokens[:] = 20
        return result


def test_a_stop_token_before_min_tokens_ends_nothing() -> None:
    """The runtime masks stop tokens until then; the engine does not rely on it."""
    engine, _ = on(Stubborn, SamplingParams(max_tokens=9, min_tokens=3, stop_token_ids=[20]))
    (job,) = engine.jobs
    while engine.has_work:
        engine.step()
    assert (job.output, job.finish_reason) == ([20] * 4, FinishReason.STOP)


def test_the_context_ends_a_job() -> None:
    toy = Toy(max_model_len=10)
    jobs = [toy.add("all", 4, None), toy.add("more", 4, 100)]
    toy.run()
    assert [(len(job.output), job.finish_reason) for job in jobs] == [(6, FinishReason.LENGTH)] * 2


@pytest.mark.parametrize("max_in_flight", [1, 2, 4])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_job_whose_token_cannot_be_sampled_ends_alone(max_in_flight: int, after: int) -> None:
    toy = Toy(max_in_flight=max_in_flight)
    fails, *others = (toy.add(name, 3, 8, seed=seed) for seed, name in enumerate("abc"))
    while len(fails.output) < after:
        toy.engine.step()
    toy.executor.failing[fails.seed] = "logits are not finite"
    news: list[int | None] = []
    while toy.engine.has_work:
        updates = dict(toy.engine.step())
        toy.engine.check_integrity()
        if fails in updates:
            news.append(updates[fails])
            assert fails.finished == (news[-1] is None)
    assert news[-1] is None and news.count(None) == 1  # heard of once, though its successors fail as well
    assert (fails.finish_reason, fails.error) == (FinishReason.ERROR, "logits are not finite")
    assert fails.output == toy.expected(fails)[: len(fails.output)]
    assert fails.metrics.finish is not None
    for job in others:
        assert (job.output, job.finish_reason, job.error) == (toy.expected(job), FinishReason.LENGTH, None)
    assert toy.engine.scheduler.blocks.free_blocks == toy.config.num_blocks


def test_min_tokens_is_fine_while_one_token_stops_nothing() -> None:
    toy = Toy()
    job = toy.add("a", 3, 4, min_tokens=2, stop_token_ids=range(1, VOCAB))
    toy.run()
    assert job.output == toy.expected(job) and job.output[:2] == [0, 0]


@pytest.mark.parametrize("steps", range(5))
@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_abort_is_safe_in_every_state(steps: int, max_in_flight: int) -> None:
    """Waiting, in prefill, in decode, with plans in flight or not, robbed of its blocks, finished."""
    toy = Toy(
        policy="fcfs", max_num_seqs=2, max_num_batched_tokens=6, num_blocks=6, block_size=4, max_in_flight=max_in_flight
    )
    jobs = [toy.add(name, 8, 6) for name in "abc"]
    for _ in range(2**steps):
        toy.engine.step()
    states = [job.finished for job in jobs]
    for job, finished in zip(jobs[1:], states[1:], strict=True):
        assert toy.engine.abort(job.job_id) == (not finished)
        assert not toy.engine.abort(job.job_id)
        toy.engine.check_integrity()
        assert finished or job.finish_reason is FinishReason.ABORT
    assert not toy.engine.abort("nobody")
    toy.run()
    assert jobs[0].output == toy.expected(jobs[0])
    for job in jobs:
        assert job.output == toy.expected(job)[: len(job.output)]


def test_a_stop_string_ends_a_job_from_outside() -> None:
    toy = Toy()
    job = toy.add("a", 3, 9)
    toy.engine.step()
    assert toy.engine.abort("a", FinishReason.STOP)
    assert job.finish_reason is FinishReason.STOP and job.metrics.finish == 1.0 and len(job.output) == 1
    toy.run()


# --- what is told of it -----------------------------------------------------------------------------------------------


def test_metrics_of_a_job_worked_by_hand() -> None:
    """Each iteration takes a second, and so does a prefill, in however many chunks. The first of two spends level 0's
    1 s and the second nothing of level 1's 2 s, before a short job comes in level 0; its prefill takes it to level 1,
    behind the long one, which has two decodes there."""
    toy = Toy(policy="mlfq", max_num_seqs=1, max_num_batched_tokens=4, starvation_limit=None)
    toy.clock.now = 10.0
    long = toy.add("long", 8, 3)
    toy.engine.step()
    toy.clock.now += 0.5  # nothing runs
    toy.engine.step()
    short = toy.add("short", 1, 2)
    toy.run()
    assert toy.ran == "long long short long long short"
    metrics = long.metrics
    assert (metrics.arrival, metrics.first_scheduled, metrics.first_token, metrics.finish) == (10, 10, 12.5, 15.5)
    assert (metrics.jct, metrics.ttft, metrics.preemptions) == (5.5, 2.5, 1)
    assert (metrics.prefill_seconds, metrics.decode_seconds, metrics.queue_seconds) == (2, 2, 1.5)
    assert (short.metrics.arrival, short.metrics.jct, short.metrics.queue_seconds) == (12.5, 4, 2)


def test_overlapping_plans_count_no_second_twice() -> None:
    toy = Toy(max_in_flight=2)
    job = toy.add("a", 3, 6)
    toy.run()
    assert job.metrics.prefill_seconds + job.metrics.decode_seconds == job.metrics.jct == 6.0


def test_arrival_can_be_earlier_than_the_call() -> None:
    toy = Toy()
    toy.clock.now = 5.0
    job = toy.engine.add_job("a", [1], SamplingParams(max_tokens=1), seed=0, vocab_size=VOCAB, arrival=3.0)
    toy.run()
    assert job.metrics.jct == 3.0


def test_every_iteration_is_recorded() -> None:
    toy = Toy(policy="fcfs", max_num_seqs=2, max_num_batched_tokens=8, block_size=4, num_blocks=8)
    for name in "abc":
        toy.add(name, 6, 2)
    toy.run()
    first, second = toy.records[:2]
    assert (first.job_ids, first.prefill_tokens, first.decode_tokens, first.waiting) == (("a", "b"), 8, 0, 1)
    assert (first.submitted, first.completed, first.seconds, first.levels) == (0.0, 1.0, 1.0, (0, 0))
    assert first.free_blocks == 8 - 2 - 2  # a prompt has all its blocks from the start
    assert (second.job_ids, second.prefill_tokens, second.decode_tokens) == (("a", "b"), 4, 1)
    assert [record.plan_id for record in toy.records] == list(range(1, len(toy.records) + 1))


def test_logprobs_come_with_the_alternatives_asked_for() -> None:
    toy = Toy()
    jobs = [toy.add(str(count), 3, 2, logprobs=count) for count in (None, 0, 2)]
    toy.run()
    assert jobs[0].logprobs == []
    assert [entry.top for entry in jobs[1].logprobs] == [[], []]
    for entry, token in zip(jobs[2].logprobs, jobs[2].output, strict=True):
        assert (entry.token, entry.logprob) == (token, -float(token))
        assert entry.top == [(t % VOCAB, -float(t % VOCAB)) for t in (token, token + 1)]


# --- the executor -----------------------------------------------------------------------------------------------------


class Slow(ToyExecutor):
    """Has its result ready only when asked a second time."""

    asked: list[float | None]

    def poll(self, timeout: float | None) -> StepResult | None:
        self.asked = [*getattr(self, "asked", []), timeout]
        return super().poll(timeout) if len(self.asked) % 2 == 0 else None


class Broken(ToyExecutor):
    def submit(self, plan: BatchPlan) -> None:
        raise OSError("the device is gone")


def test_a_step_that_times_out_changes_nothing() -> None:
    engine, executor = on(Slow, SamplingParams(max_tokens=1))
    assert engine.step(timeout=0.25) == [] and engine.has_work
    assert [job.finished for job, _ in engine.step()] == [True]
    assert isinstance(executor, Slow) and executor.asked[:2] == [0.25, None]
    assert [len(plan.rows) for plan in executor.plans] == [1, 0]


def test_what_the_executor_raises_gets_through() -> None:
    with pytest.raises(OSError, match="the device is gone"):
        on(Broken, SamplingParams())[0].step()
