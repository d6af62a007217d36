"""EngineClient against engines that are processes: killed, stopped, hung, failing to start. Nothing owed is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from letters import check_finished, check_growing, letters
from stand_in import CONTEXT, VOCAB, Options

from fastserve.engine_options import EngineOptions
from fastserve.origin import Origin
from fastserve.server.client import EngineClient, engine_command
from fastserve.server.engine_api import EngineUnavailable
from fastserve.server.jobs import OpenJob
from fastserve.server.process import EngineProcess
from fastserve.server.supervisor import BackOff, EngineStartError, Health
from fastserve.types import InvalidRequest, SamplingParams

QUICK = Health(backoff=0.001, heartbeat_timeout=20.0)
ME = Origin(tenant="me", program="p", cache_salt="s")
LONG = SamplingParams(max_tokens=150, ignore_eos=True)
SLOW = 0.002  # seconds an iteration takes, where something is to happen in the middle of it


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file descriptor, no process, no folder."""
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = os.listdir("/proc/self/fd")
    yield
    assert psutil.Process().children() == []
    assert list(folder.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == len(before)


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


def test_jobs_to_their_end() -> None:
    async def work() -> None:
        async with serving(Options()) as client:
            assert client.ready and client.healthy and client.restarts == 0
            assert (client.max_model_len, client.vocab_size, client.info["model"]) == (CONTEXT, VOCAB, "stand-in")
            assert client.pids == [process.pid for process in psutil.Process().children()]
            params = SamplingParams(max_tokens=60, logprobs=1, stop=["ab", "é"], stop_token_ids=[9])
            jobs = [client.open([7, seed], params, seed=seed, origin=ME) for seed in range(40)]
            assert set(client.open_jobs.values()) == set(jobs) and {job.origin for job in jobs} == {ME}
            await asyncio.gather(*map(follow, jobs))
            for job in jobs:
                check_finished(job)
                assert job.metrics is not None and job.metrics.arrival == job.arrival
            assert len({job.finish_reason for job in jobs}) == 2
            await until(lambda: client.status is not None and client.status.live == 0)

    run(work())


def test_the_list_of_jobs() -> None:
    async def work() -> None:
        async with serving(Options(slots=1, pace=SLOW)) as client:
            jobs = [client.open([7], LONG, seed=seed) for seed in (1, 2)]
            client.close(client.open([7], LONG, seed=3))
            await jobs[0].news()
            (listed, again) = await asyncio.gather(client.list_jobs(), client.list_jobs())
            assert [job for job, _ in listed] == jobs
            assert [(status.key, status.running) for _, status in listed] == [(jobs[0].key, True), (jobs[1].key, False)]
            assert again == listed
            asking = asyncio.ensure_future(client.list_jobs())
            await asyncio.sleep(0)
            os.kill(client.pids[0], signal.SIGKILL)
            assert len(await asking) in (0, 2)
            await until(lambda: not client.ready)
            assert await client.list_jobs() == []

    run(work())


def test_a_refused_job_raises_where_its_news_is_awaited() -> None:
    async def work() -> None:
        async with serving(Options()) as client:
            job = client.open([VOCAB], LONG, seed=1)
            with pytest.raises(InvalidRequest, match="prompt: holds the token id"):
                await job.news()
            assert not client.open_jobs

    run(work())


def test_news_wakes_once_and_has_one_waiter() -> None:
    async def work() -> None:
        async with serving(Options(pace=SLOW)) as client:
            job = client.open([7], LONG, seed=1)
            waiting = job.news()
            waiting.send(None)  # it waits, and nothing else has had a turn
            with pytest.raises(RuntimeError, match="has a waiter"):
                await job.news()
            waiting.close()
            await follow(job)  # who gave up waiting has taken nothing away
            await job.news()
            check_finished(job)

    run(work())


@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_moments(seed: int) -> None:
    """kill -9 under 32 streams: nobody notices."""

    async def work() -> None:
        rng = random.Random(seed)
        async with serving(Options(slots=16, pace=SLOW)) as client:
            params = SamplingParams(max_tokens=60, ignore_eos=True, logprobs=1)
            jobs = [client.open([7, index], params, seed=index) for index in range(32)]
            total, kills = sum(job.params.max_tokens for job in jobs), 5
            moments = sorted(rng.sample(range(total), kills))

            def on_news(_: OpenJob) -> None:
                if moments and client.ready and sum(len(job.output) for job in jobs) >= moments[0]:
                    moments.pop(0)
                    os.kill(client.pids[0], signal.SIGKILL)

            await asyncio.gather(*(follow(job, on_news) for job in jobs))
            for job in jobs:
                check_finished(job)
            assert not moments and client.restarts >= 1

    run(work())


def test_a_stopped_engine_is_replaced() -> None:
    async def work() -> None:
        health = Health(backoff=0.001, heartbeat_timeout=0.5)
        async with serving(Options(pace=SLOW), health) as client:
            stopped: list[int] = []

            def stop(job: OpenJob) -> None:
                if len(job.output) >= 20 and not stopped:
                    stopped.append(client.pids[0])
                    os.kill(stopped[0], signal.SIGSTOP)

            check_finished(await follow(client.open([7], LONG, seed=1), stop))
            assert client.restarts == 1 and not psutil.pid_exists(stopped[0])

    run(work())


def test_an_engine_is_not_taken_for_dead_because_we_stood_still() -> None:
    """The server's process was stopped for longer than the heartbeat's time."""

    async def work() -> None:
        health = Health(heartbeat_timeout=0.8)
        async with serving(Options(pace=SLOW), health) as client:
            job = client.open([7], LONG, seed=1)
            await job.news()
            threading_wait(1.5)
            check_finished(await follow(job))
            await until(lambda: client.status is not None)
            assert client.restarts == 0

    run(work())


def threading_wait(seconds: float) -> None:
    """Hold up the event loop, as a SIGSTOP would."""
    signal.sigtimedwait([signal.SIGUSR2], seconds)


def test_killed_while_loading(tmp_path: Path) -> None:
    async def work() -> None:
        options = Options(pace=SLOW, starts=str(tmp_path / "starts"), hanging=[1, 2])
        async with serving(options) as client:
            job = client.open([7], LONG, seed=1)
            await job.news()
            for _ in range(3):
                await kill_and_wait_for_the_next(client, tmp_path / "starts")
            late = client.open([8], LONG, seed=2)  # while there is no engine
            for each in (job, late):
                check_finished(await follow(each))
            assert client.restarts == 3 and client.info["start"] == 3

    run(work())


def test_killed_while_jobs_are_resubmitted(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(Options(pace=SLOW, starts=str(tmp_path / "starts"))) as client:
            jobs = [client.open([7, index], LONG, seed=index) for index in range(20)]
            await asyncio.gather(*(job.news() for job in jobs[:8]))
            await kill_and_wait_for_the_next(client, tmp_path / "starts")
            await until(lambda: client.ready)
            os.kill(client.pids[0], signal.SIGKILL)  # it has heard of none, or of some
            for job in await asyncio.gather(*map(follow, jobs)):
                check_finished(job)
            assert client.restarts == 2

    run(work())


def test_later_engines_have_the_first_ones_kv_cache(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(Options(starts=str(tmp_path / "starts"))) as client:
            assert client.info["kv_cache_bytes"] == 4096
            for start in (1, 2):
                await kill_and_wait_for_the_next(client, tmp_path / "starts")
                await until(lambda: client.ready)
                assert client.info["start"] == start and client.info["kv_cache_bytes"] == 4096

    run(work())


def test_the_first_start_fails_with_one_line(tmp_path: Path) -> None:
    options = Options(starts=str(tmp_path / "starts"), failing=[0], crashing=[1])
    assert start_raises(options, QUICK, "^start 0 was told to fail$").field == "model"
    assert start_raises(options, QUICK, "^the engine was killed by SIGABRT$").field is None


def test_the_first_start_takes_too_long(tmp_path: Path) -> None:
    options = Options(starts=str(tmp_path / "starts"), hanging=[0])
    start_raises(options, Health(start_timeout=0.3), "^the engine was not ready after 0.3 s$")


def test_an_engine_that_has_failed_and_does_not_end_is_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As mpiexec, which waits for ranks on a host that is not there any more."""
    health = Health(heartbeat_timeout=2.0, backoff=0.001)
    options = Options(starts=str(tmp_path / "starts"), failing=[0], stays=True)
    start_raises(options, health, "^start 0 was told to fail$")

    async def work() -> None:
        options = Options(pace=SLOW, starts=str(tmp_path / "others"), fails_at=30, stays=True)
        async with serving(options, health) as client:
            check_finished(await follow(client.open([7], LONG, seed=1)))
            assert client.restarts == 1

    run(work())
    assert "start 0 was told to fail; it was up for" in caplog.text


def test_the_engine_is_no_program() -> None:
    async def work() -> None:
        client = EngineClient(["/nowhere/engine"], None)
        with pytest.raises(EngineStartError, match=r"^the engine cannot be started: /nowhere/engine: No such file"):
            await client.start()

    run(work())


def test_after_too_many_failed_starts_there_is_a_failure_and_later_an_engine_again(tmp_path: Path) -> None:
    async def work() -> None:
        options = Options(pace=SLOW, starts=str(tmp_path / "starts"), failing=[1, 2, 3], crashing=[4, 5, 6, 7])
        health = Health(backoff=0.001, max_backoff=0.05)
        async with serving(options, health) as client:
            job = client.open([7], LONG, seed=1)
            await job.news()
            os.kill(client.pids[0], signal.SIGKILL)
            await follow(job)
            assert job.finish_reason == "error" and job.error == client.failure
            assert client.failure == (
                "the engine does not start any more (5 times in a row): the engine was killed by SIGABRT"
            )
            assert not client.healthy and not client.open_jobs
            with pytest.raises(EngineUnavailable, match="does not start any more"):
                client.open([7], LONG, seed=1)
            await until(lambda: client.ready)
            assert client.healthy and client.failure is None and client.restarts == 8
            check_finished(await follow(client.open([7], LONG, seed=1)))

    run(work())


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


def test_a_launcher_that_ends_before_rank_0_comes() -> None:
    async def work() -> None:
        client = EngineClient(["false"], None)
        with pytest.raises(EngineStartError, match=r"^the launcher false ended with exit code 1 before rank 0 "):
            await client.start()

    run(work())


def test_an_engine_that_sends_what_is_no_message_is_replaced() -> None:
    async def work() -> None:
        async with serving(Options(pace=SLOW, garbage_at=100)) as client:
            check_finished(await follow(client.open([7], LONG, seed=1)))
            assert client.restarts == 1

    run(work())


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


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule(seed: int) -> None:
    """Opens, closes, kills and stalls in any order, at moments that are counted in tokens."""

    async def work() -> None:
        rng = random.Random(seed)
        health = Health(backoff=0.001, heartbeat_timeout=0.6)
        async with serving(Options(slots=rng.randint(1, 12), pace=SLOW), health) as client:
            jobs: list[OpenJob] = []
            closed: set[int] = set()
            following: list[asyncio.Task[OpenJob]] = []
            tokens = 0

            def count(_: OpenJob) -> None:
                nonlocal tokens
                tokens += 1

            for _ in range(40):
                act = rng.choices(["open", "close", "kill", "stall"], [20, 6, 3, 1])[0]
                if act == "open" or not jobs:
                    params = SamplingParams(
                        max_tokens=rng.randint(1, 80),
                        ignore_eos=rng.random() < 0.5,
                        logprobs=rng.choice([None, 1]),
                        stop=rng.choice([(), "ab", ("c", "Q1")]),
                    )
                    jobs.append(client.open([7, rng.randrange(VOCAB)], params, seed=rng.getrandbits(64)))
                    following.append(asyncio.ensure_future(follow(jobs[-1], count)))
                elif act == "close":
                    job = rng.choice(jobs)
                    closed.update([] if job.finish_reason else [job.key])
                    client.close(job)
                elif client.ready:
                    os.kill(client.pids[0], signal.SIGKILL if act == "kill" else signal.SIGSTOP)
                goal = tokens + rng.randrange(30)
                await until(lambda goal=goal: tokens >= goal or not client.open_jobs)  # type: ignore[misc]
            await asyncio.gather(*following)
            for job in jobs:
                check_growing(job) if job.finish_reason == "abort" and job.key in closed else check_finished(job)

    run(work())


def test_engines_that_die_at_once_are_waited_for_longer_and_longer() -> None:
    backoff = BackOff(Health(backoff=0.1, max_backoff=30.0, healthy_after=60.0))
    waits = [backoff.after(0.0) for _ in range(11)]
    assert waits == [0.1 * 2**count for count in range(9)] + [30.0, 30.0]
    assert backoff.after(59.0) == 30.0 and backoff.after(60.0) == 0.1  # it was healthy
    assert backoff.after(0.0) == 0.2
    assert [backoff.after(5.0) for _ in range(20)] == [0.1, *[0.1] * 19]  # killed at random moments: no penalty


def test_options_are_checked() -> None:
    with pytest.raises(InvalidRequest, match=r"^heartbeat_timeout: must be a number above 0, got 0"):
        Health(heartbeat_timeout=0)


def told(command: list[str]) -> dict[str, Any]:
    return dict(json.loads(command[command.index("--options") + 1]))


def test_the_worker_is_told_its_options_as_json() -> None:
    command = engine_command({"model": "smollm2", "threads": 2})
    assert command[:3] == [sys.executable, "-m", "fastserve.worker"]
    assert told(command).items() >= {"model": "smollm2", "threads": 2, "host_share": 1}.items()


def test_several_workers_share_the_host() -> None:
    assert told(engine_command({"model": "m", "threads": 5}, 3)).items() >= {"threads": 5, "host_share": 3}.items()


def test_several_workers_know_which_one_they_are() -> None:
    """For their devices to be their own, also after a crash."""
    engines = EngineClient(engine_command({"model": "m"}, 3), None, engines=3).engines
    commands = [engine.supervisor._command_line() for engine in engines]
    for number, command in enumerate(commands):
        given = [command[i + 1] for i, word in enumerate(command) if word == "--options"]
        assert EngineOptions.from_json(*given).engine == number


def test_a_launcher_starts_all_ranks() -> None:
    options = {"model": "m", "tensor_parallel_size": 2, "pipeline_parallel_size": 3}
    command = engine_command(options, launcher="env -f 'my hosts'")  # any program that there is
    assert command[:8] == ["env", "-f", "my hosts", "-n", "6", sys.executable, "-m", "fastserve.worker"]
    for launcher, refused in (("", options), ("env 'hosts", options), ("no-mpi -n", options), ("env", {"model": "m"})):
        with pytest.raises(InvalidRequest, match=r"^launcher: "):
            engine_command(refused, launcher=launcher)
