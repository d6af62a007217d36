"""A router, and engines that live and die at the other ends of its queues; and machines that do that in any order."""

from __future__ import annotations

from collections import Counter, defaultdict, deque

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from letters import check_finished, check_growing, letters
from stand_in import CONTEXT, VOCAB, Options, Poisoned, StandIn
from toy import Clock

from fastserve.ipc import FromEngine, Ready, Refused, Status, Step, ToEngine
from fastserve.origin import NOBODY
from fastserve.server.jobs import OpenJob
from fastserve.server.router import Router
from fastserve.types import SamplingParams

_encoder = msgspec.msgpack.Encoder()
to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)
NO_START = "it does not start any more"


class World:
    """Engines go by their number, the first unless it is said."""

    def __init__(self, options: Options, engines: int = 1) -> None:
        self.clock = Clock()
        self.router = Router(letters(), engines, self.clock)
        self.options = options
        self.engines: list[StandIn | None] = [None] * engines
        self.inboxes: list[deque[bytes]] = [deque() for _ in range(engines)]  # on the way to an engine
        self.outboxes: list[deque[bytes]] = [deque() for _ in range(engines)]  # and from it
        self.jobs: list[OpenJob] = []
        self.closed: set[int] = set()
        self.without_engines: set[int] = set()  # keys of jobs that were open when no engine started any more
        self.deaths: Counter[tuple[int, int]] = Counter()  # of engines that had the job at so many tokens
        self.crashes: Counter[tuple[int, int]] = Counter()  # of those, the ones that nobody outside brought about
        self.victims: defaultdict[int, set[int]] = defaultdict(set)  # engines that a job brought down

    @property
    def engine(self) -> StandIn | None:
        return self.engines[0]

    @property
    def inbox(self) -> deque[bytes]:
        return self.inboxes[0]

    def open(self, seed: int, params: SamplingParams, prompt: tuple[int, ...] = (7, 8)) -> OpenJob:
        job = self.router.open(prompt, params, seed, 0, NOBODY, None)
        self.jobs.append(job)
        return job

    def close(self, job: OpenJob) -> None:
        if job.finish_reason is None:
            self.closed.add(job.key)
        self.router.close(job)

    def start(self, which: int = 0) -> None:
        self.engines[which] = StandIn(self.options)
        self.inboxes[which].clear()
        self.outboxes[which].clear()
        ready = Ready([which], {"max_num_seqs": self.options.slots}, VOCAB, CONTEXT)
        self.router.engine_up(which, ready, lambda message: self.inboxes[which].append(_encoder.encode(message)))

    def hear(self, messages: int, which: int = 0) -> None:
        """The engine takes in some of what was sent to it."""
        engine = self.engines[which]
        assert engine is not None
        for _ in range(min(messages, len(self.inboxes[which]))):
            for answer in engine.handle(to_engine.decode(self.inboxes[which].popleft())):
                self.outboxes[which].append(_encoder.encode(answer))

    def iterate(self, which: int = 0) -> None:
        engine, outbox = self.engines[which], self.outboxes[which]
        assert engine is not None
        if (planned := engine.plan()) is not None and not self.options.silent_death:
            outbox.append(_encoder.encode(planned))
        try:
            if engine.running:
                outbox.append(_encoder.encode(engine.iterate()))
        except Poisoned as poisoned:
            job = self.router.ledgers[which].job_of(poisoned.args[0])
            if job is not None:
                self.victims[job.key].add(which)
            self.die(heard=len(outbox), crashed=not self.options.killed_by_poison, which=which)

    def beat(self, which: int = 0) -> None:
        engine = self.engines[which]
        assert engine is not None
        self.outboxes[which].append(_encoder.encode(engine.status()))

    def deliver(self, messages: int, which: int = 0) -> None:
        """The router takes in some of what the engine said."""
        for _ in range(min(messages, len(self.outboxes[which]))):
            message = _from_engine.decode(self.outboxes[which].popleft())
            if isinstance(message, (Step, Refused, Status)):
                self.router.engine_said(which, message)

    def die(self, heard: int, *, crashed: bool = True, which: int = 0) -> None:
        """Of its last words, the first `heard` arrive."""
        self.deliver(heard, which)
        for job in self.jobs:
            if job.engine == which and job.ticket is not None:
                self.deaths[job.key, len(job.output)] += 1
                self.crashes[job.key, len(job.output)] += crashed
        self.engines[which] = None
        self.router.engine_down(which, crashed=crashed)

    def fail(self, which: int = 0) -> None:
        """An engine that is down does not start any more."""
        assert self.engines[which] is None
        others = (failure for number, failure in enumerate(self.router.failures) if number != which)
        if None not in others:
            self.without_engines |= self.router.open_jobs.keys()
        self.router.engine_fails(which, NO_START)

    def turn(self, which: int = 0) -> None:
        """An engine does what it was told and one iteration, and all that it says arrives; started if it is down."""
        if self.engines[which] is None:
            self.start(which)
        self.hear(len(self.inboxes[which]), which)
        self.iterate(which)
        if self.engines[which] is not None:
            self.beat(which)
            self.deliver(len(self.outboxes[which]), which)

    def run(self) -> None:
        """Undisturbed, to the end."""
        rounds = 0
        while self.router.open_jobs:
            self.clock.now += 0.1
            for which in range(len(self.engines)):
                self.turn(which)
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
                if job.key in self.without_engines:
                    assert job.error == NO_START
                else:
                    assert deaths + 2 * crashes >= 7 or job.prompt[0] >= VOCAB  # refused
            else:
                check_finished(job)
        assert not self.router.open_jobs
        for which, engine in enumerate(self.engines):
            ledger = self.router.ledgers[which]
            assert not ledger.jobs and not ledger._submitted and not self.router.loads[which]._given
            if engine is not None:
                self.hear(len(self.inboxes[which]), which)
                assert not engine.jobs, "the engine works for nobody"


PLAIN = SamplingParams(max_tokens=30, ignore_eos=True)

_params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 25),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.just(1),
    stop=st.lists(st.sampled_from(["a", "b", "c", "d", "é", "xy", "Q", "5"]), max_size=2).map(tuple),
    stop_token_ids=st.lists(st.integers(6, VOCAB - 1), max_size=2).map(tuple),
)
_which = st.integers(0, 11)  # of the engines, by the remainder


class AnyOrder(RuleBasedStateMachine):
    """Engines die at any moment, of nothing in particular."""

    engines = 1
    poison: dict[str, int] = {}  # noqa: RUF012
    silent_death = False
    killed_by_poison = False

    @initialize(slots=st.integers(1, 4))
    def begin(self, slots: int) -> None:
        options = Options(
            slots=slots,
            poison=self.poison,
            silent_death=self.silent_death,
            killed_by_poison=self.killed_by_poison,
        )
        self.world = World(options, self.engines)

    def _up(self, which: int) -> int | None:
        """The engine, where it is up."""
        which %= self.engines
        return which if self.world.engines[which] is not None else None

    @rule(seed=st.integers(0, 9), params=_params, refused=st.integers(0, 9))
    def open(self, seed: int, params: SamplingParams, refused: int) -> None:
        if None in self.world.router.failures:
            self.world.open(seed, params, (VOCAB,) if refused == 0 else (7, 8))

    @rule(which=st.integers(0, 1000))
    def close(self, which: int) -> None:
        if self.world.jobs:
            self.world.close(self.world.jobs[which % len(self.world.jobs)])

    @rule(which=_which, seconds=st.sampled_from([0.0, 0.1, 5.0]))
    def start(self, which: int, seconds: float) -> None:
        self.world.clock.now += seconds
        if self._up(which) is None:
            self.world.start(which % self.engines)

    @rule(which=_which, messages=st.integers(1, 9))
    def hear(self, which: int, messages: int) -> None:
        if (up := self._up(which)) is not None:
            self.world.hear(messages, up)

    @rule(which=_which, times=st.integers(1, 4))
    def iterate(self, which: int, times: int) -> None:
        for _ in range(times):
            if (up := self._up(which)) is not None:
                self.world.iterate(up)

    @rule(which=_which, messages=st.integers(1, 9), beats=st.booleans())
    def deliver(self, which: int, messages: int, beats: bool) -> None:
        if (up := self._up(which)) is not None:
            if beats:
                self.world.beat(up)
            self.world.deliver(messages, up)

    @rule(which=_which, heard=st.integers(0, 9), crashed=st.booleans())
    def die(self, which: int, heard: int, crashed: bool) -> None:
        if (up := self._up(which)) is not None:
            self.world.die(heard, crashed=crashed, which=up)

    @invariant()
    def nothing_is_repeated_or_left_out(self) -> None:
        for job in self.world.jobs if hasattr(self, "world") else ():
            check_growing(job)

    @invariant()
    def every_open_job_is_one_engines(self) -> None:
        if hasattr(self, "world"):
            router = self.world.router
            held = [(key, which) for which, ledger in enumerate(router.ledgers) for key in ledger.jobs]
            assert sorted(held) == sorted((job.key, job.engine) for job in router.open_jobs.values())

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run()
            self.world.check()


HOW_OFTEN = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
