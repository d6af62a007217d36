"""Recorded runs, replayed: on a clock that never stands still, with plans in flight, aborts and too little memory."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toy import EOS, VOCAB, Clock, ToyExecutor, expected_output

from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel
from fastserve.engine import Engine
from fastserve.simulator import Recorder, Recording, ReplayDiverged, SimExecutor, VirtualClock, plan_digest, replay
from fastserve.types import BatchPlan, FinishReason, Job, SamplingParams, StepResult

COST = CostModel(per_iteration=0.01, per_row=0.001, per_token=0.001, per_read=1e-5)


class Ticking(Clock):
    """Like a real one: no two readings are equal."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def __call__(self) -> float:
        self.now += self._rng.uniform(1e-6, 1e-4)
        return self.now


class Noisy(ToyExecutor):
    """The toy model, on a device that never takes as long as the cost model says; it honours the timeout."""

    rng: random.Random

    def poll(self, timeout: float | None) -> StepResult | None:
        if timeout is not None and self._results and self._results[0].seconds > timeout:
            self.clock.now += timeout
            self._results[0].seconds -= timeout
            return None
        result = super().poll(timeout)
        assert result is not None
        late = self.rng.uniform(0, 0.02)
        self.clock.now += late
        result.seconds += late
        return result


def record(
    seed: int, timeout: float | None = None, in_common: int = 0, resumed: bool = False, **options: Any
) -> tuple[Recording, SchedulerConfig]:
    """Thirty jobs that arrive in bursts, some of which are aborted, on the toy model.

    With tokens `in_common`, their prompts begin alike, and they are of tenants, salts and programs.
    `resumed`: every other one comes from an engine that is lost, in the middle of its output.
    """
    rng = random.Random(seed)
    config = SchedulerConfig(**{"max_num_seqs": 3, "max_num_batched_tokens": 16, "block_size": 4, **options})
    clock = Ticking(rng)
    device = Noisy(config, COST, clock)
    device.rng = rng
    recorder = Recorder(device, clock)
    engine = Engine(config, recorder, COST, clock=recorder.clock, on_iteration=recorder.on_iteration)
    arrival, to_come = 0.0, []
    for number in range(30):
        arrival += rng.choice([0, 0, 0.05, 0.3])
        to_come.append((arrival, number))
    aborts = {number: rng.randrange(1, 6) for number in range(0, 30, 7)}  # after so many tokens
    while to_come or engine.has_work:
        if to_come and not engine.has_work:
            clock.now = max(clock.now, to_come[0][0])
        while to_come and to_come[0][0] <= clock.now:
            when, number = to_come.pop(0)
            penalty = 0.1 * (number % 2)
            params = SamplingParams(max_tokens=rng.randrange(1, 25), temperature=1.0, presence_penalty=penalty)
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))]
            whose: dict[str, Any] = {}
            if in_common:
                prompt = [5] * in_common + prompt
                whose = {
                    "tenant": f"t{number % 2}", "cache_salt": "s" * (number % 3 == 2), "program": f"p{number % 4}"
                }  # fmt: skip
            if resumed and number % 2 == 0:
                output = expected_output(prompt, params, number % 5, config.max_model_len)
                whose |= {"output": output[: len(output) // 2], "inherited": rng.uniform(0, 0.3)}
                if whose["output"]:
                    whose |= {"waiting_since": when - rng.uniform(0, 0.6), "cached_tokens": len(prompt) // 2}
            job = engine.add_job(
                *(f"j{number}", prompt, params),
                seed=number % 5,
                vocab_size=VOCAB,
                eos_token_ids=(EOS,),
                arrival=when,
                **whose,
            )
            recorder.entered(job)
        for job, _ in engine.step(timeout):
            number = int(job.job_id[1:])
            if not job.finished and aborts.get(number) == len(job.output):
                engine.abort(job.job_id, FinishReason.STOP if number % 2 else FinishReason.ABORT)
    return recorder.recording(), config


def ended(recording: Recording) -> list[Job]:
    return [entry.job for entry in recording.entries]


@pytest.mark.parametrize("policy", ["fcfs", "mlfq", "skip-join-mlfq", "gittins"])
@pytest.mark.parametrize(("in_flight", "timeout"), [(1, None), (2, None), (2, 0.007), (3, 0.02)])
@pytest.mark.parametrize("blocks", [16, 500])
def test_a_replay_is_the_run(policy: str, in_flight: int, timeout: float | None, blocks: int) -> None:
    for seed in range(2):
        recording, config = record(
            seed,
            timeout,
            policy=policy,
            max_in_flight=in_flight,
            num_blocks=blocks,
            max_model_len=64,
            starvation_limit=0.5,
        )
        reasons = {job.finish_reason for job in ended(recording)}
        assert len(recording.iterations) > 50
        assert reasons == {FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT}
        assert blocks == 16 or policy == "fcfs" or any(job.metrics.preemptions for job in ended(recording))
        jobs = replay(recording, config, COST)
        for again, job in zip(jobs, ended(recording), strict=True):
            assert (again.output, again.finish_reason, again.metrics) == (job.output, job.finish_reason, job.metrics)


@pytest.mark.parametrize("mode", ["proactive", "reactive"])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_replay_moves_the_same_blocks(mode: str, in_flight: int) -> None:
    copies = 0
    for seed in range(6):
        recording, config = record(
            seed,
            policy="skip-join-mlfq",
            num_blocks=16,
            num_host_blocks=60,
            swap_mode=mode,
            repayment=0.0,
            max_in_flight=in_flight,
            max_model_len=64,
        )
        jobs = replay(recording, config, COST)
        assert [job.output for job in jobs] == [job.output for job in ended(recording)]
        assert [job.metrics.finish for job in jobs] == [job.metrics.finish for job in ended(recording)]
        copies += sum(len(outcome.copies) for outcome in recording.outcomes.values())
    assert copies > 10


@pytest.mark.parametrize("policy", ["skip-join-mlfq", "gittins"])
@pytest.mark.parametrize("host", [0, 60])
def test_a_replay_finds_what_the_run_found(policy: str, host: int) -> None:
    found = 0
    for seed in range(3):
        recording, config = record(
            seed, in_common=9, policy=policy, num_blocks=24, num_host_blocks=host, max_in_flight=2, max_model_len=80
        )
        jobs = replay(recording, config, COST)
        for again, job in zip(jobs, ended(recording), strict=True):
            assert (again.output, again.metrics, again.tenant) == (job.output, job.metrics, job.tenant)
        found += sum(job.metrics.cached_tokens for job in jobs)
    assert found > 100


@pytest.mark.parametrize("policy", ["skip-join-mlfq", "gittins"])
@pytest.mark.parametrize("in_common", [0, 9])
def test_a_replay_goes_on_where_a_lost_engine_had_stopped(policy: str, in_common: int) -> None:
    begun = 0
    for seed in range(4):
        recording, config = record(
            *(seed, None, in_common), resumed=True, policy=policy, num_blocks=40, max_model_len=80, starvation_limit=0.5
        )
        jobs = replay(recording, config, COST)
        for again, job in zip(jobs, ended(recording), strict=True):
            assert (again.output, again.metrics, again.inherited) == (job.output, job.metrics, job.inherited)
        begun += sum(len(entry.output) > 0 for entry in recording.entries)
    assert begun > 20


def test_another_schedule_is_noticed() -> None:
    recording, config = record(0, policy="skip-join-mlfq", num_blocks=500, max_model_len=64)
    with pytest.raises(ReplayDiverged, match="plan 1 at"):
        replay(recording, replace(config, max_num_batched_tokens=4), COST)
    with pytest.raises(ReplayDiverged):
        replay(recording, replace(config, policy="fcfs"), COST)
    late = copy.copy(recording.entries)
    late[5] = late[5]._replace(when=late[5].when + 0.2)
    with pytest.raises(ReplayDiverged, match=r"plan \d+"):
        replay(replace(recording, entries=late), config, COST)


def test_digests_tell_plans_apart() -> None:
    rows = np.array([[0, 0, 3, 1]], np.int32)
    plan = BatchPlan(plan_id=1, rows=rows, tokens=np.array([1, 2, 3], np.int32))
    same = BatchPlan(plan_id=1, rows=rows.copy(), tokens=np.array([9, 1, 2, 3], np.int32)[1:])
    assert plan_digest(plan) == plan_digest(same)
    others = [
        replace(plan, plan_id=2),
        replace(plan, rows=rows + np.int32([0, 1, 0, 0])),
        replace(plan, tokens=plan.tokens[:2]),
        replace(plan, closed=np.array([4], np.int32)),
        replace(plan, opened_seeds=np.array([4], np.uint64)),
        replace(plan, closed=plan.tokens, tokens=plan.closed),
    ]
    assert len({plan_digest(each) for each in [plan, *others]}) == 1 + len(others)


def test_a_virtual_run_can_be_replayed_too() -> None:
    config = SchedulerConfig(policy="fcfs", max_num_seqs=2, max_in_flight=1)
    clock = VirtualClock()
    executor = SimExecutor(CostModel.constant(1.0), clock)
    recorder = Recorder(executor, clock)
    engine = Engine(config, recorder, COST, clock=recorder.clock, on_iteration=recorder.on_iteration)
    for number in range(5):
        executor.expect(number, 3 + number)
        job = engine.add_job(str(number), [2], SamplingParams(), seed=number, vocab_size=9, eos_token_ids=(1,))
        recorder.entered(job)
    while engine.has_work:
        engine.step()
    assert [len(job.output) for job in replay(recorder.recording(), config, COST)] == [3, 4, 5, 6, 7]
