"""What is owed is delivered, once: whatever is opened, closed, said, lost and restarted, in whatever order."""

from __future__ import annotations

from collections import Counter, deque

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from letters import check_finished, check_growing, letters
from stand_in import VOCAB, Options, Poisoned, StandIn

from fastserve.ipc import Abort, FromEngine, Refused, Step, ToEngine, Update
from fastserve.server.jobs import OpenJob
from fastserve.server.ledger import Ledger
from fastserve.types import FinishReason, InvalidRequest, SamplingParams

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


class World:
    """A ledger, and engines that live and die at the other end of two queues."""

    def __init__(self, options: Options) -> None:
        self.ledger = Ledger(letters())
        self.options = options
        self.engine: StandIn | None = None
        self.inbox: deque[bytes] = deque()  # on the way to the engine
        self.outbox: deque[bytes] = deque()  # and from it
        self.jobs: list[OpenJob] = []
        self.closed: set[int] = set()
        self.deaths: Counter[tuple[int, int]] = Counter()  # of engines that had the job at so many tokens
        self.crashes: Counter[tuple[int, int]] = Counter()  # of those, the ones that nobody outside brought about

    def open(self, seed: int, params: SamplingParams, prompt: tuple[int, ...] = (7, 8)) -> OpenJob:
        job = self.ledger.open(prompt, params, seed, 0, None, None)
        self.jobs.append(job)
        return job

    def close(self, job: OpenJob) -> None:
        if job.finish_reason is None:
            self.closed.add(job.key)
        self.ledger.close(job)

    def start(self) -> None:
        self.engine = StandIn(self.options)
        self.inbox.clear()
        self.outbox.clear()
        self.ledger.up(lambda message: self.inbox.append(_encoder.encode(message)))

    def hear(self, messages: int) -> None:
        """The engine takes in some of what was sent to it."""
        assert self.engine is not None
        for _ in range(min(messages, len(self.inbox))):
            for answer in self.engine.handle(_to_engine.decode(self.inbox.popleft())):
                self.outbox.append(_encoder.encode(answer))

    def iterate(self) -> None:
        assert self.engine is not None
        if (planned := self.engine.plan()) is not None and not self.options.silent_death:
            self.outbox.append(_encoder.encode(planned))
        try:
            if self.engine.running:
                self.outbox.append(_encoder.encode(self.engine.iterate()))
        except Poisoned:
            self.die(heard=len(self.outbox), crashed=not self.options.killed_by_poison)

    def deliver(self, messages: int) -> None:
        """The ledger takes in some of what the engine said."""
        for _ in range(min(messages, len(self.outbox))):
            message = _from_engine.decode(self.outbox.popleft())
            if isinstance(message, Step):
                self.ledger.step(message)
            elif isinstance(message, Refused):
                self.ledger.refused(message)

    def die(self, heard: int, *, crashed: bool = True) -> None:
        """Of its last words, the first `heard` arrive."""
        self.deliver(heard)
        for job in self.jobs:
            if job.ticket is not None:
                self.deaths[job.key, len(job.output)] += 1
                self.crashes[job.key, len(job.output)] += crashed
        self.ledger.down(crashed=crashed)
        self.engine = None

    def run(self) -> None:
        """Undisturbed, to the end."""
        rounds = 0
        while self.ledger.open_jobs:
            if self.engine is None:
                self.start()
            self.hear(len(self.inbox))
            self.iterate()
            self.deliver(len(self.outbox))
            rounds += 1
            assert rounds < 20_000, "somebody waits for ever"

    def check(self) -> None:
        """After `run`: everybody got what is theirs, and nothing is left."""
        for job in self.jobs:
            if job.key in self.closed:
                check_growing(job) if job.finish_reason == "abort" else check_finished(job)
            elif job.finish_reason == "error":
                position = len(job.output)
                check_growing(job)
                deaths, crashes = self.deaths[job.key, position], self.crashes[job.key, position]
                assert deaths + 2 * crashes >= 7 or job.prompt[0] >= VOCAB  # refused
            else:
                check_finished(job)
        assert not self.ledger.open_jobs
        assert not self.ledger._submitted


PLAIN = SamplingParams(max_tokens=30, ignore_eos=True)

_params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 25),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.just(1),
    stop=st.lists(st.sampled_from(["a", "b", "c", "d", "é", "xy", "Q", "5"]), max_size=2).map(tuple),
    stop_token_ids=st.lists(st.integers(6, VOCAB - 1), max_size=2).map(tuple),
)


class AnyOrder(RuleBasedStateMachine):
    """Engines die at any moment, of nothing in particular."""

    poison: dict[str, int] = {}  # noqa: RUF012
    silent_death = False

    @initialize(slots=st.integers(1, 4))
    def begin(self, slots: int) -> None:
        self.world = World(Options(slots=slots, poison=self.poison, silent_death=self.silent_death))

    @rule(seed=st.integers(0, 9), params=_params, refused=st.integers(0, 9))
    def open(self, seed: int, params: SamplingParams, refused: int) -> None:
        self.world.open(seed, params, (VOCAB,) if refused == 0 else (7, 8))

    @rule(which=st.integers(0, 1000))
    def close(self, which: int) -> None:
        if self.world.jobs:
            self.world.close(self.world.jobs[which % len(self.world.jobs)])

    @precondition(lambda self: self.world.engine is None)
    @rule()
    def start(self) -> None:
        self.world.start()

    @precondition(lambda self: self.world.engine is not None)
    @rule(messages=st.integers(1, 9))
    def hear(self, messages: int) -> None:
        self.world.hear(messages)

    @precondition(lambda self: self.world.engine is not None)
    @rule(times=st.integers(1, 4))
    def iterate(self, times: int) -> None:
        for _ in range(times):
            if self.world.engine is not None:
                self.world.iterate()

    @rule(messages=st.integers(1, 9))
    def deliver(self, messages: int) -> None:
        if self.world.engine is not None:
            self.world.deliver(messages)

    @precondition(lambda self: self.world.engine is not None)
    @rule(heard=st.integers(0, 9), crashed=st.booleans())
    def die(self, heard: int, crashed: bool) -> None:
        self.world.die(heard, crashed=crashed)

    @invariant()
    def nothing_is_repeated_or_left_out(self) -> None:
        for job in getattr(self, "world", World(Options())).jobs:
            check_growing(job)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run()
            self.world.check()


class Poison(AnyOrder):
    """Some jobs bring the engine down, too, and it may not say first that they run."""

    poison = {"1": 0, "2": 5}  # noqa: RUF012


class SilentPoison(Poison):
    silent_death = True


_how_often = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
for _machine in (AnyOrder, Poison, SilentPoison):
    _machine.TestCase.settings = _how_often
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
    late = world.ledger.open([7], PLAIN, 1, 0, None, 20.0)
    early = world.ledger.open([7], PLAIN, 2, 0, None, 10.0)
    world.start()
    world.hear(9)
    world.iterate()
    world.die(heard=9)
    world.start()
    adds = [_to_engine.decode(message) for message in world.inbox]
    assert [(add.seed, add.arrival, add.output, add.waiting_since) for add in adds] == [
        (2, 10.0, early.output, early.last_token),
        (1, 20.0, late.output, late.last_token),
    ]
    assert early.last_token is not None and early.last_token == early.first_token
    assert len(early.output) == len(late.output) == 1


def test_what_was_said_about_an_earlier_submission_is_not_heard() -> None:
    world = World(Options())
    job = world.open(1, PLAIN)
    world.start()
    ticket = job.ticket
    world.die(heard=0)
    world.start()
    assert ticket is not None
    world.ledger.step(Step([Update(ticket, 9, None, None, None, None)], None))
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
    assert job.finish_reason is None and _to_engine.decode(world.inbox[-1]) == Abort([job.ticket], True)
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
    assert job.metrics is None and not world.ledger.open_jobs


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
    ledger = Ledger(letters())
    whole: dict[str, object] = {"prompt": [1], "params": PLAIN, "seed": 0, "priority": 0, "user": None, "arrival": None}
    with pytest.raises(InvalidRequest, match=f"^{field}: "):
        ledger.open(**(whole | given))  # type: ignore[arg-type]
    assert not ledger.open_jobs


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
    assert not world.ledger.open_jobs and not world.ledger._submitted


def test_a_job_that_could_not_be_sent_is_not_kept() -> None:
    def fails(_: ToEngine) -> None:
        raise RuntimeError("no socket")

    ledger = Ledger(letters())
    ledger.up(fails)
    with pytest.raises(RuntimeError, match="no socket"):
        ledger.open([1], PLAIN, 0, 0, None, None)
    assert not ledger.open_jobs and not ledger._submitted


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(InvalidRequest, match=r"^stop: .*stop_token_ids"):
        Ledger(None).open([1], SamplingParams(stop="a"), 0, 0, None, None)


def test_all_can_be_ended_while_one_is_alone() -> None:
    world = World(Options())
    jobs = [world.open(seed, PLAIN) for seed in (1, 2, 3)]
    for _ in range(2):
        world.start()
        world.die(heard=0)
    world.start()
    world.ledger.end_all(FinishReason.ERROR, "no engine")
    assert [(job.finish_reason, job.error) for job in jobs] == [("error", "no engine")] * 3
    assert not world.ledger.open_jobs
    world.hear(9)
    assert world.engine is not None and not world.engine.jobs


def test_the_answers_of_an_n_share_their_prompt() -> None:
    """A long one, a hundred times over, is not a hundred copies."""
    ledger = Ledger(letters())
    prompt = [7, 8, 9]
    jobs = [ledger.open(prompt, PLAIN, seed, 0, None, None) for seed in range(3)]
    assert all(job.prompt is prompt for job in jobs)
    assert ledger.open((7, 8), PLAIN, 3, 0, None, None).prompt == [7, 8]
