"""The engine's process on SmolLM2: killed, told to end, or left behind by its server."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import zmq

from fastserve.cost import CostModel
from fastserve.engine_options import EngineOptions
from fastserve.ipc import SERVER_PID, Add, Failed, FromEngine, Ready, Step, Stop, ToEngine, Update
from fastserve.types import SamplingParams

PATIENCE = 120.0  # seconds; only a failing test waits so long
Kind = TypeVar("Kind")

PROMPT = [(31 * i * i + 7 * i) % 40_000 + 300 for i in range(60)]
PARAMS = SamplingParams(
    temperature=0.8, max_tokens=48, min_tokens=40, repetition_penalty=1.2, frequency_penalty=0.2, logprobs=2
)


class Server:
    """The other end of the sockets, and the engines' processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode
        CostModel(per_iteration=0.01, per_token=0.001).save(folder / "cost.json")

    def start(self, *, ready: bool = True, **options: Any) -> subprocess.Popen[bytes]:
        """Another engine on another socket."""
        number = len(self._sockets)
        self._sockets.append(self._context.socket(zmq.PAIR))
        address = f"ipc://{self._folder}/{number}"
        self._sockets[-1].bind(address)
        self._processes.append(subprocess.Popen([*command(self._folder, **options), "--address", address]))
        if ready:
            assert self.hear(Ready).pids == [self._processes[-1].pid]
        return self._processes[-1]

    def tell(self, message: ToEngine) -> None:
        self._sockets[-1].send(msgspec.msgpack.encode(message))

    def hear(self, kind: type[Kind]) -> Kind:
        """The next message of a kind from the last engine."""
        while True:
            assert self._sockets[-1].poll(1000 * PATIENCE), "silent"
            message = self._decode(self._sockets[-1].recv())
            if isinstance(message, kind):
                return message

    def follow(self, tokens: int) -> list[Update]:
        """What is said of the only job until it has so many more tokens, or has ended."""
        said: list[Update] = []
        while len(said) < tokens and not (said and said[-1].finish_reason):
            said += self.hear(Step).updates
        return said

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._context.destroy(linger=0)


def command(folder: Path, **options: Any) -> list[str]:
    small = {"kv_cache_memory": "64M", "swap_space": 0, "max_model_len": 512, "cost": str(folder / "cost.json")}
    given = EngineOptions(**{"model": "smollm2", **small, **options})
    return [sys.executable, "-m", "fastserve.worker", "--options", given.to_json()]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.close()


def add(output: list[int]) -> Add:
    return Add(1, PROMPT, PARAMS, 2**64 - 3, 0, 0.0, output)


def read(updates: list[Update]) -> list[Any]:
    return [(update.token, update.logprobs) for update in updates]


def test_a_killed_engine_is_not_missed(server: Server) -> None:
    server.start()
    server.tell(add([]))
    whole = read(server.follow(1000))
    assert len(whole) >= 40

    engine = server.start()
    server.tell(add([]))
    said = read(server.follow(17))
    engine.kill()
    for more in (1, 9, 1000):  # lives of tokens
        engine = server.start()
        server.tell(add([token for token, _ in said]))
        said += read(server.follow(more))
        engine.kill()
    assert said == whole


def test_signals(server: Server) -> None:
    engine = server.start()
    server.tell(add([]))
    engine.send_signal(signal.SIGINT)  # the terminal's, to the whole group
    assert server.follow(1000)[-1].finish_reason is not None
    server.tell(add([]))
    server.follow(3)
    engine.send_signal(signal.SIGTERM)
    assert engine.wait(PATIENCE) == 0
    engine = server.start()
    server.tell(add([]))
    server.tell(Stop())
    assert engine.wait(PATIENCE) == 0


def test_a_signal_to_the_whole_group_is_the_servers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_PID, str(os.getpid()))
    engine = server.start()
    server.tell(add([]))
    server.follow(1)
    engine.send_signal(signal.SIGTERM)
    assert server.follow(1000)[-1].finish_reason is not None
    server.tell(Stop())
    assert engine.wait(PATIENCE) == 0


def test_one_line_where_it_cannot_start(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    engine = server.start(ready=False, model="/nowhere/model.gguf")
    failed = server.hear(Failed)
    assert "/nowhere/model.gguf" in failed.message and "\n" not in failed.message
    assert engine.wait(PATIENCE) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, "an engine that no server started says it here, too"
    assert failed.message in said.err


SERVER_DIES = """
import os, subprocess, sys
subprocess.Popen(sys.argv[1:], stdout=1, env={**os.environ, "FASTSERVE_SERVER_PID": str(os.getpid())})
os.read(0, 1)
os._exit(0)
"""


@pytest.mark.parametrize("ready", [True, False])
def test_it_ends_when_its_server_does(server: Server, tmp_path: Path, ready: bool) -> None:
    """Its standard output closes when the last process that has it ends. `ready`: else it has just begun."""
    address = f"ipc://{tmp_path}/orphan"
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.bind(address)
        orphan = [*command(tmp_path), "--address", address]
        parent = subprocess.Popen(
            [sys.executable, "-c", SERVER_DIES, *orphan], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert parent.stdin is not None and parent.stdout is not None
        if ready:
            assert socket.poll(1000 * PATIENCE)
        parent.stdin.close()
        assert parent.wait(PATIENCE) == 0
        assert select.select([parent.stdout], [], [], PATIENCE)[0], "it lives on"
        assert parent.stdout.read() == b""
        parent.stdout.close()


def test_it_ends_at_once_where_its_server_is_gone(tmp_path: Path) -> None:
    """Its parent is another by the time it looks."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    environment = {**os.environ, SERVER_PID: str(gone.pid)}
    engine = subprocess.run(
        [*command(tmp_path), "--address", f"ipc://{tmp_path}/nobody"], env=environment, timeout=PATIENCE, check=False
    )
    assert engine.returncode == 0
