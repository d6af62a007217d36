"""--record: what is served becomes a trace, which the simulator and the load generator read as it is."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from http_world import World, run
from toy import Clock
from toy_engine import ToyEngine, ToyJob

from fastserve.bench.serve.plan import Plan
from fastserve.cli import main
from fastserve.origin import NOBODY, Origin
from fastserve.server import record
from fastserve.server.record import TraceRecord
from fastserve.types import InvalidRequest, JobMetrics, SamplingParams
from fastserve.workloads import SimJob, read_trace

PATH = "/v1/completions"


def ended(arrival: float, finish: float | None, *, prompt: int = 3, output: int = 2, **more: Any) -> Any:
    """A job of times on a clock that begins at 0."""
    params = SamplingParams(max_tokens=more.pop("max_tokens", None))
    asked = {"origin": NOBODY, "priority": 0, "arrival": arrival, "tokenizer": ToyEngine().tokenizer}
    reason = more.pop("reason", "length")
    job = ToyJob(0, [1] * prompt, params, 0, **{**asked, **more})
    job.output, job.finish_reason = [1] * output, reason
    job.metrics = None if finish is None else JobMetrics(arrival, finish=finish)
    return job


def recorded(path: Path, *jobs: Any, now: float = 0.0, wall: float = 1000.0) -> list[dict[str, Any]]:
    """What is in the file when these jobs have been recorded by a server that began at that time of the day."""
    clock = Clock()
    found = TraceRecord(path, clock, lambda: wall)
    clock.now = now
    for job in jobs:
        found.ended(job)
    found.close()
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_lines_by_hand(tmp_path: Path) -> None:
    lines = recorded(
        tmp_path / "trace.jsonl",
        ended(2.0, 3.5, output=7, max_tokens=9, reason="stop"),
        ended(1.0, None, output=0, reason=None, priority=-2),
        now=6.25,
    )
    assert lines == [
        {"arrival": 1002.0, "prompt_tokens": 3, "output_tokens": 7, "ended": 1003.5, "finish_reason": "stop",
         "max_tokens": 9},
        {"arrival": 1001.0, "prompt_tokens": 3, "output_tokens": 0, "ended": 1006.25, "finish_reason": "abort",
         "priority": -2},
    ]  # fmt: skip


def test_what_is_read_is_in_order_of_arrival(tmp_path: Path) -> None:
    """A long job ends after a short one that came later; one that was aborted took what it took, or nothing."""
    path = tmp_path / "trace.jsonl"
    recorded(
        path,
        ended(5.0, 6.0, prompt=9, output=1),
        ended(4.0, None, output=4, reason="abort"),
        ended(4.5, None, output=0, reason="abort"),
        ended(1.0, 7.5, prompt=2, output=80, max_tokens=100, priority=3),
    )
    assert list(read_trace(path)) == [
        SimJob(0.0, 2, 80, priority=3, max_tokens=100), SimJob(3.0, 3, 4), SimJob(4.0, 9, 1),
    ]  # fmt: skip


def test_other_traces_still_have_to_be_sorted(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [{"arrival": time, "prompt_tokens": 1, "output_tokens": 1} for time in (2, 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    with pytest.raises(InvalidRequest, match="line 2: arrives before"):
        list(read_trace(path))


def test_a_recorded_line_that_is_malformed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    recorded(path, ended(1.0, 2.0), ended(0.0, 3.0))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"arrival": 3, "prompt_tokens": 1, "output_\n')
    with pytest.raises(InvalidRequest, match="line 3: is not JSON"):
        list(read_trace(path))


def test_a_server_that_is_started_again_goes_on_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    recorded(path, ended(1.0, 2.0), wall=1000.0)
    recorded(path, ended(1.0, 2.0), wall=1060.0)
    assert [job.arrival for job in read_trace(path)] == [0.0, 60.0]


def test_users_are_told_apart_and_not_told(tmp_path: Path) -> None:
    origins = (Origin(tenant="ann", program="p"), Origin(tenant="bob", program="q"), Origin(tenant="ann"))
    jobs = [ended(float(k), k + 1.0, origin=origin) for k, origin in enumerate(origins)]
    one = [line["user"] for line in recorded(tmp_path / "one.jsonl", *jobs)]
    assert one[0] == one[2] != one[1] and len(one[0]) == 16 and "ann" not in "".join(one)
    assert [line["user"] for line in recorded(tmp_path / "two.jsonl", *jobs)] != one, "another key in every run"


def test_jobs_of_a_server(tmp_path: Path) -> None:
    """Whole answers, a stop string, several answers, a client that goes away; no word of what was said."""
    path = tmp_path / "trace.jsonl"

    async def scenario(world: World) -> None:
        body = {"prompt": "abcde", "max_tokens": 6, "ignore_eos": True, "n": 2, "seed": 3, "user": "ann"}
        await world.post(PATH, body)
        text = (await world.post(PATH, {**body, "n": 1}))["choices"][0]["text"]
        await world.post(PATH, {**body, "n": 1, "stop": text[2:4], "priority": 1})
        world.engine.held = True
        gone = asyncio.create_task(world.client.post(PATH, json={**body, "n": 1}))
        await world.engine.until(lambda engine: engine.open_jobs)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        world.service.close()

    run(scenario, record=path)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [(line["prompt_tokens"], line["output_tokens"], line["finish_reason"]) for line in lines] == [
        (5, 6, "length"), (5, 6, "length"), (5, 6, "length"), (5, 4, "stop"), (5, 0, "abort")
    ]  # fmt: skip
    assert [line.get("priority") for line in lines] == [None, None, None, 1, None]
    assert {line["max_tokens"] for line in lines} == {6} and len({line["user"] for line in lines}) == 1
    assert "abcde" not in path.read_text("utf-8")


def test_a_recorded_file_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a plan of bench serve and in the simulator: first come, first served at a second an iteration, on one row."""
    path = tmp_path / "trace.jsonl"
    recorded(path, ended(4.0, 5.0, prompt=30, output=5), ended(1.0, 9.0, prompt=200, output=50, max_tokens=64))
    jobs = Plan(trace=path).jobs(None)
    assert [(job.arrival, job.prompt_tokens, job.output_tokens) for job in jobs] == [(0.0, 200, 50), (3.0, 30, 5)]
    assert [job.arrival for job in Plan(trace=path).jobs(0.5)] == [0.0, 2.0]
    words = ["--trace", str(path), "--cost", "constant:1", "--policy", "fcfs", "--max-num-seqs", "1", "--workers", "1"]
    assert main(["simulate", *words, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["runs"]
    assert result["mean_jct"] == pytest.approx((50 + 52) / 2)


def test_a_line_is_in_the_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is held back for a server that may be killed."""
    written, write = threading.Event(), os.write

    def observed(file: int, data: bytes) -> int:
        count = write(file, data)
        written.set()
        return count

    monkeypatch.setattr(os, "write", observed)
    found = TraceRecord(tmp_path / "trace.jsonl", Clock(), lambda: 0.0)
    found.ended(ended(0.0, 1.0))
    assert written.wait(30)
    assert len(list(read_trace(tmp_path / "trace.jsonl"))) == 1
    found.close()


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "missing folder", "pipe", "no name"])
def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = {
        "folder": tmp_path,
        "missing folder": tmp_path / "missing" / "trace.jsonl",
        "pipe": tmp_path / "pipe",
        "no name": Path("a\0b"),
    }[kind]
    with pytest.raises(InvalidRequest, match=r"^record: cannot write") as raised:
        TraceRecord(path)
    assert raised.value.field == "record" and "\n" not in str(raised.value)


def test_a_full_disk_is_told_once_and_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        for _ in range(3):
            await world.post(PATH, {"prompt": "abc", "max_tokens": 2, "ignore_eos": True})
        world.service.close()

    run(scenario, record=Path("/dev/full"))
    (line,) = [entry for entry in caplog.records if entry.name == record.__name__]
    assert line.levelno == logging.ERROR and "No space left on device" in line.getMessage()


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full in the middle of the second line, and has room again for the third."""
    path, write, sizes = tmp_path / "trace.jsonl", os.write, iter([None, 10, None])
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: next(sizes)]))
    lines = recorded(path, ended(1.0, 2.0), ended(2.0, 3.0), ended(3.0, 4.0))
    assert [line["arrival"] for line in lines] == [1001.0, 1003.0]


def test_a_slow_disk_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With room for two lines, and one being written, the fourth and the fifth are lost."""
    entered, go_on, write = threading.Event(), threading.Event(), os.write

    def slow(file: int, data: bytes) -> int:
        entered.set()
        assert go_on.wait(30)
        return write(file, data)

    monkeypatch.setattr(record, "_MOST", 2)
    monkeypatch.setattr(os, "write", slow)
    found = TraceRecord(tmp_path / "trace.jsonl", Clock(), lambda: 0.0)
    found.ended(ended(0.0, 1.0))
    assert entered.wait(30)
    for number in range(1, 5):
        found.ended(ended(float(number), 9.0))
    go_on.set()
    found.close()
    assert [job.arrival for job in read_trace(tmp_path / "trace.jsonl")] == [0.0, 1.0, 2.0]
    assert sum(entry.name == record.__name__ for entry in caplog.records) == 1
