"""OpenAI's own client, unchanged: what it sends, what it makes of the answers, and which exception each error is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest
from http_world import World, answer, ids, run, text_of

from fastserve.seeds import derived_seed

PLAIN: dict[str, Any] = {"model": "toy", "prompt": "abc", "max_tokens": 12, "seed": 7}
CHAT: dict[str, Any] = {
    "model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 9, "seed": 1
}  # fmt: skip
IGNORE: dict[str, Any] = {"extra_body": {"ignore_eos": True}}
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
PROMPT = ids("uhiZa")


def client_of(url: str, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", **{"max_retries": 0, **options})


def said(index: int, count: int = 9) -> str:
    return text_of(answer(PROMPT, derived_seed(1, index), max_tokens=count, ignore_eos=True))


def test_several_answers_as_they_grow() -> None:
    async def scenario(world: World) -> None:
        async with world.served() as url, client_of(url) as client:
            asked: dict[str, Any] = {**CHAT, **USAGE, **IGNORE, "n": 3, "logprobs": True, "top_logprobs": 2}
            chunks = [chunk async for chunk in await client.chat.completions.create(**asked)]
            *pieces, last = chunks
            assert last.usage is not None and last.usage.completion_tokens == 27
            assert set((last.usage.model_extra or {})["fastserve"]) >= {"queue", "prefill", "decode", "preemptions"}
            for index in range(3):
                own = [piece.choices[0] for piece in pieces if piece.choices[0].index == index]
                assert "".join(choice.delta.content or "" for choice in own) == said(index)
                assert own[0].delta.role == "assistant" and own[-1].finish_reason == "length"
                entries = [entry for choice in own if choice.logprobs for entry in choice.logprobs.content or ()]
                assert len(entries) == 9 and all(len(entry.top_logprobs) == 2 for entry in entries)

            old: dict[str, Any] = {**PLAIN, **USAGE, **IGNORE, "prompt": ["abc", "b"], "n": 2}
            texts = ["", "", "", ""]
            async for chunk in await client.completions.create(**old):
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
            expected = [
                text_of(answer(ids(prompt), derived_seed(7, index), max_tokens=12, ignore_eos=True))
                for prompt in ("abc", "b")
                for index in range(2)
            ]
            assert texts == expected

    run(scenario)


def test_the_helper_for_streams() -> None:
    """client.chat.completions.stream puts chunks together by itself, and is strict about them."""

    async def scenario(world: World) -> None:
        async with world.served() as url, client_of(url) as client:
            stop = said(0)[6:8]  # the helper takes an answer that its length ends for an error
            async with client.chat.completions.stream(**CHAT, **IGNORE, stop=[stop]) as stream:
                deltas = [event.delta async for event in stream if event.type == "content.delta"]
                whole = await stream.get_final_completion()
            assert "".join(deltas) == whole.choices[0].message.content == said(0)[: said(0).index(stop)] != ""

    run(scenario)


def test_stop_seed_and_raw_responses() -> None:
    async def scenario(world: World) -> None:
        async with world.served() as url, client_of(url) as client:
            stop = said(0)[4:6]
            chat = await client.chat.completions.create(**CHAT, **IGNORE, stop=[stop, "never"])
            assert chat.choices[0].message.content == said(0)[: said(0).index(stop)]
            assert chat.choices[0].finish_reason == "stop"
            first, again = [await client.chat.completions.create(**CHAT, **IGNORE) for _ in range(2)]
            assert first.choices[0].message.content == again.choices[0].message.content == said(0)
            drawn = {**CHAT, **IGNORE, "seed": None, "max_completion_tokens": 30}
            texts = [(await client.chat.completions.create(**drawn)).choices[0].message.content for _ in range(2)]
            assert texts[0] != texts[1]

            raw = await client.completions.with_raw_response.create(**PLAIN, extra_headers={"X-Request-Id": "mine"})
            assert raw.headers["x-request-id"] == "mine" and raw.parse().id == "cmpl-mine"
            assert raw.parse()._request_id == "mine"
            async with client.completions.with_streaming_response.create(**PLAIN) as streamed:
                assert streamed.status_code == 200 and (await streamed.json())["object"] == "text_completion"
            models = [model async for model in client.models.list()]
            assert [model.id for model in models] == ["toy"]
            assert (await client.models.retrieve("toy")).owned_by == "fastserve"

    run(scenario)


def test_the_client_that_does_not_wait_for_a_loop() -> None:
    def ask(url: str) -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="k") as client:
            whole = client.chat.completions.create(**CHAT, **IGNORE).choices[0].message.content or ""
            pieces = client.chat.completions.create(**CHAT, **USAGE, **IGNORE)
            return whole, "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)

    async def scenario(world: World) -> None:
        async with world.served() as url:
            assert await asyncio.to_thread(ask, url) == (said(0), said(0))

    run(scenario)


def test_each_error_is_the_exception_it_should_be() -> None:
    async def scenario(world: World) -> None:
        async with world.served() as url, client_of(url) as client:

            async def fails(kind: type[openai.APIStatusError], code: str, **body: Any) -> openai.APIStatusError:
                with pytest.raises(kind) as caught:
                    await client.completions.create(**{**PLAIN, **body})
                assert type(caught.value) is kind and caught.value.code == code
                assert caught.value.response.headers["x-request-id"] == caught.value.request_id
                return caught.value

            wrong = await fails(openai.BadRequestError, "invalid_value", temperature=-1)
            assert wrong.param == "temperature" and wrong.status_code == 400
            tools: Any = [{"type": "function", "function": {"name": "f"}}]
            with pytest.raises(openai.BadRequestError, match="tools: is not supported"):
                await client.chat.completions.create(**CHAT, tools=tools)
            await fails(openai.BadRequestError, "context_length_exceeded", prompt="a" * 300)
            await fails(openai.NotFoundError, "model_not_found", model="gpt")
            with pytest.raises(openai.AuthenticationError, match="not one of this server's"):
                await client.with_options(api_key="other").completions.create(**PLAIN)

            holding = asyncio.create_task(client.completions.create(**PLAIN, n=2))
            await world.engine.until(lambda engine: len(engine.open_jobs) == 2)
            full = await fails(openai.RateLimitError, "queue_full")
            assert int(full.response.headers["retry-after"]) >= 1 and full.type == "rate_limit_error"
            world.engine.release()
            await holding

            world.engine.failure = "the model's file is gone"
            gone = await fails(openai.InternalServerError, "engine_unavailable")
            assert gone.status_code == 503 and "file is gone" in gone.message
            world.engine.failure = None
            world.service.drain()
            assert (await fails(openai.InternalServerError, "shutting_down")).status_code == 503

    run(scenario, held=True, max_num_seqs=1, max_queue=1, api_key=("k",))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_waits_no_longer_ends_its_job(stream: bool) -> None:
    async def scenario(world: World) -> None:
        async with world.served() as url, client_of(url, timeout=0.5) as client:
            with pytest.raises(openai.APITimeoutError):
                await client.completions.create(**PLAIN, stream=stream)
            await world.engine.until(lambda engine: not engine.open_jobs)
            assert [job.closed for job in world.engine.opened] == [True]

    run(scenario, held=True)


def test_a_full_server_is_tried_again() -> None:
    """The client waits as long as Retry-After says, and gets its answer."""

    async def scenario(world: World) -> None:
        async with world.served() as url, client_of(url, max_retries=2) as client:
            holding = asyncio.create_task(client.completions.create(**PLAIN))
            await world.engine.until(lambda engine: engine.open_jobs)
            waiting = asyncio.create_task(client.completions.create(**PLAIN))
            await until(lambda: world.service.admission.refused["queue_full"] == 1)
            world.engine.release()
            assert (await holding).choices[0].text == (await waiting).choices[0].text

    run(scenario, held=True, max_num_seqs=1, max_queue=0)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)
