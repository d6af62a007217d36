"""A worker whose loop the test goes through: its heartbeat, who it says is running, and what it tells of its jobs."""

from __future__ import annotations

from typing import Any

import pytest
import toy_llm
from lone_worker import add, alone, turn
from toy import EOS
from toy_llm import ToyWorld

from fastserve.ipc import Abort, Status, Step
from fastserve.types import StepResult


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    return toy_llm.enter(monkeypatch)


def test_an_idle_engine_sleeps_between_its_heartbeats(world: ToyWorld) -> None:
    it, socket = alone(world)
    for _ in range(10):
        turn(it)
    assert socket.beats == 10 and socket.waits == [0] + [1000] * 9


def test_a_working_engine_tells_of_itself_four_times_a_second(world: ToyWorld) -> None:
    it, socket = alone(world)
    it._add(add(1, [1], max_tokens=200))
    runtime = world.runtimes[-1]
    poll = runtime.poll

    def quick(timeout: float | None) -> StepResult | None:
        result = poll(timeout)
        assert result is not None
        world.clock.now += 0.02 - result.seconds
        return result

    runtime.poll = quick  # type: ignore[method-assign]
    start = world.clock.now
    while it._engine.has_work:
        turn(it)
    assert abs(socket.beats - (world.clock.now - start) / 0.25) <= 2
    assert socket.waits == []


def test_an_engine_that_hangs_is_silent(world: ToyWorld) -> None:
    it, socket = alone(world)
    turn(it)
    it._add(add(1, [1], max_tokens=9))
    turn(it)
    turn(it)
    runtime, before = world.runtimes[-1], socket.beats
    poll = runtime.poll

    def hang(timeout: float | None) -> StepResult | None:
        assert timeout is not None, "nothing would be heard any more"
        world.clock.now += timeout
        return None

    runtime.poll = hang  # type: ignore[method-assign]
    for _ in range(20):
        turn(it)
    assert socket.beats == before
    runtime.poll = poll  # type: ignore[method-assign]
    turn(it)
    assert socket.beats == before + 1


def test_eos_is_the_models(world: ToyWorld) -> None:
    it, _ = alone(world)
    it._add(add(1, [1], ignore_eos=False))
    assert {EOS} == next(iter(it._engine.jobs)).stop_tokens


def test_whose_a_job_is_and_what_its_tenant_was_served(world: ToyWorld) -> None:
    """Those that are aborted have been served, too."""
    it, socket = alone(world)
    messages = [add(1, [1, 2], max_tokens=200), add(2, [3], max_tokens=200), add(3, [4], [5], max_tokens=200)]
    for message, tenant in zip(messages, ("ann", "bob", ""), strict=True):
        message.tenant, message.program, message.cache_salt, message.inherited = tenant, "agent", "s", 7.0
        it._add(message)
    jobs = list(it._engine.jobs)
    assert [(job.tenant, job.program, job.cache_salt) for job in jobs] == [
        ("ann", "agent", "s"), ("bob", "agent", "s"), ("", "agent", "s")
    ]  # fmt: skip
    assert [job.inherited for job in jobs] == [7.0] * 3
    before = jobs[2].attained
    for _ in range(3):
        turn(it)
    it._step()  # of which no heartbeat has told
    it._abort(Abort([2], False))
    told: dict[str, float] = {}
    last = it._monitor.status(it._engine, world.clock.now)
    for status in (*(message for message in socket.sent if isinstance(message, Status)), last):
        for tenant in status.tenants:
            told[tenant.name] = told.get(tenant.name, 0.0) + tenant.seconds
    attained = {job: it._engine.scheduler.progress(job)[1] for job in (jobs[0], jobs[2])}
    assert told["ann"] == pytest.approx(attained[jobs[0]]) and told[""] == pytest.approx(attained[jobs[2]] - before)
    assert told["bob"] == pytest.approx(jobs[1].attained) and jobs[1].attained > 0


@pytest.mark.parametrize(
    ("plans", "expected_sets"),
    [(1, [{1, 2}, {3}, set()]), (2, [{1, 2}, {1, 2, 3}, {3}, set()])],  # two plans under way: those of both
)
def test_who_is_running_is_told_before_it_runs_and_when_it_changes(
    world: ToyWorld, plans: int, expected_sets: list[set[int]]
) -> None:
    it, socket = alone(world, max_num_seqs=2, policy="fcfs", max_in_flight=plans)
    runtime = world.runtimes[-1]
    submit = runtime.submit
    told: list[set[int]] = []

    def check(plan: Any) -> None:
        told[:] = [set(m.running) for m in socket.sent if isinstance(m, Step) and m.running is not None]
        in_it = {int(job.job_id) for job in it._engine.scheduler.in_flight[-1].jobs}
        assert in_it <= (told[-1] if told else set()), "it might take the engine down"
        submit(plan)

    runtime.submit = check  # type: ignore[method-assign]
    for key in (1, 2, 3):
        it._add(add(key, [key], max_tokens=4))
    while it._engine.has_work:
        turn(it)
    assert told == expected_sets
