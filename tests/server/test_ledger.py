"""What is owed is delivered, once: whatever is opened, closed, said, lost and restarted, in whatever order."""

from __future__ import annotations

import pytest
from ledger_world import HOW_OFTEN, PLAIN, AnyOrder, World, to_engine
from letters import check_finished, letters
from stand_in import CONTEXT, VOCAB, Options

from fastserve.ipc import Abort, Ready, Step, ToEngine, Update
from fastserve.origin import NOBODY
from fastserve.server.router import Router
from fastserve.types import FinishReason, InvalidRequest, SamplingParams


class Poison(AnyOrder):
    """Some jobs bring the engine down, too, and it may not say first that they run."""

    poison = {"1": 0, "2": 5}  # noqa: RUF012


class SilentPoison(Poison):
    silent_death = True


for _machine in (AnyOrder, Poison, SilentPoison):
    _machine.TestCase.settings = HOW_OFTEN
TestAnyOrder, TestPoison, TestSilentPoison = AnyOrder.TestCase, Poison.TestCase, SilentPoison.TestCase


@pytest.mark.parametrize("position", [0, 5])
@pytest.mark.parametrize("silent", [False, True])
def test_the_job_that_brings_engines_down_fails_and_spares_the_rest(position: int, silent: bool) -> None:
    world = World(Options(poison={"1": position}, silent_death=silent))
    others = [world.open(seed, PLAIN) for seed in (2, 3, 4)]
    guilty = world.open(1, PLAIN)
    later = [world.open(seed, PLAIN) for seed in (5, 6)]
    world.run()
    world.check()
    assert guilty.finish_reason == "error" and len(guilty.output) == position
    assert guilty.error is not None and f"token {position + 1}" in guilty.error
    # Who never says who runs is believed for a while that nobody else did.
    assert world.deaths[guilty.key, position] == 3 + (silent and position > 0)
    assert {job.finish_reason for job in others + later} == {"length"}


def test_a_job_present_in_two_deaths_runs_alone() -> None:
    world = World(Options())
    first, second = world.open(1, PLAIN), world.open(2, PLAIN)
    for _ in range(2):
        world.start()
        world.hear(9)
        world.iterate()
        world.die(heard=1)  # who runs, and not what came of it
    world.start()
    third = world.open(3, PLAIN)
    world.hear(9)
    assert world.engine is not None and [add.seed for add in world.engine.jobs.values()] == [1]
    world.iterate()
    world.deliver(9)
    world.hear(9)
    assert [add.seed for add in world.engine.jobs.values()] == [2], "the next one alone, and the first taken out again"
    world.iterate()
    world.deliver(9)
    world.hear(9)
    assert sorted(add.seed for add in world.engine.jobs.values()) == [1, 2, 3], "both had a token, so all may run"
    world.run()
    world.check()
    assert {job.finish_reason for job in (first, second, third)} == {"length"}


def _killed(world: World, times: int) -> None:
    """Each time when it has said who runs and put nothing out."""
    for _ in range(times):
        world.start()
        world.hear(9)
        world.iterate()
        world.die(heard=1, crashed=False)


def _in_engine(world: World) -> list[int]:
    """The seeds of the jobs that a new engine has."""
    world.start()
    world.hear(9)
    assert world.engine is not None
    return sorted(add.seed for add in world.engine.jobs.values())


def test_three_kills_before_a_token_say_nothing_against_a_job() -> None:
    world = World(Options())
    jobs = [world.open(seed, PLAIN) for seed in (1, 2, 3)]
    _killed(world, 3)
    assert _in_engine(world) == [1, 2, 3]
    world.run()
    world.check()
    assert {job.finish_reason for job in jobs} == {"length"}


def test_suspects_of_kills_take_turns() -> None:
    """Whoever was alone at a kill comes after those who were not: chance would have to meet each three times."""
    world = World(Options())
    jobs = [world.open(seed, PLAIN) for seed in (1, 2, 3)]
    _killed(world, 4)
    for turn in (1, 2, 3, 1, 2, 3):
        assert _in_engine(world) == [turn]
        world.iterate()
        world.die(heard=1, crashed=False)
    world.run()
    world.check()
    assert {job.finish_reason for job in jobs} == {"length"}


@pytest.mark.parametrize("silent", [False, True])
def test_the_job_for_which_the_system_kills_engines_is_found(silent: bool) -> None:
    """It takes all memory, say."""
    world = World(Options(poison={"1": 5}, killed_by_poison=True, silent_death=silent))
    others = [world.open(seed, PLAIN) for seed in (2, 3, 4)]
    guilty = world.open(1, PLAIN)
    world.run()
    world.check()
    assert guilty.finish_reason == "error" and guilty.error is not None and "died 7 times in a row" in guilty.error
    assert {job.finish_reason for job in others} == {"length"}


def test_who_is_alone_may_be_closed() -> None:
    world = World(Options())
    first, second = world.open(1, PLAIN), world.open(2, PLAIN)
    for _ in range(2):
        world.start()
        world.die(heard=0)
    world.start()
    world.close(first)
    world.run()
    world.check()
    assert (first.finish_reason, second.finish_reason) == ("abort", "length")


def test_random_deaths_fail_nobody_who_gets_on() -> None:
    """A hundred deaths, with one token between two of them."""
    world = World(Options())
    jobs = [world.open(seed, SamplingParams(max_tokens=100, ignore_eos=True)) for seed in range(4)]
    for _ in range(100):
        world.start()
        world.hear(9)
        world.iterate()
        world.die(heard=9)
    world.run()
    world.check()
    assert {job.finish_reason for job in jobs} == {"length"}


def test_waiting_jobs_do_not_become_suspects() -> None:
    world = World(Options(slots=1, poison={"1": 3}))
    guilty = world.open(1, PLAIN)
    waiting = [world.open(seed, PLAIN) for seed in (2, 3)]
    world.run()
    assert guilty.finish_reason == "error"
    # When the second engine died they had been handed over just before, so it might have been one of them.
    assert [job.deaths for job in waiting] == [1, 1]


def test_resubmission_is_in_order_of_arrival_and_brings_the_output() -> None:
    world = World(Options(slots=2))
    late = world.router.open([7], PLAIN, 1, 0, NOBODY, 20.0)
    early = world.router.open([7], PLAIN, 2, 0, NOBODY, 10.0)
    world.start()
    world.hear(9)
    world.iterate()
    world.die(heard=9)
    world.start()
    adds = [to_engine.decode(message) for message in world.inbox]
    assert [(add.seed, add.arrival, add.output, add.waiting_since) for add in adds] == [
        (2, 10.0, early.output, early.last_token),
        (1, 20.0, late.output, late.last_token),
    ]
    assert early.last_token is not None and early.last_token == early.first_token
    assert len(early.output) == len(late.output) == 1


def test_resubmission_brings_what_the_first_engine_found_in_its_cache() -> None:
    """With the first token it is told; nothing that later ones find is of the prompt's charges."""
    world = World(Options())
    job = world.open(1, PLAIN)
    for found in (1, 0):
        world.start()
        assert job.ticket is not None
        world.router.engine_said(0, Step([Update(job.ticket, 9, None, None, None, None, found)], None))
        world.die(heard=0)
    world.start()
    (add,) = (to_engine.decode(message) for message in world.inbox)
    assert (add.output, add.cached_tokens) == ([9, 9], 1)


def test_what_was_said_about_an_earlier_submission_is_not_heard() -> None:
    world = World(Options())
    job = world.open(1, PLAIN)
    world.start()
    ticket = job.ticket
    world.die(heard=0)
    world.start()
    assert ticket is not None
    world.router.engine_said(0, Step([Update(ticket, 9, None, None, None, None)], None))
    assert job.output == [] and job.ticket != ticket


def test_a_stop_string_ends_the_job_once_the_engine_has_given_its_accounts() -> None:
    world = World(Options())
    whole = world.open(1, PLAIN)
    world.run()
    stop = whole.text[4]
    job = world.open(1, SamplingParams(max_tokens=30, ignore_eos=True, stop=stop))
    world.hear(9)
    while not job.stopped:
        world.iterate()
        world.iterate()  # it has gone on meanwhile
        world.deliver(9)
    assert job.finish_reason is None and to_engine.decode(world.inbox[-1]) == Abort([job.ticket], True)
    world.hear(9)
    world.deliver(9)
    check_finished(job)
    assert job.metrics is not None and job.metrics.finish is not None


def test_a_stop_string_is_enough_when_the_engine_dies_before_its_accounts() -> None:
    world = World(Options())
    whole = world.open(1, PLAIN)
    world.run()
    job = world.open(1, SamplingParams(max_tokens=30, ignore_eos=True, stop=whole.text[4]))
    world.hear(9)
    while not job.stopped:
        world.iterate()
        world.deliver(9)
    world.die(heard=0)
    check_finished(job)
    assert job.metrics is None and not world.router.open_jobs


def test_refusals_reach_who_waits() -> None:
    world = World(Options())
    job = world.open(1, PLAIN, (VOCAB,))
    world.run()
    with pytest.raises(InvalidRequest, match=r"^prompt: holds the token id") as caught:
        job.news().send(None)
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("prompt", {"prompt": [2**40]}),
        ("prompt", {"prompt": ["a"]}),
        ("seed", {"seed": -1}),
        ("priority", {"priority": 2**31}),
    ],
)
def test_what_cannot_be_told_to_an_engine_is_refused_at_once(field: str, given: dict[str, object]) -> None:
    router = Router(letters())
    whole: dict[str, object] = {
        "prompt": [1],
        "params": PLAIN,
        "seed": 0,
        "priority": 0,
        "origin": NOBODY,
        "arrival": None,
    }
    with pytest.raises(InvalidRequest, match=f"^{field}: "):
        router.open(**(whole | given))  # type: ignore[arg-type]
    assert not router.open_jobs


def test_a_job_that_cannot_be_encoded_ends_alone() -> None:
    """Whatever else is checked before: the ledger does not stumble over it, neither at once nor at the next engine."""
    world = World(Options())
    broken = SamplingParams(max_tokens=30, stop="\ud800")
    before = [world.open(1, PLAIN), world.open(2, broken), world.open(3, PLAIN)]
    world.start()
    late = world.open(4, broken)
    world.run()
    assert [job.finish_reason for job in before] == ["length", "error", "length"]
    for job in (before[1], late):
        assert job.error == "the job cannot be told to the engine: UnicodeEncodeError"
    assert not world.router.open_jobs and not world.router.ledgers[0]._submitted


def test_a_job_that_could_not_be_sent_is_not_kept() -> None:
    def fails(_: ToEngine) -> None:
        raise RuntimeError("no socket")

    router = Router(letters())
    router.engine_up(0, Ready([1], {}, VOCAB, CONTEXT), fails)
    with pytest.raises(RuntimeError, match="no socket"):
        router.open([1], PLAIN, 0, 0, NOBODY, None)
    assert not router.open_jobs and not router.ledgers[0]._submitted


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(InvalidRequest, match=r"^stop: .*stop_token_ids"):
        Router(None).open([1], SamplingParams(stop="a"), 0, 0, NOBODY, None)


def test_all_can_be_ended_while_one_is_alone() -> None:
    world = World(Options())
    jobs = [world.open(seed, PLAIN) for seed in (1, 2, 3)]
    for _ in range(2):
        world.start()
        world.die(heard=0)
    world.start()
    world.router.end_all(FinishReason.ERROR, "no engine")
    assert [(job.finish_reason, job.error) for job in jobs] == [("error", "no engine")] * 3
    assert not world.router.open_jobs
    world.hear(9)
    assert world.engine is not None and not world.engine.jobs


def test_the_answers_of_an_n_share_their_prompt() -> None:
    """A long one, a hundred times over, is not a hundred copies."""
    router = Router(letters())
    prompt = [7, 8, 9]
    jobs = [router.open(prompt, PLAIN, seed, 0, NOBODY, None) for seed in range(3)]
    assert all(job.prompt is prompt for job in jobs)
    assert router.open((7, 8), PLAIN, 3, 0, NOBODY, None).prompt == [7, 8]
