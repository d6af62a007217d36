"""AsyncLLM: many streams at once, aborts, cancellation, failure and shutdown."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import toy_llm
from toy import expected_output
from toy_llm import CONTEXT, ToyWorld

from fastserve import AsyncLLM, EngineError, InvalidRequest, RequestOutput, SamplingParams

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, seed=5)
SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, seed=5)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    return toy_llm.enter(monkeypatch)


def run(scenario: Callable[[AsyncLLM], Any], world: ToyWorld, **options: Any) -> Any:
    async def main() -> Any:
        async with world.async_llm(**options) as llm:
            result = await asyncio.wait_for(scenario(llm), 60)
            return result, llm

    return asyncio.run(main())[0]


class Gate:
    """Holds the engine's thread in its third iteration until `open` is set, so that a job cannot end too soon."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self._iterations = 0

    def __call__(self, record: Any) -> None:
        self._iterations += 1
        if self._iterations == 3:
            assert self.open.wait(60)


async def last(stream: Any) -> RequestOutput:
    async for output in stream:
        final = output
    return final


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def test_concurrent_streams_get_the_words_they_would_get_alone(world: ToyWorld) -> None:
    prompts = [[k, k + 4] for k in range(20)]

    async def scenario(llm: AsyncLLM) -> list[RequestOutput]:
        return list(await asyncio.gather(*(last(llm.generate(prompt, LONG)) for prompt in prompts)))

    outputs = run(scenario, world, max_num_seqs=3, max_num_batched_tokens=8)
    assert len({output.request_id for output in outputs}) == 20
    for prompt, output in zip(prompts, outputs, strict=True):
        assert tokens(output) == expected_output(prompt, LONG, 5, CONTEXT)


def test_a_stream_grows_and_ends_with_a_finished_output(world: ToyWorld) -> None:
    async def scenario(llm: AsyncLLM) -> list[RequestOutput]:
        return [output async for output in llm.chat([{"role": "user", "content": "hi"}], LONG, "mine")]

    outputs = run(scenario, world)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert {(output.request_id, output.prompt) for output in outputs} == {("mine", "uhiZa")}
    for earlier, later in pairwise(outputs):
        grown = tokens(later)
        assert grown[: len(tokens(earlier))] == tokens(earlier) and len(grown) > len(tokens(earlier))


def test_abort_ends_the_stream_and_spares_others(world: ToyWorld) -> None:
    gate = Gate()

    async def scenario(llm: AsyncLLM) -> tuple[RequestOutput, RequestOutput]:
        other = asyncio.ensure_future(last(llm.generate([9], LONG)))
        stream = llm.generate([4], LONG, "x")
        await stream.__anext__()
        llm.abort("x")
        gate.open.set()
        aborted = await last(stream)
        llm.abort("x")
        llm.abort("unknown")
        return aborted, await other

    aborted, other = run(scenario, world, on_iteration=gate)
    assert aborted.outputs[0].finish_reason == "abort" and aborted.finished
    assert tokens(aborted) == expected_output([4], LONG, 5, CONTEXT)[: len(tokens(aborted))]
    assert len(tokens(aborted)) <= 3
    assert tokens(other) == expected_output([9], LONG, 5, CONTEXT)


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_consumer_that_leaves_takes_its_job_along(world: ToyWorld, how: str) -> None:
    gate = Gate()

    async def scenario(llm: AsyncLLM) -> int:
        stream = llm.generate([4], LONG, "x")
        await stream.__anext__()
        if how == "cancel":
            task = asyncio.ensure_future(last(stream))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await stream.aclose()  # type: ignore[attr-defined]
        gate.open.set()
        # Commands run in order: when this one is done, so is the abort.
        await last(llm.generate([5], SHORT))
        return len(llm._live)

    assert run(scenario, world, on_iteration=gate) == 0


def test_bad_requests_fail_alone(world: ToyWorld) -> None:
    gate = Gate()

    async def scenario(llm: AsyncLLM) -> RequestOutput:
        good = llm.generate([4], LONG, "x")
        await good.__anext__()
        bad = [last(llm.generate(prompt, SHORT, name)) for prompt, name in (([], "a"), ([61], "b"), ([4], "x"))]
        failures = asyncio.gather(*bad, return_exceptions=True)
        await asyncio.sleep(0)
        gate.open.set()
        fields = [error.field for error in await failures if isinstance(error, InvalidRequest)]
        assert fields == ["prompt", "prompt", "request_id"]
        return await last(good)

    assert tokens(run(scenario, world, on_iteration=gate)) == expected_output([4], LONG, 5, CONTEXT)


def test_a_failure_reaches_every_open_stream(world: ToyWorld) -> None:
    world.fail_at = 10

    async def scenario(llm: AsyncLLM) -> list[Any]:
        streams = [last(llm.generate([k], LONG)) for k in range(5)]
        results = await asyncio.gather(*streams, return_exceptions=True)
        with pytest.raises(EngineError, match="the device is gone"):
            await last(llm.generate([4], SHORT))
        llm.abort("anything")
        return list(results)

    for result in run(scenario, world, policy="fcfs"):
        assert isinstance(result, EngineError) and "the device is gone" in str(result)


def test_shutdown_ends_open_streams(world: ToyWorld) -> None:
    gate = Gate()

    async def scenario(llm: AsyncLLM) -> None:
        stream = llm.generate([4], LONG)
        await stream.__anext__()
        stopped = asyncio.ensure_future(asyncio.to_thread(llm.shutdown))
        while not llm._stopping:
            await asyncio.sleep(0)
        gate.open.set()
        await stopped
        with pytest.raises(EngineError, match="closed"):
            await last(stream)
        with pytest.raises(EngineError, match="closed"):
            await last(llm.generate([4], SHORT))
        llm.shutdown()

    run(scenario, world, on_iteration=gate)


def test_stop_strings_and_several_answers(world: ToyWorld) -> None:
    params = SamplingParams(n=4, max_tokens=40, ignore_eos=True, seed=5, stop=["a", "b"])

    async def scenario(llm: AsyncLLM) -> RequestOutput:
        return await last(llm.generate([4], params))

    output = run(scenario, world)
    with world.llm() as llm:
        (same,) = llm.generate([4], params)
    assert [(a.text, a.token_ids, a.finish_reason) for a in output.outputs] == [
        (a.text, a.token_ids, a.finish_reason) for a in same.outputs
    ]


def test_tenant_program_and_salt_reach_the_job(world: ToyWorld) -> None:
    gate = Gate()

    async def scenario(llm: AsyncLLM) -> None:
        given: dict[str, Any] = {"tenant": "ann", "program_id": "agent", "cache_salt": "s"}
        answers = [
            asyncio.ensure_future(last(llm.generate([1, 2], LONG, **given))),
            asyncio.ensure_future(last(llm.chat([{"role": "user", "content": "a"}], LONG, **given))),
        ]
        found: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def look() -> None:
            jobs = [(job.tenant, job.program, job.cache_salt) for job in llm._engine.jobs]  # type: ignore[union-attr]
            loop.call_soon_threadsafe(found.set_result, jobs)

        await asyncio.sleep(0)
        llm._send(look)
        gate.open.set()
        assert await found == [("ann", "agent", "s")] * 2
        await asyncio.gather(*answers)
        with pytest.raises(InvalidRequest, match="tenant: must be a string"):
            llm.generate([1], SHORT, tenant=4)  # type: ignore[arg-type]

    run(scenario, world, on_iteration=gate)
