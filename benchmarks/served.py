"""A server in a process of its own, as a benchmark sees it: its address, its processes, and what they hold."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastserve.bench.serve.http import Response
from fastserve.bench.serve.sse import EventStream

_URL = re.compile(r"at http://([\d.]+):(\d+)/v1 ")
_TICK = 0.05  # seconds between looks


class ServerFailed(RuntimeError):
    """The server did not start, or did not answer as it has to. The message has its last lines."""


class Server:
    """`fastserve serve` with some options, from its start to its end; its log is kept in a file.

    >>> async with Server(["--model", "smollm2"]) as server:
    ...     await server.get("/health")
    """

    def __init__(self, options: Sequence[str]) -> None:
        self._command = [sys.executable, "-m", "fastserve", "serve", "--port", "0", *options]
        self.host, self.port = "", 0
        self.pid = 0

    async def __aenter__(self) -> Server:
        handle, name = tempfile.mkstemp(prefix="fastserve-log-")
        self._log = Path(name)
        with open(handle, "wb") as log:
            self._process = subprocess.Popen(self._command, stderr=log, stdin=subprocess.DEVNULL)
        self.pid = self._process.pid
        try:
            while (found := _URL.search(self.log())) is None:
                if self._process.poll() is not None:
                    raise ServerFailed(f"the server did not start:\n{self.log()}")
                await asyncio.sleep(_TICK)
        except BaseException:
            self._kill()
            self._log.unlink()
            raise
        self.host, self.port = found[1], int(found[2])
        await until(self._listens)
        return self

    async def __aexit__(self, *error: object) -> None:
        """SIGTERM, and SIGKILL for what is still there a minute later."""
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, 60)
        finally:
            self._kill()
            self._log.unlink()

    def log(self) -> str:
        """What it has written so far."""
        return self._log.read_text(errors="replace")

    async def get(self, path: str) -> bytes:
        """The body of an answer with status 200. Raises ServerFailed and OSError."""
        async with exchange(self, "GET", path) as answer:
            body = b"".join([piece async for piece in answer.pieces()])
            if answer.response.status != 200:
                raise ServerFailed(f"{path} answers {answer.response.status}: {body[:200]!r}")
        return body

    async def health(self) -> dict[str, Any]:
        return dict(json.loads(await self.get("/health")))

    async def jobs(self) -> dict[str, Any]:
        """What the server says of itself beside the list of its jobs."""
        return dict(json.loads(await self.get("/v1/fastserve/jobs"))["server"])

    async def metric(self, name: str) -> float:
        """The sum over all labels."""
        lines = (await self.get("/metrics")).decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))

    async def engine(self) -> int:
        """The pid of the engine, when one is up."""
        while True:
            with contextlib.suppress(ServerFailed):  # 503 while none is
                told = await self.health()
                if told["status"] == "ok":
                    return int(told["engine"]["pids"][0])
            await asyncio.sleep(_TICK)

    async def engines(self) -> list[int]:
        """The pids of all engines, when all are up."""
        while True:
            with contextlib.suppress(ServerFailed):  # 503 while none is
                told = await self.health()
                if all(engine["status"] == "ok" for engine in told["engines"]):
                    return [int(pid) for pid in told["engine"]["pids"]]
            await asyncio.sleep(_TICK)

    async def _listens(self) -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            await self.health()
            return True
        return False

    def _kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


async def until(condition: Any, seconds: float = 60.0) -> None:
    """Wait until an async condition holds. Raises TimeoutError."""

    async def wait() -> None:
        while not await condition():
            await asyncio.sleep(_TICK)

    await asyncio.wait_for(wait(), seconds)


# --- requests ---------------------------------------------------------------------------------------------------------


class Answer:
    """One answer as it comes, over a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.response = Response()

    async def pieces(self, size: int = 2**16) -> AsyncIterator[bytes]:
        """The body, as it is received; nothing follows where it was cut off, and `response` is not complete then."""
        while not self.response.complete:
            data = await self._reader.read(size)
            if not data:
                self.response.end()
                return
            yield self.response.feed(data)

    async def events(self, size: int = 2**16) -> AsyncIterator[bytes]:
        """The data of server-sent events."""
        stream = EventStream()
        async for piece in self.pieces(size):
            for event in stream.feed(piece):
                yield event

    def hang_up(self, *, reset: bool = False) -> None:
        """Close the connection; with `reset`, at once and as if the line had broken."""
        if reset:
            linger = struct.pack("ii", 1, 0)
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._writer.transport.abort()
        else:
            self._writer.close()


@contextlib.asynccontextmanager
async def exchange(
    server: Server,
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    sock: socket.socket | None = None,
    limit: int = 2**16,
    cut: bool = False,
) -> AsyncIterator[Answer]:
    """A request that has been sent; with `cut`, half of its body.

    `sock` is connected already; `limit` bounds what is read ahead, in bytes.
    """
    where: dict[str, Any] = {"sock": sock} if sock is not None else {"host": server.host, "port": server.port}
    reader, writer = await asyncio.open_connection(**where, limit=limit)
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: {server.host}\r\nConnection: close\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    writer.write(head.encode() + b"\r\n" + (data[: len(data) // 2] if cut else data))
    try:
        yield Answer(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
