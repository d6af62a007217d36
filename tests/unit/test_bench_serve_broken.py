"""`fastserve bench serve` against servers that do not keep their word, and those that are only unusual."""

from __future__ import annotations

import asyncio

import pytest
from sse_server import Request, Script, Wire, chunked, event, honest, refusing, serving, token
from test_bench_serve import jobs_of, one, replay

from fastserve.bench.serve.prompts import Asking
from fastserve.bench.serve.replay import Replay, Replayed
from fastserve.bench.serve.results import summarize
from fastserve.bench.serve.target import connect


def streaming(*parts: str, end: bytes = b"0\r\n\r\n", reset: bool = False, tokens: int = 1) -> Script:
    """Begins well, with so many tokens, and goes on with parts."""

    async def script(request: Request, wire: Wire) -> None:
        await wire.begin()
        for number in range(tokens):
            await wire.token(request, number)
        for part in parts:
            await wire.text(part)
        if reset:
            wire.reset()
        else:
            await wire.raw(end)

    return script


async def hangs_up(request: Request, wire: Wire) -> None:
    pass


async def resets(request: Request, wire: Wire) -> None:
    wire.reset()


async def speaks_another_language(request: Request, wire: Wire) -> None:
    await wire.raw(b"220 smtp.example.com ESMTP\r\n")


BROKEN: dict[str, tuple[Script, str, str]] = {
    "429": (refusing(429, b'{"error": {"message": "queue is full"}}'), "429", "queue is full"),
    "500": (refusing(500, b"Internal Server Error", "text/plain"), "500", "Internal Server Error"),
    "no stream": (refusing(200, b'{"choices": [{"text": "all at once"}]}'), "no stream", "application/json"),
    "hangs up": (hangs_up, "no answer", "closed the connection"),
    "resets": (resets, "connection reset", ""),
    "resets in the middle": (streaming(reset=True, tokens=2), "connection reset", ""),
    "no HTTP": (speaks_another_language, "malformed answer", "not HTTP/1"),
    "no JSON": (streaming("data: {oops\n\n"), "malformed answer", "no chunk of an answer"),
    "no chunk": (streaming(end=b"oops\r\n"), "malformed answer", "a chunk of size"),
    "no end": (streaming(end=b""), "cut off", "after 1 tokens"),
    "no reason": (streaming(tokens=2), "cut off", "after 2 tokens"),
    "half an event": (streaming("data: [DO", tokens=3, end=b""), "cut off", "after 3 tokens"),
    "error event": (
        streaming(event({"error": {"message": "boom"}}), "data: [DONE]\n\n"),
        "error in the stream",
        "boom",
    ),
    "nothing": (streaming("data: [DONE]\n\n", tokens=0), "no token", "empty"),
    "too short": (
        streaming(event({"choices": [], "usage": {"completion_tokens": 2}}), "data: [DONE]\n\n", tokens=2),
        "too short",
        "2 of 3 tokens",
    ),
}


@pytest.mark.parametrize(("script", "kind", "detail"), BROKEN.values(), ids=BROKEN)
def test_an_answer_that_is_none_is_an_error(script: Script, kind: str, detail: str) -> None:
    record = one(script)
    assert (record.error, record.ok) == (kind, False)
    assert detail in record.detail
    assert record.end is not None


def test_nobody_there_is_an_error() -> None:
    async def run() -> Replayed:
        with serving() as server:
            target = await connect("it", server.url, None, None)
        return await Replay(target, jobs_of(2), Asking()).run()

    assert [record.error for record in asyncio.run(run()).records] == ["connection refused"] * 2


def test_a_job_is_given_up_when_its_time_is_over() -> None:
    async def script(request: Request, wire: Wire) -> None:
        await wire.begin()
        await asyncio.Event().wait()

    with serving(script) as server:
        run = replay(server, jobs_of(3), timeout=0.01)
    assert [(record.error, record.detail) for record in run.records] == [
        ("timed out", "not answered within 0.01 s")
    ] * 3


def test_errors_are_counted_apart_and_are_never_fast() -> None:
    async def script(request: Request, wire: Wire) -> None:
        if request.prompt_tokens % 3 == 0:
            await wire.answer(429, b'{"error": {"message": "later"}}')
        elif request.prompt_tokens % 3 == 1:
            await streaming(reset=True)(request, wire)
        else:
            await honest(request, wire)

    with serving(script) as server:
        summary = summarize(replay(server, jobs_of(8)))
    assert (summary["completed"], summary["failed"]) == (3, 5)
    assert summary["errors"] == [
        {"error": "429", "jobs": 3, "detail": "later"},
        {"error": "connection reset", "jobs": 2, "detail": summary["errors"][1]["detail"]},
    ]
    assert summary["latency"]["jct"]["count"] == summary["latency"]["ttft"]["count"] == 3
    assert summary["output_tokens"] == 9


# --- servers that are only unusual -----------------------------------------------------------------------------------


def whole(request: Request, ending: str = "\n", done: bool = True) -> str:
    """An honest answer with comments between its events."""
    events = [event(token(request, number)) + ": keep-alive\n\n" for number in range(request.tokens)]
    usage = event({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": request.tokens}})
    text = "".join(["event: begin\n\n", *events, usage, "data: [DONE]\n\n" if done else ""])
    return text.replace("\n", ending)


def cut(size: int, ending: str) -> Script:
    """Sends every `size` bytes by themselves."""

    async def script(request: Request, wire: Wire) -> None:
        await wire.begin()
        data = chunked(whole(request, ending).encode()) + b"0\r\n\r\n"
        for at in range(0, len(data), size):
            await wire.raw(data[at : at + size])
            await asyncio.sleep(0)

    return script


def closing(done: bool) -> Script:
    async def script(request: Request, wire: Wire) -> None:
        await wire.raw(
            b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + whole(request, done=done).encode()
        )

    return script


async def without_usage(request: Request, wire: Wire) -> None:
    await wire.begin()
    for number in range(request.tokens):
        await wire.token(request, number)
    await wire.end(request, usage=False)


UNUSUAL: dict[str, Script] = {
    **{f"{size} bytes, {ending!r}": cut(size, ending) for size in (1, 2, 3, 50) for ending in ("\n", "\r\n", "\r")},
    "no length": closing(True),
    "no length, no [DONE]": closing(False),
    "no usage": without_usage,
}


@pytest.mark.parametrize("script", UNUSUAL.values(), ids=UNUSUAL)
def test_an_unusual_answer_is_one(script: Script) -> None:
    record = one(script)
    assert record.ok, (record.error, record.detail)
    assert (record.tokens, len(record.times), record.finish_reason) == (3, 3, "length")
    assert (record.usage_tokens is None) == (script is without_usage)


def test_a_chat_begins_with_its_first_token() -> None:
    record = one(honest, asking=Asking("chat"))
    assert record.ok
    assert len(record.times) == 3


def test_outputs_may_end_early_where_they_are_not_told_otherwise() -> None:
    async def script(request: Request, wire: Wire) -> None:
        await wire.begin()
        await wire.text(event({"choices": [{"text": "a", "finish_reason": "stop"}]}))
        await wire.end(request, tokens=1)

    assert one(script).error == "too short"
    assert one(script, asking=Asking(ignore_eos=False)).ok


def test_a_server_that_does_not_hang_up_is_hung_up_on() -> None:
    async def script(request: Request, wire: Wire) -> None:
        await wire.begin()
        for number in range(request.tokens):
            await wire.token(request, number)
        await wire.text("data: [DONE]\n\n")
        await wire.gone()

    async def run() -> Replayed:
        target = await connect("it", server.url, None, None)
        done = await Replay(target, jobs_of(3), Asking()).run()
        while server.open:
            await asyncio.sleep(0.001)
        return done

    with serving(script) as server:
        done = asyncio.run(asyncio.wait_for(run(), 60))
    assert all(record.ok for record in done.records)
