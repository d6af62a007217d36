"""What is learned of programs, and that their calls share what they were served."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from toy import VOCAB, Toy, bare_job

from fastserve import programs as programs_module
from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel, quantum_of
from fastserve.policies import create_policy
from fastserve.programs import Programs, Quantiles
from fastserve.types import FinishReason, Job, SamplingParams


def call(index: int, program: str | None, tenant: str = "", charged: float = 0.0) -> Job:
    job = bare_job(index, 1.0)
    job.program, job.tenant, job.charged = program, tenant, charged
    return job


def run(programs: Programs, job: Job, start: float, end: float, reason: FinishReason = FinishReason.STOP) -> None:
    programs.arrived(job, start)
    job.finish_reason = reason
    programs.ended(job, end)


def test_calls_share_what_they_were_served() -> None:
    programs = Programs()
    run(programs, call(0, "a", charged=3.0), 0.0, 1.0)
    live = call(1, "a", charged=0.5)
    programs.arrived(live, 2.0)
    assert programs.served(call(2, "a")) == 3.5
    live.charged = 2.0
    programs.on_service(live, 1.5)
    assert programs.served(call(2, "a")) == 5.0
    assert programs.served(call(2, "a", tenant="other")) == programs.served(call(2, "b")) == 0.0
    assert programs.served(call(2, None)) == 0.0


def test_a_job_that_a_lost_engine_left_counts_once() -> None:
    """It brings its own service, of which this engine has not heard: others inherit it, itself does not."""
    programs = Programs()
    resumed = call(0, "a", charged=7.0)
    resumed.output = [5, 6]
    assert programs.served(resumed) == 0.0
    programs.arrived(resumed, 0.0)
    assert programs.served(call(1, "a")) == 7.0
    resumed.finish_reason = FinishReason.STOP
    programs.ended(resumed, 1.0)
    assert programs.served(call(1, "a")) == 7.0


def test_several_answers_are_one_call() -> None:
    programs = Programs()
    answers = [call(index, "a") for index in range(3)]
    for job in answers:
        assert programs.number(job) == 1
        programs.arrived(job, 0.0)
    for job in answers:
        programs.ended(job, 4.0 + job.index)
    assert programs.number(call(9, "a")) == 2 and programs.number(call(9, "b")) == 1
    assert programs.number(call(9, None)) == 0


def chain(programs: Programs, name: str, start: float, calls: int, thought: float, first: int = 0) -> float:
    now = start
    for index in range(calls):
        run(programs, call(first + index, name), now, now + 1.0)
        now += 1.0 + thought
    return now - thought


def test_kv_is_kept_for_as_long_as_nine_in_ten_thoughts_take() -> None:
    programs, draw = Programs(), np.random.default_rng(0)
    thoughts = draw.lognormal(1.0, 0.8, 2000)
    now = 0.0
    for number, thought in enumerate(thoughts.tolist()):
        now = chain(programs, str(number), now, 2, thought)
    job = call(9, "new")
    run(programs, job, now, now)
    assert programs.keep_until(job, now) - now == pytest.approx(float(np.quantile(thoughts, 0.9)), rel=0.15)


def test_a_programs_own_thoughts_tell_more_than_those_of_others() -> None:
    programs = Programs()
    now = 0.0
    for number in range(100):
        now = chain(programs, f"quick {number}", now, 3, 1.0)
    now = chain(programs, "slow", now, 12, 20.0)
    chain(programs, "quick", now - 2.0, 2, 1.0)
    run(programs, call(0, "new"), now, now)
    until = {}
    for name in ("quick", "slow", "new"):
        job = call(0, name)
        job.finish_reason = FinishReason.STOP
        until[name] = programs.keep_until(job, now) - now
    assert 0.5 < until["quick"] < 2 and 0.5 < until["new"] < 2
    assert 5 < until["slow"] < 30


def kept(programs: Programs, name: str, now: float, calls: int = 1, tenant: str = "") -> bool:
    for number in range(calls):
        job = call(number, name, tenant)
        run(programs, job, now, now)
    return programs.keep_until(job, now) > now


def test_nothing_is_kept_for_programs_of_one_call_nor_for_what_was_aborted() -> None:
    programs = Programs()
    assert not kept(programs, "first", 0.0)  # a name says little, and
    assert kept(programs, "second", 0.0, calls=2)  # a second call much
    assert programs.keep_until(call(0, None), 1.0) == 1.0
    aborted = call(1, "second")
    run(programs, aborted, 0.0, 1.0, FinishReason.ABORT)
    assert programs.keep_until(aborted, 1.0) == 1.0
    for number in range(200):
        run(programs, call(number, str(number)), 10.0 * number, 10.0 * number + 1)
    assert not kept(programs, "last", 5000.0)
    now = 5000.0
    for number in range(200):
        now = chain(programs, f"three {number}", now, 3, 2.0) + 1.0
    assert kept(programs, "two", now + 1e5, calls=2) and not kept(programs, "three", now + 1e5, calls=3)


def test_kv_is_kept_for_an_hour_at_most() -> None:
    programs, now = Programs(), 0.0
    for index in range(40):  # a program that calls once a day
        now += 86_400.0
        run(programs, call(index, "a"), now, now + 1.0)
    assert programs.keep_until(call(40, "a"), now) == now + 3600.0


def test_a_name_for_every_call_keeps_nothing_whatever_other_tenants_do() -> None:
    programs, now = Programs(), 0.0
    for number in range(60):
        now = chain(programs, f"agent {number}", now, 4, 1.0) + 1.0
        for more in range(5):
            run(programs, call(0, f"{number} {more}", "names"), now, now)
    now += 1000.0
    run(programs, call(0, "later"), now, now)
    assert programs.ends(1, "names") > 0.9 and programs.ends(1, "") < 0.2
    assert not kept(programs, "once more", now, tenant="names") and kept(programs, "agent", now)
    assert programs.ends(1, "unknown") == programs.ends(1)  # by what all do, while nothing is known


def test_tenants_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs_module, "_MOST_TENANTS", 10)
    programs = Programs()
    for number in range(100):
        for now in (2.0 * number, 2.0 * number + 1.0):
            run(programs, call(0, "agent", str(number)), now, now)
    assert len(programs._own) == 10 and programs.ends(1, "99") < programs.ends(1, "0") == programs.ends(1)


def test_what_live_calls_were_served_is_not_summed_anew() -> None:
    """One that comes to many live ones looks at none of them."""
    programs = Programs()
    for index in range(1000):
        programs.arrived(call(index, "a", charged=1.0), 0.0)
    program = programs._live["", "a"]
    program.live = NotIterable(program.live)
    assert programs.served(call(1000, "a")) == 1000.0


class NotIterable(dict[Job, None]):
    def __iter__(self) -> Iterator[Job]:
        raise AssertionError("looked at")


def test_how_many_calls_programs_make_is_learned_and_a_late_return_is_taken_back() -> None:
    programs = Programs()
    now = 0.0
    for number in range(300):
        now = chain(programs, str(number), now, 3, 2.0) + 1.0
    chain(programs, "end", now + 1e5, 1, 0.0)
    assert programs.ends(3) > 0.95 and programs.ends(1) < 0.05 and programs.ends(2) < 0.05
    ended = programs.ends(3)
    programs.arrived(call(0, "17"), now + 2e5)
    assert programs.ends(3) < ended


def alike(programs: Programs, count: int, group: int, calls: int, charged: float, start: float) -> float:
    """Programs of so many calls that all begin alike, one after the other; returns when the last has long ended."""
    now = start
    for number in range(count):
        for index in range(calls):
            job = call(index, f"{group}-{number}-{start}", charged=charged)
            job.group, job.finish_reason = group, FinishReason.STOP
            run(programs, job, now, now + 0.5)
            now += 1.0
        now += 1e4  # given up
    return now


def test_programs_that_begin_alike_are_of_a_kind() -> None:
    """Those of group 7 make two calls of 1 s, those of group 9 ten of 4 s; of either it takes eight to tell."""
    programs = Programs()
    first = call(0, "new")
    first.group = 7
    now = alike(programs, 4, 7, 2, 1.0, 0.0)
    assert programs.kind(first) == 0
    now = alike(programs, 20, 7, 2, 1.0, now)
    now = alike(programs, 20, 9, 10, 4.0, now)
    run(programs, call(0, "another"), now, now)  # time has gone on
    assert programs.kind(first) == 7
    assert programs.ends(2, kind=7) > 0.7 and programs.ends(2, kind=9) < 0.2 and programs.ends(10, kind=9) > 0.7
    assert programs.call_seconds(7) == pytest.approx(1.0, rel=0.1)
    assert programs.call_seconds(9) == pytest.approx(4.0, rel=0.1)
    assert 1.0 < programs.call_seconds() < 4.0 and programs.call_seconds(3) == programs.call_seconds()
    later = call(3, "new")  # its prompt may begin otherwise: its program began with that of group 7
    programs.arrived(first, now)
    assert programs.kind(later) == 7 and programs.kind(call(0, None)) == 0


def test_gittins_prefers_the_kind_that_is_sooner_done() -> None:
    programs = Programs()
    config, cost = SchedulerConfig(policy="gittins", starvation_limit=None), CostModel.constant(1.0)
    policy = create_policy(config, cost, programs)
    now, index = 0.0, 0

    def come(name: str, group: int) -> Job:
        nonlocal index
        index += 1
        job = call(index, name)
        job.max_output, job.group = 4096, group
        policy.add(job, now)
        programs.arrived(job, now)
        return job

    for number in range(150):
        group, calls = ((7, 2), (9, 10))[number % 2]
        for _ in range(calls):
            job = come(f"p{number}", group)
            list(policy.iter_best(now))
            job.served, job.output, job.charged = 20, [0] * 20, 1.0
            policy.on_service(job, 1.0, now)
            job.finish_reason = FinishReason.STOP
            policy.on_finish(job, 20, now)
            policy.remove(job)
            programs.ended(job, now + 0.5)
            now += 1.0
        now += 1e4
    come("long", 9), come("short", 7)
    assert [job.program for job in policy.iter_best(now)] == ["short", "long"]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs_module, "_MOST_IDLE", 100)
    programs = Programs()
    for number in range(1000):
        run(programs, call(number, str(number), charged=1.0), number / 10, number / 10 + 0.05)
        assert len(programs) <= 100
    assert programs.served(call(0, "999")) == 1.0 and programs.served(call(0, "0")) == 0.0


def test_quantiles_are_those_of_the_numbers() -> None:
    numbers = np.random.default_rng(3).lognormal(0, 2, 3000)
    quantiles = Quantiles()
    for number in numbers.tolist():
        quantiles.add(number)
    for share in (0.1, 0.5, 0.9):
        assert quantiles.at(share) == pytest.approx(float(np.quantile(numbers, share)), rel=0.2)


def add(toy: Toy, name: str, program: str | None, max_tokens: int, prompt: int = 1) -> Job:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return toy.engine.add_job(name, [1] * prompt, params, seed=0, vocab_size=VOCAB, program=program)


@pytest.mark.parametrize("policy", ["mlfq", "skip-join-mlfq"])
def test_an_agents_next_call_waits_where_its_last_one_was(policy: str) -> None:
    """Quanta 1, 2, 4, … s: after 8 s of service a program is in level 3, where 7 s have been spent before."""
    toy = Toy(policy=policy, max_num_seqs=1, num_levels=6)
    add(toy, "a", "agent", 8)
    toy.run()
    later, new = add(toy, "b", "agent", 3), add(toy, "c", "other", 3)
    assert later.inherited == 8.0 and toy.engine.scheduler.policy.level(later) == 3
    assert new.inherited == 0.0 and toy.engine.scheduler.policy.level(new) == 0
    toy.run()
    assert toy.ran.split()[8:] == ["c", "c", "c", "b", "b", "b"]


def test_calls_of_no_program_start_anew() -> None:
    toy = Toy(max_num_seqs=1, num_levels=6)
    add(toy, "a", None, 8)
    toy.run()
    assert add(toy, "b", None, 3).inherited == 0.0


def test_an_aborted_call_counts_too() -> None:
    toy = Toy(max_num_seqs=1, num_levels=6)
    add(toy, "a", "agent", 8)
    for _ in range(4):
        toy.engine.step()
    toy.engine.abort("a")
    assert add(toy, "b", "agent", 3).inherited == 4.0


def test_gittins_prefers_programs_that_are_nearly_done() -> None:
    """All programs make four calls, of 20 tokens each: the fourth is 20 s from its end, the first four times that."""
    programs = Programs()
    config, cost = SchedulerConfig(policy="gittins", starvation_limit=None), CostModel.constant(1.0)
    policy = create_policy(config, cost, programs)
    charged = 20 * quantum_of(cost, config.max_num_seqs)
    draw, now, index = random.Random(0), 0.0, 0

    def new(name: str) -> Job:
        nonlocal index
        index += 1
        job = call(index, name)
        job.max_output = 4096
        policy.add(job, now)
        programs.arrived(job, now)
        return job

    def finish(job: Job) -> None:
        job.served, job.output, job.charged = 20, [0] * 20, charged
        policy.on_service(job, charged, now)
        programs.on_service(job, charged)
        job.finish_reason = FinishReason.STOP
        policy.on_finish(job, 20, now)
        policy.remove(job)
        programs.ended(job, now)

    for number in range(200):
        for _ in range(4):
            job = new(f"p{number}")
            list(policy.iter_best(now))
            now += draw.uniform(1, 2)
            finish(job)
            now += 1.0
    for calls, name in ((0, "first"), (3, "last"), (2, "third")):
        for _ in range(calls):
            finish(new(name))
    now += 1.0
    waiting = [new(name) for name in ("first", "third", "last")]
    assert [job.program for job in policy.iter_best(now)] == ["last", "third", "first"]
    assert sorted(waiting, key=policy.rank) == waiting[::-1]
