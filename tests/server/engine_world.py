"""An EngineClient whose engine is a process that stands in for a real one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from letters import letters
from stand_in import Options

from fastserve.server.client import EngineClient
from fastserve.server.engine_api import EngineUnavailable
from fastserve.server.jobs import OpenJob
from fastserve.server.supervisor import EngineStartError, Health
from fastserve.types import SamplingParams

QUICK = Health(backoff=0.001, heartbeat_timeout=20.0)
LONG = SamplingParams(max_tokens=150, ignore_eos=True)
SLOW = 0.002  # seconds an iteration takes, where something is to happen in the middle of it


@asynccontextmanager
async def serving(options: Options, health: Health = QUICK, **given: Any) -> Any:
    before = asyncio.all_tasks()
    client = EngineClient(options.command(), letters(), health=health, **given)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()
        assert not client.open_jobs
        assert asyncio.all_tasks() <= before


async def follow(job: OpenJob, on_news: Callable[[OpenJob], None] = lambda _: None) -> OpenJob:
    """Read a job to its end; nothing that was there may change."""
    tokens, text = 0, ""
    while job.finish_reason is None:
        await job.news()
        assert len(job.output) >= tokens and job.text.startswith(text)
        tokens, text = len(job.output), job.text
        on_news(job)
    return job


async def kill_and_wait_for_the_next(client: EngineClient, starts: Path) -> None:
    """Return when another engine has been started and has counted itself; it has to load first."""
    before = len(starts.read_bytes())
    os.kill(client.pids[0], signal.SIGKILL)
    await until(lambda: len(starts.read_bytes()) > before)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def run(work: Awaitable[None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work, 120)

    asyncio.run(limited())


def start_raises(options: Options, health: Health, match: str) -> EngineStartError:
    async def work() -> None:
        before = asyncio.all_tasks()
        client = EngineClient(options.command(), letters(), health=health)
        with pytest.raises(EngineStartError, match=match) as caught:
            await client.start()
        errors.append(caught.value)
        assert not client.ready and client.pids == []
        with pytest.raises(EngineUnavailable, match="not been started"):
            client.open([7], LONG, seed=1)
        assert asyncio.all_tasks() <= before

    errors: list[EngineStartError] = []
    run(work())
    return errors[0]
