"""How an engine ended, whose fault it was, and that all of it has ended."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys

import pytest
import zmq
from engine_world import LONG, SLOW, follow, run, serving
from letters import check_finished, check_growing
from stand_in import Options

from fastserve.server.client import EngineClient
from fastserve.server.process import EngineProcess
from fastserve.server.supervisor import EngineStartError, Health

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_a_job_that_crashes_the_engine_fails_alone() -> None:
    async def work() -> None:
        async with serving(Options(pace=SLOW, poison={"5": 30})) as client:
            jobs = [client.open([7], LONG, seed=seed) for seed in (1, 2, 5, 6)]
            await asyncio.gather(*map(follow, jobs))
            for job in jobs:
                check_finished(job) if job.seed != 5 else check_growing(job)
            assert jobs[2].finish_reason == "error" and len(jobs[2].output) == 30
            assert client.restarts == 3 and client.healthy

    run(work())


def test_a_job_that_has_the_engine_killed_fails_alone() -> None:
    """Nobody can tell it from kill -9 until it has happened often enough with nothing else to do."""

    async def work() -> None:
        async with serving(Options(pace=SLOW, poison={"5": 30}, killed_by_poison=True)) as client:
            jobs = [client.open([7], LONG, seed=seed) for seed in (1, 2, 5, 6)]
            await asyncio.gather(*map(follow, jobs))
            for job in jobs:
                check_finished(job) if job.seed != 5 else check_growing(job)
            assert jobs[2].finish_reason == "error" and len(jobs[2].output) == 30
            assert client.restarts == 7 and client.healthy

    run(work())


@pytest.mark.parametrize(
    ("end", "crashed"),
    [
        ("pass", False),  # as after a SIGTERM
        ("sys.exit(1)", True),
        ("os.kill(os.getpid(), signal.SIGSEGV)", True),
        ("os.kill(os.getpid(), signal.SIGKILL)", False),
        ("signal.pause()", True),  # we kill it, because it hangs
    ],
)
def test_what_ended_an_engine(end: str, crashed: bool) -> None:
    async def work() -> None:
        with zmq.Context() as context:
            engine = EngineProcess(context)
            await engine.start([sys.executable, "-c", f"import os, signal, sys; {end}"])
            if "pause" not in end:
                await engine.exited
            await engine.end(0.0)
            assert engine.crashed is crashed

    run(work())


# Runs rank 0, which says that it is here and then does something, as srun does: in no process group of the server's.
LAUNCHER = """
import msgspec, os, signal, sys, zmq
from fastserve.ipc import Here, Ready
if child := os.fork():
    os.waitpid(child, 0)
    signal.pause()  # as where a host is away
os.setsid()
with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
    socket.connect(sys.argv[-1])
    for message in Here(os.getpid()), Ready([os.getpid()], {}, 1, 1):
        socket.send(msgspec.msgpack.encode(message))
"""


def test_rank_0_is_killed_wherever_its_launcher_has_put_it() -> None:
    program = f"{LAUNCHER}    signal.pause()"

    async def work() -> None:
        with zmq.Context() as context:
            engine = EngineProcess(context)
            await engine.start([sys.executable, "-c", program])
            rank_0 = os.pidfd_open((await engine.ready).pids[0])
            try:
                await engine.end(0.0)
                assert select.select([rank_0], [], [], 30.0)[0]
            finally:
                os.close(rank_0)

    run(work())


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("pass", "rank 0 on .* \\(process \\d+\\) has ended, and what has started it has not"),
        ("socket.send(msgspec.msgpack.encode(Failed('no memory', None)))", "no memory"),
    ],
)
def test_a_launcher_that_outlives_rank_0_is_ended(end: str, reason: str) -> None:
    """Before it is ready, too: nothing else ends a start in less than half an hour."""
    program = LAUNCHER.replace("Here, Ready", "Failed, Here").replace(", Ready([os.getpid()], {}, 1, 1)", ",")

    async def work() -> None:
        client = EngineClient([sys.executable, "-c", f"{program}    {end}"], None, health=Health(heartbeat_timeout=2.0))
        with pytest.raises(EngineStartError, match=reason):
            await client.start()

    run(work())


# Three ranks of one host; the launcher ends as MPICH's does when one of them is killed: with the others, and a code.
GROUP = """
import msgspec, os, signal, subprocess, sys, zmq
from fastserve.ipc import Here, Ready
sleepers = [subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) for _ in range(3)]
pids = [each.pid for each in sleepers]
with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
    socket.connect(sys.argv[-1])
    ranks = [dict(rank=rank, process=pid, host=HOSTS[rank]) for rank, pid in enumerate(pids)]
    for message in Here(pids[0]), Ready(pids, dict(ranks=ranks), 1, 1):
        socket.send(msgspec.msgpack.encode(message))
sleepers[VICTIM].wait()
for each in sleepers:
    each.kill()
os._exit(CODE)
"""


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize(("code", "signal_name", "crashed"), [(9, "SIGKILL", False), (139, "SIGSEGV", True)])
def test_a_rank_that_its_launcher_has_no_word_for_is_named(
    victim: int, code: int, signal_name: str, crashed: bool
) -> None:
    """Hydra kills the others before rank 0 can speak. Only the group's own signals are a job's fault."""

    async def work() -> None:
        program = f"HOSTS, VICTIM, CODE = ['here'] * 3, {victim}, {code}\n{GROUP}"
        with zmq.Context() as context:
            engine = EngineProcess(context)
            await engine.start([sys.executable, "-c", program])
            pid = (await engine.ready).pids[victim]
            os.kill(pid, signal.SIGKILL)
            await engine.exited
            await engine.end(0.0)
            assert engine.last_words().startswith(
                f"rank {victim} on here (process {pid}) was ended by {signal_name}, and the group with it ("
            )
            assert engine.crashed is crashed

    run(work())


def test_a_rank_of_several_hosts_is_not_guessed() -> None:
    async def work() -> None:
        program = f"HOSTS, VICTIM, CODE = ['here', 'here', 'there'], 1, 9\n{GROUP}"
        with zmq.Context() as context:
            engine = EngineProcess(context)
            await engine.start([sys.executable, "-c", program])
            os.kill((await engine.ready).pids[1], signal.SIGKILL)
            await engine.exited
            await engine.end(0.0)
            assert engine.last_words().startswith("a rank on here or there was ended by SIGKILL")
            assert not engine.crashed

    run(work())
