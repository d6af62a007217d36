"""Conversations and programs go back to the engine that has their beginning, while that pays."""

from __future__ import annotations

from typing import Any

import pytest
from ledger_world import PLAIN, World
from stand_in import CONTEXT, VOCAB, Options
from statuses import status

from fastserve.ipc import Ready, ToEngine
from fastserve.origin import NOBODY, Origin
from fastserve.server.affinity import PIECE, Affinity
from fastserve.server.jobs import OpenJob
from fastserve.types import SamplingParams

# Prompts are what costs: 100 tokens take 25 s, a decode about a quarter of one.
COST = {"per_iteration": 0.01, "per_token": 0.25}
INFO: dict[str, Any] = {
    "cost": COST, "max_num_seqs": 4, "enable_prefix_caching": True, "block_size": 16, "num_blocks": 100,
    "num_host_blocks": 60,
}  # fmt: skip
LONG = list(range(4, 60)) * 4  # 224 tokens: three whole pieces


class Engines:
    """A router whose engines have caches; they say nothing by themselves."""

    def __init__(self, engines: int = 2, **info: Any) -> None:
        self.world = World(Options(), engines)
        self.router = self.world.router
        self.sent: list[list[ToEngine]] = [[] for _ in range(engines)]
        self.info = {**INFO, **info}
        for number in range(engines):
            self.up(number)

    def up(self, number: int) -> None:
        self.router.engine_up(number, Ready([number], self.info, VOCAB, CONTEXT), self.sent[number].append)

    def open(self, prompt: list[int], origin: Origin = NOBODY, tokens: int = 1) -> OpenJob:
        return self.router.open(prompt, SamplingParams(max_tokens=tokens), 0, 0, origin, None)

    def idle(self) -> None:
        """All that was opened is done, and every engine says so."""
        for job in list(self.router.open_jobs.values()):
            job.finish_reason, job.output = "length", job.output or [7]
            self.router.ledgers[job.engine]._forget(job)
        for number in range(len(self.sent)):
            self.router.engine_said(number, status(live=0, backlog=0.0, modelled_seconds=0.0, busy_seconds=0.0))

    def busy(self, number: int, seconds: float) -> None:
        self.router.engine_said(number, status(live=1, backlog=seconds, modelled_seconds=0.0, busy_seconds=0.0))


def places(engines: Engines, *prompts: list[int], origin: Origin = NOBODY) -> list[int]:
    """Where prompts go that come one after the other, each when the one before is done."""
    found = []
    for prompt in prompts:
        found.append(engines.open(prompt, origin).engine)
        engines.idle()
    return found


def test_the_next_turn_goes_where_the_last_one_was() -> None:
    engines = Engines(3)
    assert places(engines, LONG, LONG[::-1], [*LONG, 5, 6], [*LONG[::-1], 8], [*LONG, 9] * 2) == [0, 1, 0, 1, 0]


def test_without_a_cache_they_take_turns() -> None:
    for without in ({"enable_prefix_caching": False}, {"num_blocks": 0, "num_host_blocks": 0}):
        assert places(Engines(2, **without), LONG, LONG, LONG, LONG) == [0, 1, 0, 1]


def test_what_is_saved_is_weighed_against_the_wait() -> None:
    """Three pieces of 64 tokens save 48 s."""
    for wait, engine in ((47.0, 0), (49.0, 1)):
        engines = Engines()
        assert places(engines, LONG) == [0]
        engines.busy(0, wait)
        assert engines.open([*LONG, 5]).engine == engine
        assert engines.router.loads[0].seconds() == pytest.approx(wait + (0 if engine else (225 - 192) * 0.25), abs=0.3)


def test_answers_to_one_prompt_do_not_wait_for_each_other() -> None:
    engines = Engines(3)
    assert [engines.open(LONG).engine for _ in range(3)] == [0, 1, 2]


def test_an_output_is_part_of_the_next_prompt() -> None:
    """Only what was put out tells the two apart: their prompts begin alike and end before the first whole piece."""
    engines = Engines()
    prompt, outputs = LONG[:40], (LONG[:30], LONG[::-1][:30])
    for output in outputs:
        job = engines.open(prompt)
        job.output = list(output)
        engines.idle()
    assert places(engines, [*prompt, *outputs[1], 4], [*prompt, *outputs[0], 4]) == [1, 0]


def test_other_tenants_and_salts_have_caches_of_their_own() -> None:
    for other in (Origin(tenant="bob"), Origin(tenant="ann", cache_salt="s")):
        engines = Engines()
        assert places(engines, LONG, origin=Origin(tenant="ann")) == [0]
        affinity = engines.router._affinity
        assert affinity.found(0, affinity.pieces(Origin(tenant="ann"), LONG)) == 3 * PIECE
        assert affinity.found(0, affinity.pieces(other, LONG)) == 0
        assert engines.open(LONG, other).engine == 1, "as the turn is"


def test_programs_stay_where_engines_are_equally_good() -> None:
    """Prompts too short for a whole piece: nothing of them is known to be anywhere."""
    for origin in (Origin(program="agent"), Origin(cache_key="docs")):
        engines = Engines(3)
        assert places(engines, [4], [4], origin=origin) == [0, 0]
        assert places(engines, [4], [4], [4]) == [1, 2, 0]
        assert places(engines, [5], origin=origin) == [0]
        engines.busy(0, 0.5)
        assert engines.open([5], origin).engine == 1


def test_an_engine_that_was_lost_has_nothing_any_more() -> None:
    engines = Engines()
    assert places(engines, LONG, LONG) == [0, 0]
    engines.router.engine_down(0, crashed=False)
    assert places(engines, LONG) == [1]
    engines.up(0)
    assert places(engines, LONG, LONG) == [1, 1]


def test_what_is_remembered_is_bounded_by_the_cache_and_forgotten_from_its_end() -> None:
    affinity = Affinity(1)
    affinity.came(0, {**INFO, "num_blocks": 12, "num_host_blocks": 8})  # 320 tokens: five pieces
    one, two = (affinity.pieces(NOBODY, prompt) for prompt in (LONG, LONG[::-1]))
    affinity.given(0, NOBODY, one)
    assert affinity.found(0, one) == 3 * PIECE
    affinity.given(0, NOBODY, two)
    assert (affinity.found(0, one), affinity.found(0, two)) == (2 * PIECE, 3 * PIECE)
    affinity.given(0, NOBODY, one[:1])
    affinity.given(0, NOBODY, affinity.pieces(NOBODY, LONG[1:]))
    assert (affinity.found(0, one), affinity.found(0, two)) == (PIECE, PIECE)


def test_homes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastserve.server.affinity._MOST_HOMES", 2)
    affinity = Affinity(2)
    origins = [Origin(program=name) for name in "abc"]
    for origin in origins:
        affinity.given(1, origin, ())
    assert [affinity.home(origin) for origin in origins] == [None, 1, 1]
    assert affinity.home(Origin(tenant="other", program="b")) is None


def test_a_prompt_is_hashed_once_for_all_its_answers() -> None:
    affinity = Affinity(1)
    affinity.came(0, INFO)
    assert affinity.pieces(NOBODY, LONG) is affinity.pieces(NOBODY, LONG)
    assert (
        affinity.pieces(Origin(tenant="ann"), LONG)
        != affinity.pieces(NOBODY, LONG)
        == affinity.pieces(NOBODY, LONG[:200])
    )


def test_a_job_that_goes_on_elsewhere_takes_along_whose_it_is() -> None:
    """From one engine to the next, and to another one."""
    origin = Origin(tenant="ann", program="agent", cache_salt="s")
    world = World(Options(), 2)
    for which in (0, 1):
        world.start(which)
    job = world.router.open([7, 8], PLAIN, 1, 0, origin, None)
    world.jobs.append(job)
    told = []
    for _ in range(2):
        world.turn(job.engine)
        engine = world.engines[job.engine]
        assert engine is not None
        told += list(engine.jobs.values())
        world.die(9, crashed=False, which=job.engine)
    world.run()
    world.check()
    assert len({add.key for add in told}) == 2 and job.submissions == 3
    assert {(add.tenant, add.program, add.cache_salt) for add in told} == {("ann", "agent", "s")}
