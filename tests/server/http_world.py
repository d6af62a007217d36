"""The application over a toy engine, and clients of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx
import uvicorn
from toy import expected_output
from toy_engine import ToyEngine
from toy_llm import ALPHABET, CONTEXT

from fastserve.server.app import create_app
from fastserve.server.service import Service
from fastserve.server.settings import ServerSettings
from fastserve.types import SamplingParams


class World:
    """`client` talks to the application in this process, without a socket."""

    def __init__(self, engine: ToyEngine, **settings: Any) -> None:
        self.engine = engine
        self.service = Service(ServerSettings(**{"model": "toy", **settings}), engine, engine.tokenizer)
        self.app = create_app(self.service)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://toy", timeout=30)

    async def post(self, path: str, body: Any = None, *, status: int = 200, **options: Any) -> Any:
        """The answer's JSON; any other status than the expected fails the test."""
        given = {"json": body} if body is not None else {}
        response = await self.client.post(path, **given, **options)
        assert response.status_code == status, response.text
        self.headers = response.headers
        return response.json()

    async def get(self, path: str, *, status: int = 200, **options: Any) -> Any:
        response = await self.client.get(path, **options)
        assert response.status_code == status, response.text
        self.headers = response.headers
        return response.json()

    async def refuse(self, path: str, body: Any, *, status: int = 400, **options: Any) -> dict[str, Any]:
        """The error that a request gets."""
        error = (await self.post(path, body, status=status, **options))["error"]
        assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
        return dict(error)

    async def events(self, path: str, body: Any) -> list[dict[str, Any]]:
        """What a stream says, without the [DONE] that has to end it."""
        response = await self.client.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return parse(response.text)

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        """The application behind a real uvicorn; its URL."""
        config = uvicorn.Config(self.app, host="127.0.0.1", port=0, log_config=None, lifespan="off", access_log=False)
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup()
        main = asyncio.create_task(server.main_loop())
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            await main
            await server.shutdown()


def parse(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def run(
    scenario: Callable[[World], Coroutine[Any, Any, None]], make: Callable[..., ToyEngine] = ToyEngine, **options: Any
) -> None:
    """Run a scenario, and see that it leaves no job, no place and no task behind."""
    engine_options = {name: options.pop(name) for name in ("max_num_seqs", "held", "policy") if name in options}

    async def main() -> None:
        world = World(make(**engine_options), **options)
        before = asyncio.all_tasks()
        async with world.client:
            await asyncio.wait_for(scenario(world), 60)
            await world.engine.stop()
        for _ in range(100):  # of the loop, for what was cancelled to end
            await asyncio.sleep(0)
        assert not world.engine.open_jobs and not world.service.calls and not world.service.request_ids
        assert not world.service.admission.open_jobs and not world.service.admission.users
        assert asyncio.all_tasks() == before

    asyncio.run(main())


def answer(prompt: list[int], seed: int, **params: Any) -> list[int]:
    return expected_output(prompt, SamplingParams(**params), seed, CONTEXT)


def ids(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


def text_of(tokens: list[int]) -> str:
    return "".join(ALPHABET[token] for token in tokens if ALPHABET[token] != "<")
