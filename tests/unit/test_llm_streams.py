"""LLM: streams, timed arrivals, and what is left after an error, an interrupt or the end."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import toy_llm
from toy_llm import ToyWorld, expected, ids

from fastserve import EngineError, InvalidRequest, RequestOutput, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, seed=5)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    return toy_llm.enter(monkeypatch)


def test_stream_yields_growing_answers(world: ToyWorld) -> None:
    with world.llm() as llm:
        seen: list[RequestOutput] = list(llm.stream(["abc", "b"], GREEDY))
    for prompt in ("abc", "b"):
        tokens = [output.outputs[0].token_ids for output in seen if output.prompt == prompt]
        assert tokens == [expected(ids(prompt), GREEDY, 5)[: k + 1] for k in range(12)]
        assert [output.finished for output in seen if output.prompt == prompt] == [False] * 11 + [True]


def test_leaving_a_stream_aborts_it(world: ToyWorld) -> None:
    with world.llm() as llm:
        stream = llm.stream("abc", GREEDY)
        next(stream)
        stream.close()
        llm.generate("b", GREEDY)
        assert not llm._has_work and not llm._live
        unread = llm.stream("abc", GREEDY)
        del unread
        assert not llm._has_work


def test_two_streams_share_the_engine(world: ToyWorld) -> None:
    with world.llm() as llm:
        first, second = llm.stream("abc", GREEDY), llm.stream("b", GREEDY)
        next(first)
        *_, last_of_second = second  # runs the first one to its end, too
        *_, last_of_first = first
    assert last_of_first.outputs[0].token_ids == expected(ids("abc"), GREEDY, 5)
    assert last_of_second.outputs[0].token_ids == expected(ids("b"), GREEDY, 5)


def test_replay_admits_jobs_when_their_time_has_come(world: ToyWorld) -> None:
    """One second an iteration (and 0.01 a token): the third job finds the engine idle."""
    requests = [(0.0, "abc", GREEDY), (2.5, [7], GREEDY), (100.0, "b", GREEDY)]
    seen: list[str] = []
    with world.llm(policy="fcfs") as llm:
        world.clock.now = 50.0
        outputs = llm.replay(requests, lambda output: seen.append(output.request_id), request_ids=["x", "y", "z"])
        assert not llm._has_work
    assert [output.request_id for output in outputs] == ["x", "y", "z"]
    assert [output.metrics.arrival for output in outputs] == [50.0, 52.5, 150.0]
    for output, (_, _, params) in zip(outputs, requests, strict=True):
        assert output.outputs[0].token_ids == expected(output.prompt_token_ids, params, 5)
    x, y, z = (output.metrics for output in outputs)
    assert x.first_scheduled == 50.0 and z.first_scheduled == 150.0
    assert y.first_scheduled is not None and 52.5 <= y.first_scheduled <= 55.0
    assert z.jct == pytest.approx(12 * 1.01)
    assert seen.count("x") == seen.count("y") == seen.count("z") == 12


def test_replay_checks_everything_first(world: ToyWorld) -> None:
    with world.llm() as llm:
        for bad in ((-1.0, "a", GREEDY), (5.0, [61], GREEDY), (float("nan"), "a", GREEDY)):
            with pytest.raises(InvalidRequest, match=r"\(request 2 of 2\)"):
                llm.replay([(0.0, "abc", GREEDY), bad])
        with pytest.raises(InvalidRequest, match="request_id"):
            llm.replay([(0.0, "abc", GREEDY), (9.0, "b", GREEDY)], request_ids=["same", "same"])
        assert world.plans == [] and not llm._has_work


def test_an_engine_that_failed_says_so_from_then_on(world: ToyWorld) -> None:
    world.fail_at = 3
    with world.llm(policy="fcfs") as llm:
        with pytest.raises(EngineError, match="the device is gone"):
            llm.generate("abc", GREEDY)
        with pytest.raises(EngineError, match="the device is gone"):
            llm.generate("abc", GREEDY)


def test_a_closed_llm_says_so(world: ToyWorld) -> None:
    llm = world.llm()
    llm.close()
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.generate("abc", GREEDY)


def test_an_error_in_a_callback_leaves_nothing_behind(world: ToyWorld) -> None:
    def on_update(output: RequestOutput) -> None:
        raise KeyboardInterrupt

    with world.llm() as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.replay([(0.0, "abc", GREEDY)], on_update)
        (output,) = llm.generate("abc", GREEDY)
        assert not llm._has_work
    assert output.outputs[0].token_ids == expected(ids("abc"), GREEDY, 5)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Interrupts arrive even where the shell had them ignored, as it does for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_the_engine_waits_costs_it_nothing(world: ToyWorld) -> None:
    with world.llm(policy="fcfs") as llm:
        world.runtimes[-1].interrupt_at = 4
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["abc", "b"], GREEDY)
        outputs = llm.generate(["abc", "b"], GREEDY)
        assert llm._engine is not None
        llm._engine.check_integrity()
        assert not llm._has_work
    for output in outputs:
        assert output.outputs[0].token_ids == expected(output.prompt_token_ids, GREEDY, 5)
