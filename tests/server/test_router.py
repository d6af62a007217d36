"""Several engines: each job is one's, goes on in another when that is sooner, and harms one of them at most."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis.stateful import rule
from ledger_world import HOW_OFTEN, NO_START, PLAIN, AnyOrder, World, _which
from stand_in import CONTEXT, VOCAB, Options
from statuses import status

from fastserve.cost import CostModel
from fastserve.ipc import Ready, ToEngine
from fastserve.origin import NOBODY
from fastserve.server.jobs import OpenJob
from fastserve.server.router import Router
from fastserve.types import SamplingParams

COST = {"per_iteration": 1.0, "per_token": 0.25}


# --- any order --------------------------------------------------------------------------------------------------------


class Several(AnyOrder):
    """Three engines, and one may be given up for good."""

    engines = 3

    @rule(which=_which)
    def fail(self, which: int) -> None:
        if self._up(which) is None:
            self.world.fail(which % self.engines)


class SeveralPoison(Several):
    poison = {"1": 0, "2": 5}  # noqa: RUF012


class SeveralSilentPoison(SeveralPoison):
    silent_death = True


class SeveralKillers(SeveralPoison):
    killed_by_poison = True


class Contained(AnyOrder):
    """No engine is given up: whoever crashes one has crashed no other."""

    engines = 3
    poison = {"1": 0, "2": 5}  # noqa: RUF012
    most = 1

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "world"):
            assert all(len(victims) <= self.most for victims in self.world.victims.values())


class ContainedKillers(Contained):
    """Somebody outside may have done it, the first time."""

    killed_by_poison = True
    most = 2


MACHINES = (Several, SeveralPoison, SeveralSilentPoison, SeveralKillers, Contained, ContainedKillers)
for _machine in MACHINES:
    _machine.TestCase.settings = HOW_OFTEN
TestSeveral, TestSeveralPoison, TestSeveralSilentPoison, TestSeveralKillers, TestContained, TestContainedKillers = (
    machine.TestCase for machine in MACHINES
)


# --- who gets a job ---------------------------------------------------------------------------------------------------


class Engines:
    """A router whose engines say what the test has them say."""

    def __init__(self, *costs: dict[str, float], rows: int = 1) -> None:
        self.world = World(Options(), len(costs))
        self.router: Router = self.world.router
        self.sent: list[list[ToEngine]] = [[] for _ in costs]
        self.rows = rows
        for number, cost in enumerate(costs):
            self.up(number, cost)

    def up(self, number: int, cost: dict[str, float] = COST) -> None:
        info = {"cost": cost, "max_num_seqs": self.rows}
        self.router.engine_up(number, Ready([number], info, VOCAB, CONTEXT), self.sent[number].append)

    def open(self, tokens: int, prompt: int = 1) -> OpenJob:
        return self.router.open([7] * prompt, SamplingParams(max_tokens=tokens), 0, 0, NOBODY, None)

    def said(self, number: int, **told: Any) -> None:
        self.router.engine_said(number, status(**{"modelled_seconds": 0.0, "busy_seconds": 0.0, **told}))

    def share(self) -> list[int]:
        return [len(ledger.jobs) for ledger in self.router.ledgers]


def test_engines_that_are_alike_take_turns() -> None:
    engines = Engines(COST, COST, COST)
    assert [engines.open(5).engine for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_what_was_handed_over_counts_until_the_engine_tells_it_itself() -> None:
    engines = Engines(COST, COST)
    assert engines.open(100).engine == 0
    assert [engines.open(5).engine for _ in range(5)] == [1] * 5
    engines.said(0, live=1, backlog=2.0)  # the long one will end soon after all
    assert engines.open(5).engine == 0
    engines.said(1, live=5, backlog=0.5)  # and they sooner
    assert engines.open(5).engine == 1


def test_a_status_that_was_on_its_way_does_not_know_the_last_jobs() -> None:
    engines = Engines(COST, COST)
    jobs = [engines.open(40) for _ in range(4)]
    assert engines.share() == [2, 2]
    engines.said(0, live=1, backlog=50.0)
    engines.said(1, live=2, backlog=55.0)  # of both of its own: less than 50 and what one of 40 tokens takes
    assert engines.open(40).engine == 1 and len(jobs) == 4


def test_backlogs_shrink_while_nothing_is_said() -> None:
    engines = Engines(COST, COST)
    engines.said(0, live=0, backlog=50.0)
    engines.world.clock.now = 40.0
    engines.said(1, live=0, backlog=20.0)
    assert engines.open(5).engine == 0  # ten seconds are left of its fifty


def test_a_faster_engine_gets_more() -> None:
    """Its own cost model says so, for prompts and for outputs."""
    slow = {name: 3 * value for name, value in COST.items()}
    for prompt, tokens in ((1, 20), (400, 1)):
        engines = Engines(COST, slow)
        for _ in range(40):
            engines.open(tokens, prompt)
        assert engines.share() == [30, 10]


def test_an_engine_is_as_fast_as_it_was_seen_to_be() -> None:
    """It promises 1 s and takes 4."""
    engines = Engines(COST, COST)
    engines.said(0, live=0, backlog=0.0, modelled_seconds=5.0, busy_seconds=20.0)
    for _ in range(50):
        engines.open(20)
    assert engines.share() == [10, 40]
    assert engines.router.loads[0].speed == 0.25 and engines.router.loads[1].speed == 1.0


def test_seconds_by_hand() -> None:
    """Each of four rows pays a quarter of an iteration's second: prefill of 8 tokens, then 12 tokens of output."""
    engines = Engines(COST, rows=4)
    load, cost = engines.router.loads[0], CostModel(**COST)
    assert load.seconds() == 0.0
    engines.open(12, prompt=8)
    alone = cost.prefill_seconds(0, 8) + 12 * cost.decode_seconds(8)
    assert load.seconds() == pytest.approx(alone) == pytest.approx(3 + 12 * 1.25)
    for _ in range(3):
        engines.open(12, prompt=8)
    half, third, quarter = (8 * 0.25 + 12 * 0.25 + 13 / rows for rows in (2, 3, 4))
    assert load.seconds() == pytest.approx(alone + half + third + quarter)
    engines.said(0, live=4, backlog=20.0)
    assert load.seconds() == 20.0
    engines.world.clock.now = 5.0
    assert load.seconds() == 15.0
    engines.world.clock.now = 50.0
    assert load.seconds() == 0.0


def test_how_long_outputs_are_is_learned() -> None:
    world = World(Options(), 2)
    for which in (0, 1):
        world.start(which)
    assert world.router._work(world.open(1, SamplingParams())).left == 16, "no more than it may"
    endless = world.open(2, SamplingParams(max_tokens=None, ignore_eos=True))
    assert world.router._work(endless).left == 128, "nothing is known"
    world.close(endless)
    for _ in range(9):
        world.open(3, SamplingParams(max_tokens=10, ignore_eos=True))
    world.run()
    assert world.router._work(world.open(2, SamplingParams(max_tokens=None))).left == pytest.approx(10, abs=1)


# --- engines that go and come -----------------------------------------------------------------------------------------


def _loaded_in(seconds: float, engines: int = 2, rows: int = 4) -> Engines:
    """Engines each of which took so long to come up."""
    made = Engines(*[COST] * engines, rows=rows)
    for number in range(engines):
        made.router.loads[number].went()
        made.world.clock.now += seconds
        made.up(number)
    return made


def test_jobs_of_a_dead_engine_go_on_at_once_where_others_are_free() -> None:
    engines = _loaded_in(60.0)
    jobs = [engines.open(5) for _ in range(6)]
    engines.router.engine_down(0, crashed=False)
    assert engines.share() == [0, 6] and {job.engine for job in jobs} == {1}
    assert len(engines.sent[1]) == 6, "and are told there"


def test_jobs_wait_for_an_engine_that_is_back_sooner_than_another_is_done() -> None:
    engines = _loaded_in(2.0)
    waiting = engines.open(5)
    engines.said(1, live=3, backlog=100.0)
    engines.router.engine_down(0, crashed=False)
    assert waiting.engine == 0 and engines.open(5).engine == 0
    sent = len(engines.sent[0])
    engines.up(0)
    assert len(engines.sent[0]) == sent + 2


def test_jobs_do_not_wait_for_ever_for_an_engine_that_was_expected_back() -> None:
    engines = _loaded_in(2.0)
    waiting = engines.open(5)
    engines.said(1, live=3, backlog=30.0)
    engines.router.engine_down(0, crashed=False)
    assert waiting.engine == 0
    engines.world.clock.now += 10.0
    engines.said(1, live=3, backlog=30.0)
    assert waiting.engine == 0
    engines.world.clock.now += 25.0  # by now it is thought to take as long again
    engines.said(1, live=3, backlog=25.0)
    assert waiting.engine == 1


def test_an_engine_that_is_back_takes_what_others_have_not_begun() -> None:
    """Not what they have rows for, and not what they work on."""
    world = World(Options(slots=2), 2)
    world.start(0)
    world.clock.now = 600.0  # the second takes so long to load
    world.start(1)
    jobs = [world.open(seed, PLAIN) for seed in range(2, 12)]
    for which in (0, 1):
        world.turn(which)
    assert Counter(job.engine for job in jobs) == {0: 5, 1: 5}
    world.die(9, crashed=False, which=1)
    assert {job.engine for job in jobs} == {0}
    world.clock.now += 50.0
    world.turn(0)
    begun = {job.key for job in jobs if job.output}
    assert len(begun) == 4
    world.start(1)
    moved = {job.key for job in jobs if job.engine == 1}
    assert len(moved) == 2 and not moved & begun
    world.run()
    world.check()


def test_all_down_is_as_with_one() -> None:
    world = World(Options(), 2)
    for which in (0, 1):
        world.start(which)
    jobs = [world.open(seed, PLAIN) for seed in range(4)]
    for which in (0, 1):
        world.turn(which)
        world.die(9, crashed=False, which=which)
    late = world.open(4, PLAIN)
    world.run()
    world.check()
    assert {job.finish_reason for job in [*jobs, late]} == {"length"}


def test_an_engine_that_does_not_start_any_more_gives_its_jobs_away() -> None:
    world = World(Options(), 2)
    for which in (0, 1):
        world.start(which)
    jobs = [world.open(seed, PLAIN) for seed in range(4)]
    world.turn(0)
    world.die(9, which=0)  # a crash: those that ran are to wait for it
    assert Counter(job.engine for job in jobs) == {0: 2, 1: 2}
    world.fail(0)
    assert {job.engine for job in jobs} == {1} == {world.open(seed, PLAIN).engine for seed in range(3)}
    world.die(9, crashed=False, which=1)
    assert all(job.finish_reason is None for job in jobs), "it will be back"
    world.fail(1)
    assert {(job.finish_reason, job.error) for job in jobs} == {("error", NO_START)}
    world.start(0)
    world.open(5, PLAIN)
    world.run()
    world.check()


# --- blame ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engines", [2, 3, 5])
@pytest.mark.parametrize("position", [0, 5])
def test_a_job_that_crashes_engines_crashes_one_of_them(engines: int, position: int) -> None:
    world = World(Options(poison={"1": position}), engines)
    for which in range(engines):
        world.start(which)
    others = [world.open(seed, PLAIN) for seed in range(2, 14)]
    guilty = world.open(1, PLAIN)
    world.run()
    world.check()
    assert guilty.finish_reason == "error" and guilty.deaths == 3
    assert {job.finish_reason for job in others} == {"length"}
    assert len(world.victims[guilty.key]) == 1


def test_a_job_that_has_engines_killed_has_two_killed() -> None:
    """The first time it is nobody's fault, and nobody waits for that engine."""
    world = World(Options(poison={"1": 5}, killed_by_poison=True), 4)
    for which in range(4):
        world.start(which)
    others = [world.open(seed, PLAIN) for seed in range(2, 14)]
    guilty = world.open(1, PLAIN)
    world.run()
    world.check()
    assert guilty.finish_reason == "error" and guilty.deaths == 7
    assert {job.finish_reason for job in others} == {"length"}
    assert len(world.victims[guilty.key]) <= 2


def test_who_waits_behind_a_suspect_goes_to_another_engine() -> None:
    world = World(Options(), 2)
    for which in (0, 1):
        world.start(which)
    suspect = world.open(1, PLAIN)
    for _ in range(2):
        world.hear(9)
        world.iterate()
        world.die(heard=1)
        assert suspect.engine == 0
        if suspect.deaths == 1:
            world.start(0)
    waiting = [world.open(seed, PLAIN) for seed in range(2, 9)]
    assert 0 in {job.engine for job in waiting}, "nobody is alone in an engine that is down"
    world.start(0)
    assert {job.engine for job in waiting} == {1} and world.open(9, PLAIN).engine == 1
    world.turn(0)
    assert suspect.output and not world.router.ledgers[0].alone
    world.run()
    world.check()


def test_a_suspect_whose_engine_is_given_up_is_alone_in_another() -> None:
    world = World(Options(), 2)
    for which in (0, 1):
        world.start(which)
    suspect = world.open(1, PLAIN)
    others = [world.open(seed, PLAIN) for seed in (2, 3)]
    for _ in range(2):
        if world.engine is None:
            world.start(0)
        world.hear(9)
        world.iterate()
        world.die(heard=1)
    world.turn(1)
    world.fail(0)
    assert suspect.engine == 1
    world.hear(9, 1)
    assert world.engines[1] is not None and [add.seed for add in world.engines[1].jobs.values()] == [1]
    world.run()
    world.check()
    assert {job.finish_reason for job in (suspect, *others)} == {"length"}
