"""`fastserve bench serve`: what it sends, when, and to whom."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any

import pytest
from sse_server import Request, Script, Server, Wire, honest, serving

from fastserve.bench.serve.prompts import HIGHEST_ID, LOWEST_ID, Asking
from fastserve.bench.serve.record import UNFINISHED, JobRecord
from fastserve.bench.serve.replay import Replay, Replayed, Standing
from fastserve.bench.serve.results import summarize
from fastserve.bench.serve.target import ServerError, Target, connect, parse_target
from fastserve.types import InvalidRequest
from fastserve.workloads import SimJob


def jobs_of(count: int, output: int = 3, gap: float = 0.0) -> list[SimJob]:
    return [SimJob(gap * i, 5 + i, output) for i in range(count)]


def replay(server: Server, jobs: Sequence[SimJob], asking: Asking | None = None, **more: Any) -> Replayed:
    async def run() -> Replayed:
        target = await connect("it", server.url, None, None)
        return await Replay(target, jobs, asking or Asking(), **more).run()

    return asyncio.run(run())


def one(script: Script, output: int = 3, asking: Asking | None = None) -> JobRecord:
    with serving(script) as server:
        (record,) = replay(server, jobs_of(1, output), asking).records
        return record


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_every_job_is_answered_and_counted() -> None:
    with serving() as server:
        run = replay(server, jobs_of(20, 7, gap=0.001))
    assert [record.index for record in run.records] == list(range(20))
    for record, job in zip(run.records, jobs_of(20, 7, gap=0.001), strict=True):
        assert record.ok, record.error
        assert (record.tokens, record.usage_tokens, len(record.times), len(record.gaps)) == (7, 7, 7, 6)
        assert (record.prompt_tokens, record.arrival) == (job.prompt_tokens, job.arrival)
        moments = [record.arrival, record.started, record.sent, *record.times, record.end]
        assert moments == sorted(moments)  # type: ignore[type-var]
        assert (record.status, record.finish_reason) == (200, "length")
    assert not run.interrupted
    assert summarize(run)["output_tokens"] == 140


def test_a_request_asks_for_what_was_planned() -> None:
    job = SimJob(0.0, 9, 4, user="ann", priority=-2, max_tokens=100)
    with serving() as server:
        replay(server, [job], Asking(temperature=0.5, extra_body={"top_k": 3, "temperature": 0.7}))
        replay(server, [job], Asking("chat", ignore_eos=False))
        replay(server, [job], Asking(words=True))
    first, chat, words = server.requests
    assert (first.path, chat.path) == ("/v1/completions", "/v1/chat/completions")
    assert first.headers["content-type"] == "application/json"
    prompt, seed = first.body.pop("prompt"), first.body.pop("seed")
    assert len(prompt) == 9
    assert all(LOWEST_ID <= each <= HIGHEST_ID for each in prompt)
    assert 0 <= seed < 2**31
    assert first.body == {
        "model": "some/model",
        "max_tokens": 4,
        "temperature": 0.7,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "user": "ann",
        "priority": -2,
        "top_k": 3,
    }
    assert "ignore_eos" not in chat.body
    assert chat.body["max_tokens"] == 100
    assert (chat.prompt_tokens, words.prompt_tokens) == (9, 9)


def test_prompts_depend_on_the_salt_and_nothing_else() -> None:
    def prompts(*salts: tuple[int, ...]) -> list[Any]:
        with serving() as server:
            for salt in salts:
                replay(server, jobs_of(3), salt=salt)
        return [
            sorted(request.body["prompt"] for request in server.requests[i : i + 3])
            for i in range(0, len(server.requests), 3)
        ]

    first, again, other = prompts((1, 2), (1, 2), (1, 3))
    assert first == again != other


def test_keys_and_paths() -> None:
    async def run(server: Server) -> Target:
        target = await connect("it", server.url + "/proxy/v1/", "mine", "secret")
        await Replay(target, jobs_of(1), Asking()).run()
        return target

    with serving() as server:
        target = asyncio.run(run(server))
    (request,) = server.requests
    assert request.path == "/proxy/v1/completions"
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["host"] == f"127.0.0.1:{server.port}"
    assert request.body["model"] == target.model == "mine"
    assert "secret" not in repr(target)


# --- the loop is open ------------------------------------------------------------------------------------------------


def barrier(count: int, then: Script = honest) -> Script:
    """Answers nobody before so many have asked."""
    all_there = asyncio.Event()
    waiting = []

    async def script(request: Request, wire: Wire) -> None:
        waiting.append(request)
        if len(waiting) == count:
            all_there.set()
        await all_there.wait()
        await then(request, wire)

    return script


def test_an_open_loop_does_not_wait_for_answers() -> None:
    with serving(barrier(200)) as server:
        run = replay(server, jobs_of(200, gap=0.0005))
    assert [record.ok for record in run.records] == [True] * 200
    assert server.peak == run.peak_open == 200
    # Jobs are sent in the order of their arrival.
    assert [request.prompt_tokens for request in server.requests] == [5 + i for i in range(200)]


def test_a_concurrency_limit_holds_jobs_back_in_order() -> None:
    with serving() as server:
        run = replay(server, jobs_of(30), concurrency=1)
    assert all(record.ok for record in run.records)
    assert run.peak_open == 1
    assert [request.prompt_tokens for request in server.requests] == [5 + i for i in range(30)]
    # The wait counts as latency and not as lateness.
    last = run.records[-1]
    assert last.due > 0 == last.arrival
    assert last.jct > last.due
    assert last.lateness is not None
    assert last.lateness < last.due

    with serving(barrier(4)) as server:
        assert replay(server, jobs_of(30), concurrency=4).peak_open == 4


def test_stopping_leaves_unfinished_jobs_that_count_for_nothing() -> None:
    """Ctrl-C: one job is answered, two are under way, one was never sent."""
    shown = asyncio.Event()

    async def script(request: Request, wire: Wire) -> None:
        await wire.begin()
        await wire.token(request, 0)
        if request.prompt_tokens == 5:
            for number in (1, 2):
                await wire.token(request, number)
            await wire.end(request)
            return
        await shown.wait()

    async def run(server: Server) -> Replayed:
        target = await connect("it", server.url, None, None)
        jobs = [*jobs_of(3), SimJob(3600.0, 9, 3)]
        running = Replay(target, jobs, Asking())
        task = asyncio.create_task(running.run())
        while not (
            len(running._records) == 4 and running._records[0].end and all(r.times for r in running._records[:3])
        ):
            await asyncio.sleep(0)
        running.stop()
        running.stop()
        return await task

    with serving(script) as server:
        done = asyncio.run(run(server))
    assert [record.error for record in done.records] == [None, UNFINISHED, UNFINISHED, UNFINISHED]
    assert done.records[3].sent is None
    assert done.interrupted
    summary = summarize(done)
    assert [summary[name] for name in ("jobs", "completed", "failed", "unfinished")] == [4, 1, 0, 3]
    assert summary["latency"]["jct"]["count"] == 1


def test_progress_is_told() -> None:
    told: list[Standing] = []

    async def script(request: Request, wire: Wire) -> None:
        while not told:
            await asyncio.sleep(0)
        await (honest if request.prompt_tokens == 5 else refuse)(request, wire)

    async def refuse(request: Request, wire: Wire) -> None:
        await wire.answer(503, b"{}")

    with serving(script) as server:
        replay(server, jobs_of(3), tell=told.append, concurrency=2)
    assert told[0].total == 3
    assert (told[0].ended, told[0].failed, told[0].open, told[0].waiting) == (0, 0, 2, 1)


# --- servers ---------------------------------------------------------------------------------------------------------


def connecting(url: str) -> Target:
    return asyncio.run(connect("it", url, None, None))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"models": {"data": []}}, "/v1/models lists no model; name one with --model"),
        ({"models": "hello"}, "lists no model"),
        ({"models": {"error": {"message": "no key"}}, "models_status": 401}, "/v1/models answers 401: no key"),
    ],
)
def test_a_server_without_a_model(more: dict[str, Any], message: str) -> None:
    with serving(**more) as server:
        with pytest.raises(ServerError, match=message):
            connecting(server.url)
        assert asyncio.run(connect("it", server.url, "named", None)).model == "named"


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServerError, match=f"^{url}: .*; is the server running\\?$"):
            connecting(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", "must be a URL"),
        ("ftp://host", "must be a URL as http://127.0.0.1:8000"),
        ("http://", "must be a URL as"),
        ("http://host:port", "must be a URL"),
        ("http://me:secret@host", "must have no user"),
        ("http://host/v1?x=1", "must have no user, query"),
        ("http://host/a b", "must be of printable ASCII"),
    ],
)
def test_what_is_no_url(url: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^base_url: {message}"):
        connecting(url)
    with pytest.raises(InvalidRequest, match=f"^target: {message}"):
        parse_target(f"a={url}")


def test_targets() -> None:
    assert parse_target("a=http://h/x=1") == ("a", "http://h/x=1")
    for text in ("http://h:1", "=http://h", "a", "http://h?a=b"):
        with pytest.raises(InvalidRequest, match="must be written NAME=URL"):
            parse_target(text)
