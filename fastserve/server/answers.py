"""Answers on their way out: one piece when all jobs have ended, or server-sent events while they grow.

Responses are raw ASGI messages, and nothing is validated or allocated for a token but its event: a stream wakes once
for each iteration of the engine, and sends once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from ..origin import Origin
from ..types import SamplingParams
from .calls import EXPECTED, Call, failure
from .engine_api import OpenJob
from .errors import ApiError, as_api_error
from .requestlog import RequestLog
from .service import Service
from .shapes import DONE, Shape, encode, event
from .usage import final_usage, usage

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies that would collect events pass them on
]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a request asks for, with its fields checked."""

    prompts: Callable[[], Awaitable[list[list[int]]]]
    count: int  # of prompts
    shape: Callable[[Sequence[list[int]]], Shape]  # the prompts' tokens
    params: SamplingParams
    origin: Origin
    priority: int
    timeout: float | None
    stream: bool
    usage: bool  # the last event says what it took
    usage_always: bool  # every event does


class Answer(Response):
    """The response of a Generation: everything happens while it is sent, so that it ends with the connection."""

    def __init__(self, service: Service, generation: Generation, log: RequestLog) -> None:
        super().__init__()
        self._service = service
        self._asked = generation
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked, arrival = self._asked, time.monotonic()
        self._call = Call(
            self._service,
            self._log.request_id,
            origin=asked.origin,
            jobs=asked.count * asked.params.n,
            arrival=arrival,
            timeout=asked.timeout,
        )
        with self._call as call:
            try:
                await call.run(receive, self._work(call, send))
            finally:
                self._log.disconnected = call.disconnected
                self._log.tell(call.jobs)

    async def _work(self, call: Call, send: Send) -> None:
        prompts = await self._asked.prompts()
        self._log.prompt_tokens = self._prompt_tokens = sum(map(len, prompts))
        shape = self._asked.shape(prompts)
        await call.open(prompts, self._asked.params, self._asked.priority)
        await (self._stream(shape, send) if self._asked.stream else self._whole(shape, send))

    # --- in one piece ------------------------------------------------------------------------------------------------

    async def _whole(self, shape: Shape, send: Send) -> None:
        for job in self._call.jobs:
            while job.finish_reason is None:
                await job.news()
            self._check(job)
        body = encode(shape.whole(self._call.jobs, self._usage()))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    # --- as it grows -------------------------------------------------------------------------------------------------

    async def _stream(self, shape: Shape, send: Send) -> None:
        """What goes wrong before the first event has its own status; later it is an event."""
        events = _Events(send)
        try:
            await self._follow_all(shape, events)
            if self._asked.usage:
                await events.write(shape.closing(self._usage()))
        except EXPECTED as error:
            if not events.started:
                raise
            known = as_api_error(error)
            assert known is not None  # all of EXPECTED are known
            await events.end(event(known.as_dict()))
        except asyncio.CancelledError:
            cause = self._call.cause
            if cause is None or not events.started:
                raise
            await events.end(event(cause.as_dict()))
        else:
            await events.end(DONE)

    async def _follow_all(self, shape: Shape, events: _Events) -> None:
        jobs = self._call.jobs
        if len(jobs) == 1:
            return await self._follow(0, jobs[0], shape, events)
        followers = [asyncio.ensure_future(self._follow(index, job, shape, events)) for index, job in enumerate(jobs)]
        try:
            await asyncio.gather(*followers)
        finally:
            for follower in followers:
                follower.cancel()

    async def _follow(self, index: int, job: OpenJob, shape: Shape, events: _Events) -> None:
        logprobs = self._asked.params.logprobs is not None
        always = self._asked.usage_always
        shown = tokens = 0
        opened = False
        while True:
            await job.news()
            self._check(job)
            new = job.text[shown:]  # no reference to the text is kept, so that it can be extended in place
            ended = job.finish_reason is not None
            grown = len(job.output)
            if not new and not ended and not (logprobs and grown > tokens):
                continue
            spent = usage(self._prompt_tokens, self._call.jobs) if always else None
            rich = ended or logprobs
            data = shape.chunk(index, job, new, tokens, spent) if rich else shape.grown(index, new, spent)
            if not opened:
                opened = True
                data = shape.opening(index, spent) + data
            await events.write(data)
            if ended:
                return
            shown, tokens = shown + len(new), grown

    def _check(self, job: OpenJob) -> None:
        """Raises ApiError for a job that has failed."""
        if job.finish_reason in ("error", "abort"):
            failed = failure(job, self._service.engine.failure)
            assert failed is not None  # those two are failures
            raise failed

    def _usage(self) -> Mapping[str, Any]:
        """Of all answers, once they have ended."""
        return final_usage(self._prompt_tokens, self._call.jobs, self._asked.params.n)


class _Events:
    """A response of server-sent events, which begins with the first."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def write(self, data: bytes) -> None:
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes) -> None:
        await self.write(data)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def generation_timeout(field: float | None, header: str | None) -> float | None:
    """The shorter of the body's `timeout` and X-Request-Timeout, in seconds. Raises ApiError for a bad header."""
    if header is None:
        return field
    try:
        seconds = float(header)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise ApiError(400, f"X-Request-Timeout: must be seconds above 0, got {header!r}", code="invalid_value")
    return seconds if field is None else min(field, seconds)
