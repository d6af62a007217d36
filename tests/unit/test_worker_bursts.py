"""Bursts of messages: those who stream, and the heartbeat, wait for a part of one only."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import toy_llm
import zmq
from lone_worker import Recorder, add, alone, turn
from toy_llm import ToyWorld

from fastserve.ipc import Abort, Refused, Status, Step, Stop, ToEngine


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    return toy_llm.enter(monkeypatch)


class Full(Recorder):
    """A socket in which messages wait."""

    def __init__(self, recorder: Recorder, *messages: ToEngine) -> None:
        self.__dict__ = recorder.__dict__
        self.frames = [msgspec.msgpack.encode(message) for message in messages]

    def getsockopt(self, option: int) -> int:
        return zmq.POLLIN if self.frames else 0

    def recv(self) -> bytes:
        return self.frames.pop(0)


def loaded(world: ToyWorld, seconds: float, *messages: ToEngine) -> tuple[Any, Full, list[int]]:
    """A worker that finds these messages; an Add takes it so long. And the keys of the jobs that it adds."""
    it, recorder = alone(world)
    socket = it._socket = Full(recorder, *messages)  # type: ignore[assignment]
    added: list[int] = []
    really = it._add

    def slow(message: Any) -> None:
        world.clock.now += seconds
        added.append(message.key)
        really(message)

    it._add = slow  # type: ignore[method-assign]
    return it, socket, added


def test_slow_adds_leave_the_others_their_turns(world: ToyWorld) -> None:
    it, socket, added = loaded(world, 0.35, *(add(key, [key % 50], max_tokens=200) for key in range(100)))
    while len(added) < 100:
        turn(it)
    said = [type(message) for message in socket.sent if not isinstance(message, Step) or message.updates]
    assert said.count(Status) >= 90 and said.count(Step) >= 90


def test_quick_adds_are_taken_together(world: ToyWorld) -> None:
    it, _, added = loaded(world, 0.0, *(add(key, [key % 50]) for key in range(100)))
    turn(it)
    assert added == list(range(100))


def test_refused_adds_do_not_silence_it(world: ToyWorld) -> None:
    """Without work, what has been read is not waited for."""
    it, socket, added = loaded(world, 0.35, *(add(key, []) for key in range(20)))
    while len(added) < 20:
        turn(it)
    assert sum(isinstance(message, Refused) for message in socket.sent) == 20
    assert socket.beats >= 6 and set(socket.waits) <= {0}


def test_what_is_withdrawn_already_is_not_added(world: ToyWorld) -> None:
    it, socket, added = loaded(
        world, 0.0, add(1, [1]), add(2, [2]), add(3, [3]), Abort([1, 2], False), Abort([3], True)
    )
    turn(it)
    assert added == [3]
    assert [update.finish_reason for message in socket.sent if isinstance(message, Step) for update in message.updates]
    socket.frames.append(msgspec.msgpack.encode(Stop()))
    assert not it._receive()
