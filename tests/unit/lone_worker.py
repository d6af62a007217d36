"""An engine's process without the process: a worker whose loop the test goes through, and what it sends."""

from __future__ import annotations

from typing import Any

import msgspec
from toy import Clock
from toy_llm import COST, ToyWorld

from fastserve import worker
from fastserve.engine_options import EngineOptions
from fastserve.ipc import Add, FromEngine, Status
from fastserve.types import SamplingParams


class Recorder:
    """A socket that nobody is at the other end of."""

    def getsockopt(self, option: int) -> int:
        return 0

    def __init__(self, clock: Clock) -> None:
        self.sent: list[FromEngine] = []
        self.waits: list[int] = []
        self._clock = clock

    def send(self, frame: bytes) -> None:
        self.sent.append(msgspec.msgpack.decode(frame, type=FromEngine))

    def poll(self, milliseconds: int) -> int:
        self.waits.append(milliseconds)
        self._clock.now += milliseconds / 1000
        return 0

    @property
    def beats(self) -> int:
        return sum(isinstance(message, Status) for message in self.sent)


def add(key: int, prompt: list[int], output: list[int] | None = None, **params: Any) -> Add:
    return Add(key, prompt, SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **params}), 7, 0, 0.0, output or [])


def alone(world: ToyWorld, **options: Any) -> tuple[worker.Worker, Recorder]:
    """A worker whose loop the test goes through."""
    memory: dict[str, Any] = {"kv_cache_memory": "1M", "swap_space": 0, "cost": COST}
    socket = Recorder(world.clock)
    given = EngineOptions(model="toy", **{**memory, **options})
    return worker.Worker(socket, worker.load(given), world.clock), socket  # type: ignore[arg-type]


def turn(it: worker.Worker) -> None:
    assert it._receive()
    if it._engine.has_work:
        it._step()
    it._beat()
