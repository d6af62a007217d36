"""A server's life as others see it: signals, drains, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from toy_engine import ToyEngine

from fastserve.cli import main
from fastserve.server.app import create_app
from fastserve.server.run import bind, serve
from fastserve.server.service import Service
from fastserve.server.settings import ServerSettings
from fastserve.server.supervisor import BackOff, EngineStartError, Health

HERE = Path(__file__).parent
PLAIN = {"prompt": "abc", "max_tokens": 6, "ignore_eos": True, "stream": True}


class Process:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.url = process.stdout.readline().strip()
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def until_draining(self) -> None:
        while self.client.get("/health").json()["status"] != "draining":
            pass


@contextlib.contextmanager
def server(shutdown_timeout: float, *more: str) -> Iterator[Process]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "unit"), *sys.path])}
    command = [sys.executable, str(HERE / "serve_toy.py"), str(shutdown_timeout), *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield Process(process)
        finally:
            process.kill()


def test_sigterm_finishes_what_is_open_and_refuses_the_rest() -> None:
    with server(60) as served:
        with served.client.stream("POST", "/v1/completions", json=PLAIN) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            served.signal(signal.SIGTERM)
            served.until_draining()
            refused = served.client.post("/v1/completions", json=PLAIN)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert refused.json()["error"]["code"] == "shutting_down"
            served.client.post("/release")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        said = [json.loads(line.removeprefix("data: ")) for line in (first, *rest[:-1])]
        assert said[-1]["choices"][0]["finish_reason"] == "length"
        assert served.process.wait(60) == 0


def test_what_is_not_finished_in_time_is_told_so() -> None:
    with server(0) as served:
        with served.client.stream("POST", "/v1/completions", json=PLAIN) as stream:
            lines = stream.iter_lines()
            next(lines)
            served.signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert served.process.wait(60) == 0


def test_a_second_interrupt_ends_at_once() -> None:
    with server(1000) as served, served.client.stream("POST", "/v1/completions", json=PLAIN) as stream:
        next(stream.iter_lines())
        served.signal(signal.SIGINT)
        served.until_draining()
        served.signal(signal.SIGINT)
        assert served.process.wait(60) == 130


@pytest.mark.parametrize("late", [False, True])
def test_a_second_interrupt_waits_for_no_engine(late: bool) -> None:
    """Whether the engine is being stopped by then, or there is still something open."""
    with server(1000, "hung") as served, contextlib.ExitStack() as open_streams:
        if not late:
            stream = open_streams.enter_context(served.client.stream("POST", "/v1/completions", json=PLAIN))
            next(stream.iter_lines())
        served.signal(signal.SIGINT)
        if late:
            assert served.process.stdout is not None and served.process.stdout.readline() == "stopping\n"
        else:
            served.until_draining()
        served.signal(signal.SIGINT)
        assert served.process.wait(60) == 130


def test_an_idle_server_ends_at_once() -> None:
    with server(1000) as served:
        served.signal(signal.SIGINT)
        assert served.process.wait(60) == 0


def test_the_address_is_told_when_clients_may_connect() -> None:
    async def work() -> int:
        settings = ServerSettings(model="toy", port=0)
        engine = ToyEngine()
        service = Service(settings, engine, engine.tokenizer)
        bound = bind(settings)

        def ready(url: str) -> None:
            socket.create_connection(bound.getsockname(), 60).close()
            os.kill(os.getpid(), signal.SIGTERM)

        return await serve(service, create_app(service), bound, on_ready=ready)

    assert asyncio.run(work()) == 0


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def handlers_are_gone() -> Iterator[None]:
    """The command's, which write to the standard error of the test that ran it."""
    loggers = [logging.getLogger(), logging.getLogger("fastserve.requests")]
    before = [list(logger.handlers) for logger in loggers]
    yield
    for logger, handlers in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["serve", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_what_cannot_be_served_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port: {port} of 127.0.0.1 is in use" in complaint(capsys, "--port", port)
    missing = str(tmp_path / "missing.gguf")
    assert "missing.gguf: no such file" in complaint(capsys, "--port", "0", "--model", missing)
    assert "--max-body-size" in complaint(capsys, "--max-body-size", "4X")
    assert "--shutdown-timeout" in complaint(capsys, "--shutdown-timeout", "-1")
    assert "--starvation-limit" in complaint(capsys, "--starvation-limit", "soon")
    assert "--log-format" in complaint(capsys, "--log-format", "xml")
    assert "--data-parallel-size: must be at least 1" in complaint(capsys, "--data-parallel-size", "0")
    assert "--heartbeat-timeout" in complaint(capsys, "--heartbeat-timeout", "0.5")
    monkeypatch.setenv("FASTSERVE_API_KEY", "one,,two")
    assert "FASTSERVE_API_KEY" in complaint(capsys)


def test_an_option_that_the_engine_refuses_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> int:
        raise EngineStartError("must be at least 1, got 0", "max_num_seqs")

    monkeypatch.setattr("fastserve.cli.serve._serve", refuse)
    assert "--max-num-seqs: must be at least 1, got 0" in complaint(capsys, "--port", "0", "--max-num-seqs", "0")


def test_the_heartbeat_is_the_supervisors() -> None:
    from fastserve.cli.serve import _engine_client

    assert ServerSettings(model="toy").heartbeat_timeout == Health().heartbeat_timeout
    settings = ServerSettings(model="toy", heartbeat_timeout=7.5, data_parallel_size=3)
    client = _engine_client(settings, {"model": "toy"}, None)
    assert [engine.supervisor._health.heartbeat_timeout for engine in client.engines] == [7.5] * 3


def test_hosts_that_are_away_are_waited_for_longer_than_processes_of_this_one() -> None:
    """Open requests are given up after so many failed starts: some ten minutes, where a launcher starts the engine."""
    from fastserve.cli.serve import _engine_client

    ranks = {"model": "toy", "tensor_parallel_size": 2}
    given = [ServerSettings(model="toy", launcher=launcher) for launcher in (None, "env -i")]
    here, away = (_engine_client(settings, ranks, None).engines[0].supervisor._health for settings in given)
    assert here == Health()
    backoff = BackOff(away)
    waits = [backoff.after(0.0) for _ in range(away.max_failed_starts - 1)]
    assert 300 < sum(waits) < 900 and max(waits) <= 5


def test_keys_come_from_both(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastserve.cli import serve as command

    given: list[tuple[str, ...]] = []
    monkeypatch.setenv("FASTSERVE_API_KEY", "one, two")
    monkeypatch.setattr(command, "_set_up_logging", lambda: None)

    async def serve(settings: object, options: object, bound: object) -> int:
        given.append(settings.api_key)  # type: ignore[attr-defined]
        return 0

    monkeypatch.setattr(command, "_serve", serve)
    assert main(["serve", "--port", "0", "--api-key", "three"]) == 0
    assert given == [("three", "one", "two")]
