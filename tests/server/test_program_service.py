"""What a program's calls were served is known to its next one, whatever engine had them and is still there."""

from __future__ import annotations

import pytest
from ledger_world import World, to_engine
from stand_in import Options

from fastserve.ipc import Add, Step, Update
from fastserve.origin import Origin
from fastserve.server import program_service
from fastserve.server.jobs import OpenJob
from fastserve.types import JobMetrics, SamplingParams

ONE = SamplingParams(max_tokens=1)


def call(world: World, program: str | None = "p", tenant: str = "t") -> OpenJob:
    return world.router.open([7, 8], ONE, 1, 0, Origin(tenant=tenant, program=program), None)


def told(world: World, engine: int = 0) -> list[float]:
    """What the latest Adds to an engine say was served before."""
    messages = [to_engine.decode(each) for each in world.inboxes[engine]]
    return [each.inherited for each in messages if isinstance(each, Add)]


def end(world: World, job: OpenJob, seconds: float) -> None:
    assert job.ticket is not None
    metrics = JobMetrics(0.0, finish=1.0, service_seconds=seconds)
    step = Step([Update(job.ticket, 5, None, "length", None, metrics)], [])
    world.router.engine_said(job.engine, step)


def test_the_next_call_knows_and_others_do_not() -> None:
    world = World(Options())
    world.start()
    for seconds in (2.0, 3.0):
        end(world, call(world), seconds)
    for origin in (("p", "t"), ("q", "t"), ("p", "another"), (None, "t")):
        call(world, *origin)
    assert told(world) == [0.0, 2.0, 5.0, 0.0, 0.0, 0.0]


def test_it_outlasts_an_engine_and_goes_to_the_others() -> None:
    world = World(Options(), engines=2)
    world.start(0)
    end(world, call(world), 2.0)
    job = call(world)
    assert job.engine == 0
    world.start(1)
    world.router.engine_fails(0, "it does not start any more")
    world.router.engine_down(0)
    assert told(world, 1) == [2.0]


def test_a_call_that_nobody_waited_for_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_service, "_MOST", 2)
    world = World(Options())
    world.start()
    world.router.close(call(world))
    for program in "abc":
        end(world, call(world, program), 1.0)
    assert [call(world, program).inherited for program in "pabc"] == [0.0, 0.0, 1.0, 1.0]
