"""What goes wrong with one request stays with it: rollback, names, failed answers, wrong types, forks."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_llm
from toy import expected_output
from toy_llm import CONTEXT, ToyWorld

from fastserve import EngineError, InvalidRequest, RequestOutput, SamplingParams, serving
from fastserve.outputs import Completion

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, seed=5)
TWO = SamplingParams(n=2, max_tokens=6, ignore_eos=True, seed=5)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    return toy_llm.enter(monkeypatch)


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def break_second_answers(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Answer 1 of a request cannot be followed; answer 0 can."""

    def completion(index: int, *rest: Any) -> Completion:
        if index == 1:
            raise error
        return Completion(index, *rest)

    monkeypatch.setattr(serving, "Completion", completion)


@pytest.mark.parametrize("error", [InvalidRequest("prompt", "no"), ZeroDivisionError("a bug"), KeyboardInterrupt()])
def test_a_request_that_fails_half_way_leaves_nothing(
    world: ToyWorld, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    with world.llm() as llm:
        with monkeypatch.context() as broken:
            break_second_answers(broken, error)
            with pytest.raises(type(error)):
                llm.generate("abc", TWO)
        assert llm._engine is not None
        assert not llm._engine.jobs and not llm._live and not llm._jobs
        assert tokens(llm.generate([4], GREEDY)[0]) == expected_output([4], GREEDY, 5, CONTEXT)


def test_an_unexpected_error_ends_one_stream_alone(world: ToyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    break_second_answers(monkeypatch, ZeroDivisionError("a bug"))

    async def last(stream: Any) -> RequestOutput:
        async for output in stream:
            final = output
        return final

    async def scenario() -> list[Any]:
        async with world.async_llm() as llm:
            streams = [last(llm.generate([4], params)) for params in (GREEDY, TWO, GREEDY)]
            results = await asyncio.gather(*streams, return_exceptions=True)
            return [*results, await last(llm.generate([9], GREEDY))]

    first, broken, second, later = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert isinstance(broken, ZeroDivisionError)
    assert tokens(first) == tokens(second) == expected_output([4], GREEDY, 5, CONTEXT)
    assert tokens(later) == expected_output([9], GREEDY, 5, CONTEXT)


@pytest.mark.parametrize("name", ["", 5, ["a"], b"a"])
def test_a_request_id_is_a_string(world: ToyWorld, name: Any) -> None:
    async def scenario() -> None:
        async with world.async_llm() as llm:
            with pytest.raises(InvalidRequest, match="request_id: must be a string that is not empty"):
                llm.generate([4], GREEDY, request_id=name)
            with pytest.raises(InvalidRequest, match="request_id"):
                llm.chat([{"role": "user", "content": "hi"}], GREEDY, name)

    asyncio.run(scenario())


def test_names_of_requests_and_of_answers_do_not_collide(world: ToyWorld) -> None:
    names = ["a", "a/0", "a/1", "req-0", "req-1", "a/0'"]
    requests = [(0.0, [4], TWO if name == "a" else GREEDY) for name in names]
    for order in (1, -1):
        with world.llm() as llm:
            llm.stream("abc", GREEDY)  # takes an automatic name
            running = llm.stream("abc", GREEDY)
            next(running)
            outputs = llm.replay(requests[::order], request_ids=names[::order])
            *_, automatic = running
        assert [output.request_id for output in outputs] == names[::order]
        for output, (_, prompt, params) in zip(outputs, requests[::order], strict=True):
            assert tokens(output) == expected_output(prompt, params, 5, CONTEXT)
        assert tokens(automatic) == expected_output(automatic.prompt_token_ids, GREEDY, 5, CONTEXT)


def test_an_answer_that_fails_says_why_and_spares_the_others(world: ToyWorld) -> None:
    failed: list[int] = []

    def no_token(result: Any) -> dict[int, str]:  # the first of the first result that has two
        if len(result.tokens) == 2 and not failed:
            failed.append(int(result.tokens[0]))
            return {0: "no probability left"}
        return {}

    world.no_token = no_token
    with world.llm(policy="fcfs") as llm:
        bad, good = llm.generate([[4], [9]], GREEDY)
        assert not llm._has_work
    assert failed and bad.finished
    assert (bad.finish_reason, bad.outputs[0].error, tokens(bad)) == ("error", "no probability left", [])
    assert (good.finish_reason, good.outputs[0].error) == ("length", None)
    assert tokens(good) == expected_output([9], GREEDY, 5, CONTEXT)


def _texts() -> Iterator[str]:
    yield "abc"


@pytest.mark.parametrize("prompts", [None, 5, b"abc", [b"abc"], {"a": 1}, [{"a": 1}], {4, 5}, _texts()])
def test_prompts_of_another_type_are_refused(world: ToyWorld, prompts: Any) -> None:
    with world.llm() as llm:
        for method in (llm.generate, llm.stream):
            with pytest.raises(InvalidRequest, match=r"^prompts?: must be text"):
                method(prompts, GREEDY)


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, [None], "greedy", 5])
def test_parameters_of_another_type_are_refused(world: ToyWorld, params: Any) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    with world.llm() as llm:
        for ask in (
            lambda: llm.generate("abc", params),
            lambda: llm.chat(conversation, params),
            lambda: llm.stream_chat(conversation, params),
            lambda: llm.replay([(0.0, "abc", params)]),
        ):
            with pytest.raises(InvalidRequest, match="sampling_params: must be SamplingParams"):
                ask()


@pytest.mark.parametrize("messages", [None, "hi", 5, {"role": "user"}, ["hi"], [[5]]])
def test_messages_of_another_type_are_refused(world: ToyWorld, messages: Any) -> None:
    with world.llm() as llm, pytest.raises(InvalidRequest, match="messages: must be a list of dicts"):
        llm.chat(messages, GREEDY)


@pytest.mark.parametrize("offset", [-1.0, float("nan"), float("inf"), 1.1e7, None, "1", True])
def test_an_arrival_is_within_months(world: ToyWorld, offset: Any) -> None:
    with world.llm() as llm, pytest.raises(InvalidRequest, match="arrival: must be 0 to 10000000 seconds"):
        llm.replay([(offset, "abc", GREEDY)])


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_memory": 1e9},
        {"kv_cache_memory": True},
        {"threads": "2"},
        {"max_num_seqs": 2.5},
        {"block_size": None},
        {"max_model_len": "100"},
        {"max_model_len": 100.5},
        {"seed": "a"},
        {"policy": ["fcfs"]},
        {"cost": {}},
        {"cost": 1.0},
        {"starvation_limit": "x"},
    ],
)
def test_options_of_another_type_are_named(world: ToyWorld, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as error:
        world.llm(**options)
    assert [error.value.field] == list(options)


def test_a_model_is_a_name_or_a_path(world: ToyWorld) -> None:
    for model in (None, 5, b"toy", "", ["toy"]):
        with pytest.raises(InvalidRequest, match="model: must be smollm2"):
            serving.ServingCore(model)  # type: ignore[arg-type]
    with serving.ServingCore(Path("some/toy"), cost=toy_llm.COST) as core:
        assert core.model == "some/toy"


def in_a_fork(ask: Any) -> str:
    """What `ask` raises in a child of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # the end of a child that hangs
        try:
            ask()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


def test_a_fork_is_told_and_the_parent_goes_on(world: ToyWorld) -> None:
    told = "EngineError: the engine was created in another process; create one after the fork"
    with world.llm() as llm:
        assert in_a_fork(lambda: llm.generate("abc", GREEDY)) == told
        stream = llm.stream("abc", GREEDY)
        next(stream)
        assert in_a_fork(lambda: next(stream)) == told
        assert in_a_fork(stream.close) == in_a_fork(llm.close) == ""
        *_, output = stream
    assert tokens(output) == expected_output(output.prompt_token_ids, GREEDY, 5, CONTEXT)


def test_a_fork_of_an_asynchronous_engine_is_told(world: ToyWorld) -> None:
    async def scenario() -> None:
        async with world.async_llm() as llm:
            told = in_a_fork(lambda: llm.generate([4], GREEDY))
            assert (
                told == f"{EngineError.__name__}: the engine was created in another process; create one after the fork"
            )
            assert in_a_fork(lambda: llm.abort("a")) == ""
            assert in_a_fork(llm.shutdown) == ""

    asyncio.run(scenario())
