"""`fastserve bench serve` with conversations and agents: what a call repeats, when it is sent, and what is told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from sse_server import Request, Server, Wire, event, honest, serving

from fastserve.bench.serve.experiment import Experiment, Watcher
from fastserve.bench.serve.plan import Plan
from fastserve.bench.serve.prompts import HIGHEST_ID, LOWEST_ID, Asking
from fastserve.bench.serve.record import UNFINISHED
from fastserve.bench.serve.replay import Replay, Replayed
from fastserve.bench.serve.results import summarize
from fastserve.bench.serve.target import connect
from fastserve.workloads import SimJob, calls_of, parse_load

OURS = {"data": [{"id": "m", "owned_by": "fastserve"}]}


def replay(server: Server, jobs: Sequence[SimJob], asking: Asking | None = None, **more: Any) -> Replayed:
    async def run() -> Replayed:
        target = await connect("it", server.url, None, None)
        return await Replay(target, jobs, asking or Asking(), **more).run()

    return asyncio.run(run())


def programs(spec: str = "chat:3,2,0,6,4,16", count: int = 6, rate: float = 1e6) -> list[SimJob]:
    return list(parse_load(spec, "poisson").jobs(0, count, rate))


def words_of(call: SimJob, before: SimJob | None) -> int:
    """That a call adds to what was said."""
    return call.prompt_tokens - (before.prompt_tokens + before.output_tokens if before is not None else 0)


async def wordy(request: Request, wire: Wire) -> None:
    """Answers that differ from call to call."""
    await wire.begin()
    said = len(str(request.body.get("prompt") or request.body["messages"]))
    for number in range(request.tokens):
        reason = "length" if number == request.tokens - 1 else None
        text = f" a{said + number}"
        choice = {"delta": {"content": text}} if "messages" in request.body else {"text": text}
        await wire.text(event({"choices": [{"index": 0, **choice, "finish_reason": reason}]}))
    details = {"prompt_tokens_details": {"cached_tokens": 3}}
    await wire.text(
        event({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": request.tokens, **details}})
    )
    await wire.text("data: [DONE]\n\n")
    await wire.raw(b"0\r\n\r\n")


def answer_to(request: Request) -> str:
    said = len(str(request.body.get("prompt") or request.body["messages"]))
    return "".join(f" a{said + number}" for number in range(request.tokens))


def test_a_chats_messages_are_those_before_and_their_answers() -> None:
    (job,) = programs(count=3)
    with serving(wordy) as server:
        run = replay(server, [job], Asking("chat"))
    assert [record.ok for record in run.records] == [True] * 3
    messages = [request.body["messages"] for request in server.requests]
    for before, after, request in zip(messages, messages[1:], server.requests, strict=False):
        assert after[: len(before)] == before
        assert after[len(before)] == {"role": "assistant", "content": answer_to(request)}
        assert [each["role"] for each in after[len(before) + 1 :]] == ["user"]
    calls = [None, *calls_of(job)]
    for (before, call), own in zip(pairwise(calls), messages, strict=True):
        assert call is not None and len(own[-1]["content"].split()) == words_of(call, before)


def test_a_text_goes_on_where_the_answer_ended() -> None:
    (job,) = programs(count=3)
    with serving(wordy) as server:
        replay(server, [job])
    prompts = [request.body["prompt"] for request in server.requests]
    calls = list(calls_of(job))
    for i in (0, 1):
        both = prompts[i] + answer_to(server.requests[i])
        assert prompts[i + 1].startswith(both + " ")
        assert len(prompts[i + 1][len(both) :].split()) == words_of(calls[i + 1], calls[i])
    assert len(prompts[0].split()) == calls[0].prompt_tokens


def test_programs_share_what_their_content_has_in_common() -> None:
    jobs = programs("chat:1,1,0,6,4,64", count=40)
    with serving() as server:
        replay(server, jobs, Asking(words=True))
        texts = {" ".join(request.body["prompt"].split()[:64]) for request in server.requests}
        everything = {request.body["prompt"] for request in server.requests}
        assert len(texts) <= 8 and len(everything) == 40
        replay(server, jobs, Asking(words=True), salt=(1,))
    others = {" ".join(request.body["prompt"].split()[:64]) for request in server.requests[40:]}
    assert not texts & others, "in another run, everything is another"


def test_content_is_token_ids_where_nothing_is_continued() -> None:
    jobs = [SimJob(0.0, 20, 2, content=(1, 2), content_block=16), SimJob(0.0, 30, 2, content=(1, 3), content_block=16)]
    with serving() as server:
        replay(server, jobs)
    one, other = sorted((request.body["prompt"] for request in server.requests), key=len)
    assert (len(one), len(other)) == (20, 30) and one[:16] == other[:16] and one[16:] != other[16:20]
    assert all(LOWEST_ID <= token <= HIGHEST_ID for token in one + other)


def test_only_our_server_hears_of_programs_and_all_of_users() -> None:
    for models, expected in ((OURS, True), ({"data": [{"id": "m", "owned_by": "vllm"}]}, False)):
        with serving(models=models) as server:
            replay(server, programs(count=6), salt=(4, 2))
        ids = [request.body.get("program_id") for request in server.requests]
        assert (set(ids) == {"4-2-chat-0", "4-2-chat-1"}) == expected and (None in ids) != expected
        assert {request.body["user"] for request in server.requests} == {"user-0", "user-1"}


def test_a_call_comes_a_think_time_after_the_answer() -> None:
    last = SimJob(0.0, 9, 2, program="p")
    job = SimJob(0.01, 5, 3, program="p", think_time=0.03, then=last)
    with serving() as server:
        run = replay(server, [job, SimJob(0.02, 7, 1)])
    first, second, other = run.records
    assert [record.index for record in run.records] == [0, 1, 2] and all(record.ok for record in run.records)
    assert second.arrival == pytest.approx(first.end + 0.03) and second.started >= second.arrival  # type: ignore
    assert (first.call, second.call, other.call, other.program) == (0, 1, 0, None)
    assert (first.arrival, other.arrival) == (0.01, 0.02)
    assert server.requests[1].prompt_tokens == 7 and len(server.requests[2].body["prompt"].split()) == 9


def test_what_follows_a_failure_is_never_asked() -> None:
    async def script(request: Request, wire: Wire) -> None:
        if request.body["messages"][-1] is not request.body["messages"][0]:
            await wire.answer(500, b'{"error": {"message": "no"}}')
        else:
            await honest(request, wire)

    with serving(script) as server:
        run = replay(server, programs("chat:4,1,0,6,4,16", count=8), Asking("chat"))
        assert len(server.requests) == 4
    assert [record.error for record in run.records] == [None, "500", "never asked", "never asked"] * 2
    summary = summarize(run)
    assert (summary["completed"], summary["failed"], summary["programs"]) == (2, 6, None)
    assert {each["error"]: each["jobs"] for each in summary["errors"]} == {"500": 2, "never asked": 4}


def test_stopping_while_somebody_thinks() -> None:
    async def run(server: Server) -> Replayed:
        target = await connect("it", server.url, None, None)
        job = SimJob(0.0, 5, 3, think_time=1e6, then=SimJob(0.0, 9, 2))
        running = Replay(target, [job], Asking())
        task = asyncio.create_task(running.run())
        while not (running._records and running._records[0].end is not None):
            await asyncio.sleep(0.001)
        running.stop()
        return await task

    with serving() as server:
        done = asyncio.run(run(server))
    assert [record.error for record in done.records] == [None, UNFINISHED] and done.interrupted


def test_what_is_told_of_programs() -> None:
    with serving(wordy) as server:
        run = replay(server, programs(count=6), Asking("chat"))
    summary = summarize(run)
    spans = [run.records[first + 2].times[-1] - run.records[first].arrival for first in (0, 3)]
    assert summary["programs"]["count"] == 2 and summary["programs"]["mean"] == pytest.approx(sum(spans) / 2)
    assert summary["later"]["ttft"]["count"] == 4 and summary["latency"]["ttft"]["count"] == 6
    assert set(summary["users"]) == {"user-0", "user-1"} and summary["users"]["user-0"]["count"] == 3
    assert summary["cached_share"] == 3 / 12
    told = run.records[1].as_dict()
    assert (told["program"], told["call"], told["user"], told["cached_tokens"]) == ("chat-0", 1, "user-0", 3)


def test_an_experiment_counts_calls_and_warms_up_with_first_ones() -> None:
    with serving() as server:
        plan = Plan(workload="chat:3,2,0,6,4,16", num_jobs=6)
        experiment = Experiment([("it", server.url)], plan, Asking("chat"), rates=(1e6,), warmup=2)
        assert experiment.title == "6 jobs, chat:3,2,0,6,4,16, poisson · seed 0"
        (run,) = asyncio.run(experiment.run(Watcher()))
        assert len(server.requests) == 2 + 6 and run.summary["completed"] == 6
        warm = server.requests[0].body["messages"][0]["content"]
        assert all(warm[:40] not in str(request.body) for request in server.requests[2:])
