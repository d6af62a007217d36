"""Through a real uvicorn: clients that leave, OpenAI's client, and a server's life as a process sees it."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import openai
import pytest
from http_world import World, answer, ids, run, text_of

from fastserve.server.run import bind, url_of
from fastserve.server.settings import ServerSettings
from fastserve.types import InvalidRequest

PLAIN: dict[str, Any] = {"model": "toy", "prompt": "abc", "max_tokens": 12, "seed": 7}
IGNORE = {"ignore_eos": True}
TEXT = text_of(answer(ids("abc"), 7, max_tokens=12, ignore_eos=True))


async def raw(url: str, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection with a request on its way."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    writer.write(head.encode() + b"\r\n\r\n" + data)
    return reader, writer


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_jobs(stream: bool) -> None:
    async def scenario(world: World) -> None:
        async with world.served() as url:
            _, writer = await raw(url, {**PLAIN, **IGNORE, "n": 2, "stream": stream})
            await world.engine.until(lambda engine: len(engine.open_jobs) == 2)
            world.engine.step()  # a stream begins
            writer.transport.abort()
            await world.engine.until(lambda engine: not engine.open_jobs)
            assert all(job.closed and job.finish_reason is None for job in world.engine.opened)

    run(scenario, held=True)


def test_openais_client() -> None:
    async def scenario(world: World) -> None:
        async with world.served() as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k") as client:
            assert [model.id async for model in client.models.list()] == ["toy"]
            completion = await client.completions.create(**PLAIN, extra_body=IGNORE, logprobs=1)
            assert completion.choices[0].text == TEXT and completion.usage is not None
            assert completion.choices[0].logprobs is not None and len(completion.choices[0].logprobs.tokens or ()) == 12
            options: Any = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": IGNORE}
            chunks = [chunk async for chunk in await client.completions.create(**PLAIN, **options)]
            assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == TEXT
            assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12

            messages: Any = [{"role": "user", "content": "hi"}]
            asked: Any = {"model": "toy", "messages": messages, "max_completion_tokens": 5, "seed": 1}
            chat = await client.chat.completions.create(**asked, extra_body=IGNORE, logprobs=True, top_logprobs=1)
            said = text_of(answer(ids("uhiZa"), 1, max_tokens=5, ignore_eos=True))
            assert chat.choices[0].message.content == said
            assert chat.choices[0].logprobs is not None and len(chat.choices[0].logprobs.content or ()) == 5
            pieces = [piece async for piece in await client.chat.completions.create(**asked, **options)]
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == said

            with pytest.raises(openai.NotFoundError, match="is not served here"):
                await client.completions.create(model="gpt", prompt="a")
            with pytest.raises(openai.BadRequestError, match="temperature"):
                await client.completions.create(**PLAIN, temperature=-1)
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(api_key="other").models.list()

    run(scenario, api_key=("k",))


def test_an_error_within_a_stream_reaches_openais_client() -> None:
    async def scenario(world: World) -> None:
        async with world.served() as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k") as client:
            asking = asyncio.create_task(client.completions.create(**PLAIN, stream=True, extra_body=IGNORE))
            await world.engine.until(lambda engine: engine.open_jobs)
            world.engine.step()
            stream = await asking
            world.engine.opened[-1].end("error", "the device is gone")
            with pytest.raises(openai.APIError, match="the device is gone"):
                async for _ in stream:
                    pass
            world.engine.open_jobs.clear()

    run(scenario, held=True)


def test_many_streams_at_once_say_what_each_would_alone() -> None:
    async def scenario(world: World) -> None:
        async with world.served() as url:

            async def one(seed: int) -> str:
                reader, writer = await raw(url, {**PLAIN, **IGNORE, "seed": seed, "stream": True})
                text = (await reader.readuntil(b"[DONE]")).decode()
                writer.close()
                events = [line for line in text.splitlines() if line.startswith("data: {")]
                return "".join(json.loads(line[6:])["choices"][0]["text"] for line in events)

            texts = await asyncio.gather(*map(one, range(60)))
        for seed, text in enumerate(texts):
            assert text == text_of(answer(ids("abc"), seed, max_tokens=12, ignore_eos=True))

    run(scenario, max_num_seqs=5)


# --- addresses -------------------------------------------------------------------------------------------------------


def test_addresses() -> None:
    with bind(ServerSettings(model="toy", port=0)) as bound:
        assert url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequest, match=f"port: {port} of 127.0.0.1 is in use"):
            bind(ServerSettings(model="toy", port=port))
    with pytest.raises(InvalidRequest, match="host"):
        bind(ServerSettings(model="toy", host="192.0.2.1", port=0))  # of nobody: RFC 5737
