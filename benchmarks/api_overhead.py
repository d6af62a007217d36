"""What the HTTP layer costs: CPU per streamed token, through the real uvicorn, beside a bare FastAPI stream.

    python benchmarks/api_overhead.py --streams 32 --tokens 300

A process serves; its engine is a loop that gives every open job a token and waits until all streams have sent theirs,
so a token is one wake and one send. This process is the client, over plain sockets. The CPU time of the server's
process from the first token to the last, divided by the tokens, includes uvicorn, the kernel's sends and the loop that
gives out tokens. `bare` is a StreamingResponse whose generator waits for the same loop and yields a constant. Kinds
take turns; medians are told. Then one request at a time, whose first token is there at once: milliseconds to the first
byte.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

PIECE = " token"
KINDS = ("bare", "completions", "chat", "completions, usage", "completions, logprobs")


# --- the process that serves -----------------------------------------------------------------------------------------


class Job:
    """Grows when the loop says so."""

    def __init__(self, key: int, prompt: list[int], params: Any, user: str | None) -> None:
        self.key, self.prompt, self.params, self.user = key, prompt, params, user
        self.output: list[int] = []
        self.logprobs: list[Any] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.stop_reason = self.error = self.metrics = None
        self.engine: Engine
        self._waiter: asyncio.Future[None] | None = None

    async def news(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        self.engine.taken()
        await self._waiter

    def grow(self, last: bool) -> None:
        from fastserve.types import TokenLogprobs

        self.output.append(4)
        self.text += PIECE
        if self.params is not None and self.params.logprobs is not None:
            self.logprobs.append(TokenLogprobs(4, -0.5, [(4, -0.5), (5, -1.5)]))
        if last:
            self.finish_reason = "length"
        if self._waiter is not None:
            self._waiter.set_result(None)


class Engine:
    """Begins when `streams` jobs are open; a step follows when all have taken the one before."""

    def __init__(self, streams: int, tokens: int) -> None:
        self.ready, self.restarts, self.failure, self.status = True, 0, None, None
        self.info: dict[str, Any] = {"max_num_seqs": streams}
        self.max_model_len, self.vocab_size = 4096, 64
        self.pids: list[int] = []
        self.open_jobs: dict[int, Job] = {}
        self.begin(streams, tokens)

    def begin(self, streams: int, tokens: int) -> None:
        self.streams, self.tokens = streams, tokens
        self.jobs: list[Job] = []
        self.waiting = self.closed = self.steps = 0
        self.start = 0.0
        self.seconds = -1.0  # until the last stream has ended

    def open(self, prompt: list[int], params: Any, *, user: str | None = None, **_: Any) -> Job:
        job = Job(len(self.jobs), prompt, params, user)
        job.engine = self
        self.jobs.append(job)
        return job

    def close(self, job: Job) -> None:
        """The last one to be closed ends the measurement."""
        self.closed += 1
        if self.closed == self.streams:
            self.seconds = time.process_time() - self.start

    def taken(self) -> None:
        self.waiting += 1
        if self.waiting == self.streams:
            self.waiting = 0
            asyncio.get_running_loop().call_soon(self._step)

    def _step(self) -> None:
        if self.steps == 0:
            self.start = time.process_time()
        self.steps += 1
        for job in self.jobs:
            job.grow(self.steps == self.tokens)


def application(engine: Engine) -> Any:
    from fastapi import APIRouter
    from fastapi.responses import StreamingResponse

    from fastserve.server.app import create_app
    from fastserve.server.service import Service
    from fastserve.server.settings import ServerSettings

    chunk = b"data: " + json.dumps({"choices": [{"index": 0, "text": PIECE, "logprobs": None}]}).encode() + b"\n\n"

    async def bare() -> AsyncIterator[bytes]:
        job = engine.open([], None)
        while job.finish_reason is None:
            await job.news()
            yield chunk
        yield b"data: [DONE]\n\n"
        engine.close(job)

    def routes(service: Service) -> APIRouter:
        router = APIRouter()

        @router.post("/begin/{streams}/{tokens}")
        async def begin(streams: int, tokens: int) -> None:
            engine.begin(streams, tokens)

        @router.get("/seconds")
        async def seconds() -> float:
            return engine.seconds

        return router

    service = Service(ServerSettings(model="toy"), engine, None)  # type: ignore[arg-type]
    service.tokenizer = _tokenizer()
    app = create_app(service, [routes])

    from fastapi import FastAPI

    plain = FastAPI()

    @plain.post("/bare")
    async def stream() -> StreamingResponse:
        return StreamingResponse(bare(), media_type="text/event-stream")

    async def both(scope: Any, receive: Any, send: Any) -> None:
        """The bare one is an application of its own, without any layer of ours."""
        await (plain if scope["path"] == "/bare" else app)(scope, receive, send)

    return both


def _tokenizer() -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    from fastserve.loaders.spec import TokenizerData
    from fastserve.tokenizer import Tokenizer

    backend = Backend(models.BPE(vocab={chr(97 + token): token for token in range(26)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, TokenizerData(chat_template="{{ messages[0].content }}"))


def serve(streams: int, tokens: int) -> None:
    import uvicorn

    from fastserve.server.run import bind, url_of
    from fastserve.server.settings import ServerSettings

    bound = bind(ServerSettings(model="toy", port=0))
    print(url_of(bound), flush=True)
    config = uvicorn.Config(application(Engine(streams, tokens)), log_config=None, access_log=False, lifespan="off")
    asyncio.run(uvicorn.Server(config).serve(sockets=[bound]))


# --- the client ------------------------------------------------------------------------------------------------------


def request(kind: str) -> tuple[str, dict[str, Any]]:
    if kind == "bare":
        return "/bare", {}
    if kind == "chat":
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": "abc"}], "stream": True}
    body: dict[str, Any] = {"prompt": "abc", "stream": True, "max_tokens": 4000}
    if kind.endswith("usage"):
        body["stream_options"] = {"include_usage": True}
    if kind.endswith("logprobs"):
        body["logprobs"] = 2
    return "/v1/completions", body


async def exchange(port: int, method: str, path: str, body: dict[str, Any] | None, until: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**26)
    data = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    answer = await reader.readuntil(until)
    writer.close()
    return answer


async def tokens_of(port: int, kind: str, streams: int, tokens: int) -> float:
    """Microseconds of CPU per token."""
    await exchange(port, "POST", f"/begin/{streams}/{tokens}", {}, b"null")
    path, body = request(kind)
    answers = await asyncio.gather(*(exchange(port, "POST", path, body, b"data: [DONE]\n\n") for _ in range(streams)))
    # A chunked event ends with the length of the next, so every event is there however they were packed.
    assert all(answer.count(b"data: {") >= tokens for answer in answers), "a stream has lost events"
    while (seconds := await seconds_of(port)) < 0:
        pass
    return seconds / (streams * tokens) * 1e6


async def seconds_of(port: int) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /seconds HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return float(answer.rpartition(b"\r\n\r\n")[2])


async def first_byte(port: int, kind: str) -> float:
    """Milliseconds from the request to the first event."""
    await exchange(port, "POST", "/begin/1/1", {}, b"null")
    path, body = request(kind)
    start = time.perf_counter()
    await exchange(port, "POST", path, body, b"data: {")
    return (time.perf_counter() - start) * 1e3


async def measure(port: int, streams: int, tokens: int, repeats: int) -> dict[str, Any]:
    cpu: dict[str, list[float]] = {kind: [] for kind in KINDS}
    first: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for round_ in range(repeats + 1):
        for kind in KINDS:
            figure = await tokens_of(port, kind, streams, tokens)
            if round_:  # the first warms up
                cpu[kind].append(figure)
    for _ in range(50):
        for kind in KINDS:
            first[kind].append(await first_byte(port, kind))
            await asyncio.sleep(0.001)
    return {
        "streams": streams,
        "tokens": tokens,
        "microseconds_per_token": {kind: statistics.median(values) for kind, values in cpu.items()},
        "milliseconds_to_first_byte": {kind: statistics.median(values) for kind, values in first.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=300, help="of each stream")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.streams, options.tokens)
    command = [sys.executable, __file__, "--serve", "--streams", str(options.streams), "--tokens", str(options.tokens)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None  # a pipe was asked for
            port = int(server.stdout.readline().rpartition(":")[2])
            result = asyncio.run(_when_up(port, options))
        finally:
            server.terminate()
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{options.streams} streams of {options.tokens} tokens, median of {options.repeats}")
    print(f"{'':24}{'µs CPU/token':>14}{'ms to first byte':>18}")
    for kind in KINDS:
        cpu, first = result["microseconds_per_token"][kind], result["milliseconds_to_first_byte"][kind]
        print(f"{kind:24}{cpu:>14.1f}{first:>18.2f}")


async def _when_up(port: int, options: argparse.Namespace) -> dict[str, Any]:
    while True:  # the address is taken before anybody listens
        try:
            (await asyncio.open_connection("127.0.0.1", port))[1].close()
            break
        except ConnectionRefusedError:
            await asyncio.sleep(0.05)
    return await measure(port, options.streams, options.tokens, options.repeats)


if __name__ == "__main__":
    main()
