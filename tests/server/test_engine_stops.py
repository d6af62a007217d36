"""The end of a client, and what is left of its engine then: nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from engine_world import LONG, QUICK, SLOW, follow, kill_and_wait_for_the_next, run, serving, until
from letters import letters
from stand_in import Options

from fastserve.server.client import EngineClient
from fastserve.server.engine_api import EngineUnavailable
from fastserve.server.supervisor import Health

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_stop_ends_open_jobs_and_refuses_new_ones() -> None:
    async def work() -> None:
        client = EngineClient(Options(pace=SLOW).command(), letters(), health=QUICK)
        await client.start()
        job = client.open([7], LONG, seed=1)
        await job.news()
        following = asyncio.ensure_future(follow(job))
        pid = client.pids[0]
        await client.stop()
        assert (await following).finish_reason == "abort"
        assert not psutil.pid_exists(pid) and client.pids == [] and not client.ready
        with pytest.raises(EngineUnavailable, match="is stopping"):
            client.open([7], LONG, seed=1)
        await client.stop()

    run(work())


def test_stop_and_cancel_while_loading(tmp_path: Path) -> None:
    async def work() -> None:
        starts = tmp_path / "starts"
        options = Options(pace=SLOW, starts=str(starts), hanging=[0, 2])
        client = EngineClient(options.command(), letters(), health=QUICK)
        starting = asyncio.ensure_future(client.start())
        await until(lambda: starts.exists() and len(starts.read_bytes()) > 0)
        assert len(client.pids) == 1 and not client.ready
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert psutil.Process().children() == []
        client = EngineClient(options.command(), letters(), health=QUICK)
        await client.start()
        job = client.open([7], LONG, seed=1)
        await kill_and_wait_for_the_next(client, starts)
        await client.stop()
        assert job.finish_reason == "abort"

    run(work())


def test_a_stopped_engine_does_not_hold_up_the_end() -> None:
    async def work() -> None:
        async with serving(Options(), Health(stop_timeout=0.2)) as client:
            os.kill(client.pids[0], signal.SIGSTOP)

    run(work())


@pytest.mark.parametrize("late", [False, True])
def test_a_stopped_engine_has_no_time_where_there_is_none(late: bool) -> None:
    async def work() -> None:
        async with serving(Options(), Health(stop_timeout=1e6)) as client:
            os.kill(client.pids[0], signal.SIGSTOP)
            if not late:
                client.hasten()
            stopping = asyncio.ensure_future(client.stop())
            if late:
                await until(lambda: client.engines[0].supervisor._stopping is not None)
                client.hasten()
            await stopping

    run(work())


_SERVER = """
import asyncio, sys
from fastserve.origin import Origin
from fastserve.server.client import EngineClient
from stand_in import Options

async def main():
    client = EngineClient(Options(starts=sys.argv[1], hanging=[1]).command(), None)
    print("starting", flush=True)
    await client.start()
    print(client.pids[0], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("loading", [False, True])
def test_nothing_is_left_when_the_server_is_killed(tmp_path: Path, loading: bool) -> None:
    """The engine holds standard error open: it closes when both processes are gone."""
    starts = tmp_path / "starts"
    if loading:
        starts.write_bytes(b".")
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(starts)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": tempfile.gettempdir(), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert server.stdout is not None and server.stderr is not None
    assert server.stdout.readline() == b"starting\n"
    if loading:
        while starts.read_bytes() != b"..":
            os.sched_yield()
    else:
        assert int(server.stdout.readline()) in {child.pid for child in psutil.Process(server.pid).children()}
    server.kill()
    assert server.stderr.read() == b""
    server.stderr.close()
    server.stdout.close()
    assert server.wait() == -signal.SIGKILL
