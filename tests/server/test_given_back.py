"""Memory of a burst goes back to the system, once and when nobody waits."""

from __future__ import annotations

import asyncio
import ctypes
from pathlib import Path

import pytest
from http_world import World, run

from fastserve.server import memory
from fastserve.server.memory import Memory

STATUS = Path("/proc/self/status")


def resident() -> int:
    """MB."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS:"))


@pytest.mark.skipif(
    not STATUS.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc and /proc"
)
def test_what_was_freed_is_given_back() -> None:
    burst = [bytes(2000 + number % 7) for number in range(100_000)]  # 200 MB in pieces of the heap
    last = bytes(2000)  # at its end, so that nothing shrinks by itself
    full = resident()
    del burst
    memory.give_back()
    assert resident() < full - 150 and len(last) == 2000


def test_only_after_a_burst_and_when_nothing_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []  # what happened when it looked
    given = asyncio.Event()
    busy = 3

    def idle() -> bool:
        nonlocal busy
        busy -= 1
        looks.append("busy" if busy > 0 else "idle")
        return busy <= 0

    def give_back() -> None:
        looks.append("given")
        given.set()

    async def scenario() -> None:
        watched = Memory(idle)
        for _ in range(memory._BURST - 1):
            watched.ended()
        await asyncio.sleep(0)
        assert not looks
        for _ in range(10):
            watched.ended()
        await asyncio.wait_for(given.wait(), 30)
        assert looks == ["busy", "busy", "idle", "given"]
        watched.ended()
        await asyncio.sleep(0)
        assert len(looks) == 4

    monkeypatch.setattr(memory, "_AFTER", 0.0)
    monkeypatch.setattr(memory, "give_back", give_back)
    asyncio.run(scenario())


def test_a_server_does_it_after_many_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    given = asyncio.Event()
    monkeypatch.setattr(memory, "_AFTER", 0.0)
    monkeypatch.setattr(memory, "_BURST", 8)
    monkeypatch.setattr(memory, "give_back", given.set)

    async def scenario(world: World) -> None:
        await world.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "n": 8, "ignore_eos": True})
        await asyncio.wait_for(given.wait(), 30)

    run(scenario)
