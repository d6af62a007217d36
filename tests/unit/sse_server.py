"""A small honest OpenAI-compatible server, and the means to make it a dishonest one: a script says what it sends."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Of output asked for."""
        return int(self.body["max_tokens"])

    @property
    def prompt_tokens(self) -> int:
        prompt = self.body.get("prompt")
        if prompt is None:
            prompt = self.body["messages"][0]["content"]
        return len(prompt.split() if isinstance(prompt, str) else prompt)


class Wire:
    """What a script answers with."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        head = f"HTTP/1.1 {status} Whatever\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        await self.raw(head.encode() + body)

    async def begin(self) -> None:
        await self.raw(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        )

    async def text(self, text: str) -> None:
        """A chunk of a chunked body."""
        await self.raw(chunked(text.encode()))

    async def token(self, request: Request, number: int) -> None:
        await self.text(event(token(request, number)))

    async def end(self, request: Request, tokens: int | None = None, usage: bool = True) -> None:
        if usage:
            count = request.tokens if tokens is None else tokens
            both = {"prompt_tokens": request.prompt_tokens, "completion_tokens": count}
            await self.text(event({"choices": [], "usage": both}))
        await self.text("data: [DONE]\n\n")
        await self.raw(b"0\r\n\r\n")

    async def gone(self) -> None:
        """Until the client hangs up."""
        while await self._reader.read(1024):
            pass

    def reset(self) -> None:
        """Close with a TCP reset."""
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


Script = Callable[[Request, Wire], Awaitable[None]]


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


def token(request: Request, number: int) -> dict[str, Any]:
    """What vLLM sends for output token `number`, counted from 0: the last one has the reason."""
    reason = "length" if number == request.tokens - 1 else None
    if request.path.endswith("chat/completions"):
        return {"choices": [{"index": 0, "delta": {"content": f" w{number}"}, "finish_reason": reason}], "usage": None}
    return {"choices": [{"index": 0, "text": f" w{number}", "finish_reason": reason}], "usage": None}


async def honest(request: Request, wire: Wire) -> None:
    await wire.begin()
    if request.path.endswith("chat/completions"):
        await wire.text(event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
    for number in range(request.tokens):
        await wire.token(request, number)
    await wire.end(request)


@dataclass
class Server:
    """Serves in a thread of its own while it is entered."""

    script: Script
    models: Any = field(default_factory=lambda: {"data": [{"id": "some/model"}, {"id": "another"}]})
    models_status: int = 200
    requests: list[Request] = field(default_factory=list)  # in order of their coming
    open: int = 0
    peak: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._handle, "127.0.0.1", 0, backlog=1024), self._loop
        ).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def wait_for(self, requests: int) -> None:
        """Until so many have come."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.requests) >= requests, timeout=60)

    async def _close(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            line, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
            wire = Wire(reader, writer)
            if line.startswith("GET"):
                await wire.answer(self.models_status, json.dumps(self.models).encode())
                return
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            request = Request(line.split()[1], headers, body)
            with self.changed:
                self.requests.append(request)
                self.open += 1
                self.peak = max(self.peak, self.open)
                self.changed.notify_all()
            try:
                await self.script(request, wire)
            finally:
                self.open -= 1
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # a client may leave whenever it likes
        finally:
            writer.close()


@contextmanager
def serving(script: Script = honest, **more: Any) -> Iterator[Server]:
    with Server(script, **more) as server:
        yield server


def refusing(status: int, body: bytes, content_type: str = "application/json") -> Script:
    """Answers everybody with this."""

    async def script(request: Request, wire: Wire) -> None:
        await wire.answer(status, body, content_type)

    return script
