"""Priorities order a tenant's jobs before its policy does, on every policy, and nobody else's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_server import COST, UnitServer, unit_job

from fastserve.config import SchedulerConfig
from fastserve.policies import POLICIES, Policy, create_policy
from fastserve.policies.fcfs import FirstComeFirstServed
from fastserve.policies.gittins import Gittins
from fastserve.policies.mlfq import MultiLevelFeedbackQueue
from fastserve.policies.priority import ByPriority
from fastserve.policies.queue import JobQueue
from fastserve.programs import Programs
from fastserve.types import InvalidRequest, Job


def policy(name: str, **options: object) -> Policy:
    return create_policy(SchedulerConfig(policy=name, **options), COST)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", POLICIES)
def test_lower_values_go_first_and_the_policy_decides_among_equals(name: str) -> None:
    """Each value's jobs run as they would alone in the time the better ones leave, and here those end at once."""
    jobs = [unit_job(i, 0.0, 1 + i % 3, 2 + i % 4, priority=(2, -1, 0)[i % 3]) for i in range(12)]
    server = UnitServer(policy(name, starvation_limit=None))
    server.run(jobs)
    order = [jobs[ran[0]].priority for ran in server.schedule]
    assert order == sorted(order)
    for value in (2, -1, 0):
        alone = UnitServer(policy(name, starvation_limit=None))
        alone.run([unit_job(i, 0.0, 1 + i % 3, 2 + i % 4) for i in range(12) if (2, -1, 0)[i % 3] == value])
        assert alone.schedule == [ran for ran in server.schedule if jobs[ran[0]].priority == value]


def test_an_urgent_job_preempts() -> None:
    server = UnitServer(policy("fcfs"))
    server.run([unit_job(0, 0.0, 1, 5), unit_job(1, 2.0, 1, 2, priority=-5)])
    assert server.schedule == [(0,), (0,), (1,), (1,), (0,), (0,), (0,)]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("tenants", [("ann", "bob"), ("key 0/", "key 1/bob"), ("key 0/ann", "key 0/bob")])
def test_a_priority_brings_a_tenant_no_more(name: str, tenants: tuple[str, str]) -> None:
    """Whatever one claims, both run side by side; and of its own jobs, the urgent one goes first."""
    urgent, modest = tenants
    server = UnitServer(policy(name, starvation_limit=None), 2)
    jobs = [unit_job(i, 0.0, 1, 8, priority=-(2**31) + (i == 0)) for i in range(4)]
    jobs += [unit_job(i, 0.0, 1, 8, priority=2**31 - 1) for i in range(4, 8)]
    for job in jobs:
        job.tenant = urgent if job.index < 4 else modest
    server.run(jobs)
    for ran in server.schedule:
        assert sorted(index // 4 for index in ran) == [0, 1]
    assert server.finish[0] == max(server.finish[index] for index in range(4))


def test_bounds_act_within_a_priority() -> None:
    server = policy("skip-join-mlfq", starvation_limit=5.0)
    urgent, starved, short = unit_job(0, 0.0, 1, 9, priority=-1), unit_job(1, 0.0, 8, 9), unit_job(2, 0.0, 1, 9)
    for job in (urgent, starved, short):
        server.add(job, 0.0)
    assert [job.index for job in server.iter_best(4.9)] == [0, 2, 1]
    assert server.next_deadline() == 5.0 == server.deadline(starved)
    short.waiting_since = None
    server.on_service(short, 1.0, 5.0)  # to level 1
    assert [job.index for job in server.iter_best(5.0)] == [0, 1, 2]


def test_ranks_sort_as_iter_best_does_and_work_ahead_adds_up() -> None:
    server = policy("fcfs")
    jobs = [unit_job(i, 0.0, 1 + i, 2, priority=i % 2) for i in range(6)]
    for job in jobs:
        server.add(job, 0.0)
    assert [job.index for job in sorted(jobs, key=server.rank)] == [0, 2, 4, 1, 3, 5]
    assert [server.work_ahead(jobs[i], 0.0) for i in (0, 2, 4, 1, 3, 5)] == [0, 1, 1 + 3, 9, 9 + 2, 9 + 2 + 4]
    assert server.backlog(0.0) == 21 and len(server) == 6


def test_values_come_and_go() -> None:
    made: list[FirstComeFirstServed] = []

    def make() -> FirstComeFirstServed:
        made.append(FirstComeFirstServed())
        return made[-1]

    server = ByPriority(make)
    draw = random.Random(1)
    live: list[Job] = []
    for index in range(500):
        job = unit_job(index, 0.0, 1, 2, priority=draw.randrange(4))
        server.add(job, 0.0)
        live.append(job)
        while len(live) > draw.randrange(6):
            server.remove(live.pop(draw.randrange(len(live))))
        assert len(server) == len(live)
        assert [job.index for job in server.iter_best(0.0)] == [
            job.index for job in sorted(live, key=lambda job: (job.priority, job.index))
        ]
        assert len(server._priorities) <= max(1, len({job.priority for job in live}))


class Reference(Policy):
    """All of it asked of every value's policy, at once."""

    def __init__(self, make: Callable[[], Policy]) -> None:
        self.make = make
        self.policies: dict[int, Policy] = {}

    def of(self, job: Job) -> Policy:
        return self.policies[job.priority]

    def ascending(self) -> list[Policy]:
        return [self.policies[priority] for priority in sorted(self.policies)]

    def add(self, job: Job, now: float) -> None:
        for priority, policy in list(self.policies.items()):  # the only one there was
            if not len(policy) and priority != job.priority:
                del self.policies[priority]
        if job.priority not in self.policies:
            self.policies[job.priority] = self.make()
        self.of(job).add(job, now)

    def remove(self, job: Job) -> None:
        self.of(job).remove(job)
        if len(self.policies) > 1 and not len(self.of(job)):
            del self.policies[job.priority]

    def on_service(self, job: Job, seconds: float, now: float) -> None:
        self.of(job).on_service(job, seconds, now)

    def refresh(self, job: Job, now: float) -> None:
        self.of(job).refresh(job, now)

    def on_finish(self, job: Job, output_tokens: int, now: float) -> None:
        self.of(job).on_finish(job, output_tokens, now)

    def make_way(self) -> None:
        for policy in self.policies.values():
            policy.make_way()

    def move(self, job: Job, tier: int | None) -> None:
        self.of(job).move(job, tier)

    def deadline(self, job: Job) -> float:
        return self.of(job).deadline(job)

    def horizon(self, job: Job) -> float:
        return self.of(job).horizon(job)

    def iter_best(self, now: float) -> Iterator[Job]:
        for policy in self.policies.values():
            policy.share = self.share
        if len(self.policies) == 1:
            return self.ascending()[0].iter_best(now)
        self.make_way()
        return chain.from_iterable(policy.iter_best(now) for policy in self.ascending())

    def iter_tier(self, tier: int, worst_first: bool = False) -> Iterator[Job]:
        policies = self.ascending()[::-1] if worst_first else self.ascending()
        return chain.from_iterable(policy.iter_tier(tier, worst_first) for policy in policies)

    def rank(self, job: Job) -> tuple[float, ...]:
        return job.priority, *self.of(job).rank(job)

    def work_ahead(self, job: Job, now: float) -> float:
        before = (policy.backlog(now) for priority, policy in sorted(self.policies.items()) if priority < job.priority)
        return sum(before) + self.of(job).work_ahead(job, now)

    def backlog(self, now: float) -> float:
        return sum(policy.backlog(now) for policy in self.ascending())

    def quanta(self) -> Sequence[float]:
        return max((policy.quanta() for policy in self.policies.values() or (self.make(),)), key=len)

    def level(self, job: Job) -> int:
        return self.of(job).level(job)

    def __len__(self) -> int:
        return sum(map(len, self.policies.values()))


class TwoPolicies(UnitServer):
    """The reference beside it is told the same of jobs of its own, runs the same ones, and has to say the same."""

    def __init__(self, name: str, draw: random.Random, batch: int) -> None:
        limits = {"starvation_limit": draw.choice([None, 9.0]), "slowdown_limit": draw.choice([None, 2.0])}
        config = SchedulerConfig(policy=name, num_levels=5, **limits)  # type: ignore[arg-type]
        makes = [POLICIES[name](config, COST, Programs()) for _ in range(2)]
        if name == "gittins" and draw.random() < 0.7:
            for make in makes:
                made = make()
                assert isinstance(made, Gittins)
                for number in range(4000):
                    made._lengths.ended(0, 2 + number % 3 * 5)
                assert made._lengths.learned

        def whole() -> Policy:
            made = makes[1]()
            if isinstance(made, MultiLevelFeedbackQueue):
                made._levels = [JobQueue() for _ in made._levels]
            return made

        lumped = draw.random() < 0.5
        super().__init__(ByPriority(makes[0]), batch, lumped=lumped)
        self.reference = UnitServer(Reference(whole), batch, lumped=lumped)

    def check(self, jobs: list[Job], others: list[Job]) -> None:
        mine, its, now = self.policy, self.reference.policy, self.now
        assert len(mine) == len(its) == len(jobs)
        assert [mine.rank(job) for job in jobs] == [its.rank(job) for job in others]
        assert [mine.work_ahead(job, now) for job in jobs] == [its.work_ahead(job, now) for job in others]
        assert [mine.deadline(job) for job in jobs] == [its.deadline(job) for job in others]
        assert [mine.level(job) for job in jobs] == [its.level(job) for job in others]
        assert mine.backlog(now) == its.backlog(now) and mine.quanta() == its.quanta()
        for tier in (0, 1):
            for worst_first in (False, True):
                told = (policy.iter_tier(tier, worst_first) for policy in (mine, its))
                first, second = ([job.index for job in each] for each in told)
                assert first == second


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(POLICIES)), st.integers(0, 10**6), st.sampled_from([1, 2, 5, 40]), st.integers(1, 4))
def test_orders_are_those_of_all_policies_asked_at_once(name: str, seed: int, values: int, batch: int) -> None:
    draw = random.Random(seed)
    servers = TwoPolicies(name, draw, batch)
    both: tuple[UnitServer, UnitServer] = (servers, servers.reference)
    live: tuple[list[Job], list[Job]] = ([], [])
    for index in range(50):
        for _ in range(draw.choice([0, 0, 1, 1, 2])):
            prompt, output, priority = draw.randint(1, 9), draw.randint(1, 12), draw.randrange(values)
            for server, jobs in zip(both, live, strict=True):
                job = unit_job(1000 * index + len(jobs), server.now, prompt, output, priority=priority)
                server.add(job)
                jobs.append(job)
        if live[0] and draw.random() < 0.3:
            which, tier = draw.randrange(len(live[0])), draw.choice([None, 0, 1])
            for server, jobs in zip(both, live, strict=True):
                server.policy.move(jobs[which], tier)
                jobs[which].tier = tier
        waiting = [which for which, job in enumerate(live[0]) if not job.served]
        if waiting and draw.random() < 0.3:
            which, left = draw.choice(waiting), draw.random()
            for server, jobs in zip(both, live, strict=True):
                jobs[which].next_seconds = max(1.0, left * len(jobs[which].prompt))
                server.policy.refresh(jobs[which], server.now)
        share, way = draw.choice([1.0, 0.5]), draw.random() < 0.2
        for server in both:
            server.policy.share = share
            if way:
                server.policy.make_way()
        servers.check(*live)
        for server in both:
            server.step()
        assert servers.schedule[-1] == servers.reference.schedule[-1]
        for server, jobs in zip(both, live, strict=True):
            jobs[:] = [job for job in jobs if job.index not in server.finish]
        if live[0] and draw.random() < 0.2:  # aborted, as only those can be that do not run
            which = draw.randrange(len(live[0]))
            if live[0][which].waiting_since is not None and live[0][which].tier is None:
                for server, jobs in zip(both, live, strict=True):
                    server.abort(jobs.pop(which))
        servers.check(*live)
    orders = ([job.index for job in server.policy.iter_best(server.now)] for server in both)
    assert next(orders) == next(orders)


def test_an_order_asks_only_those_whose_jobs_are_looked_at() -> None:
    """However many values there are: what it costs does not depend on them."""
    asked: list[int] = []

    class Asked(FirstComeFirstServed):
        def iter_best(self, now: float) -> Iterator[Job]:
            asked.append(len(self))
            return super().iter_best(now)

        def make_way(self) -> None:
            asked.append(len(self))

        def next_deadline(self) -> float | None:
            asked.append(len(self))
            return None

        def settles(self) -> bool:
            asked.append(len(self))
            return False

        def backlog(self, now: float) -> float:
            asked.append(len(self))
            return super().backlog(now)

        def iter_tier(self, tier: int, worst_first: bool = False) -> Iterator[Job]:
            asked.append(len(self))
            return super().iter_tier(tier, worst_first)

    server = ByPriority(Asked)
    jobs = [unit_job(i, 0.0, 1, 2, priority=i) for i in range(1000)]
    for job in jobs:
        server.add(job, 0.0)
    assert server.backlog(0.0) == 1000.0
    server.move(jobs[700], 1)
    jobs[700].tier = 1
    asked.clear()
    server.make_way()
    assert [job.index for job, _ in zip(server.iter_best(0.0), range(3), strict=False)] == [0, 1, 2]
    assert not server.settles() and server.next_deadline() is None
    assert (server.work_ahead(jobs[500], 0.0), server.backlog(0.0), len(server)) == (500.0, 1000.0, 1000)
    assert list(server.iter_tier(1)) == [jobs[700]]
    assert len(asked) < 30


def test_who_is_served_after_its_order_is_told_the_share_of_the_latest() -> None:
    shares: list[float] = []

    class Told(FirstComeFirstServed):
        def on_service(self, job: Job, seconds: float, now: float) -> None:
            shares.append(self.share)

    server = ByPriority(Told)
    jobs = [unit_job(i, 0.0, 1, 2, priority=i) for i in range(2)]
    for job in jobs:
        server.add(job, 0.0)
    assert list(server.iter_best(0.0)) == jobs
    server.share = 0.5
    assert next(server.iter_best(1.0)) is jobs[0]
    server.on_service(jobs[1], 1.0, 1.0)
    assert shares == [0.5]


def test_levels_without_jobs_cost_nothing() -> None:
    levels = MultiLevelFeedbackQueue(quantum=1.0, num_levels=16, starvation_limit=None, skip_join=True)
    levels.add(unit_job(0, 0.0, 8, 1), 0.0)
    assert len({id(queue) for queue in levels._levels}) == 2


def test_equal_priorities_need_one_policy() -> None:
    made: list[FirstComeFirstServed] = []

    def make() -> FirstComeFirstServed:
        made.append(FirstComeFirstServed())
        return made[-1]

    server = ByPriority(make)
    for index in range(10):
        job = unit_job(index, 0.0, 1, 1, priority=7)
        server.add(job, 0.0)
        server.remove(job)
    assert len(made) == 1


def test_a_refused_job_leaves_no_trace() -> None:
    server = policy("srpt")
    job = unit_job(0, 0.0, 1, 1, priority=3)
    job.known_output = None
    with pytest.raises(InvalidRequest):
        server.add(job, 0.0)
    assert len(server) == 0 and list(server.iter_best(0.0)) == [] and server.next_deadline() is None
