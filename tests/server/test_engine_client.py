"""EngineClient against engines that are processes: served, killed, stopped, hung. Nothing owed is lost."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import psutil
import pytest
from engine_world import LONG, SLOW, follow, run, serving, until
from letters import check_finished, check_growing
from stand_in import CONTEXT, VOCAB, Options

from fastserve.origin import Origin
from fastserve.server.jobs import OpenJob
from fastserve.server.supervisor import Health
from fastserve.types import InvalidRequest, SamplingParams

ME = Origin(tenant="me", program="p", cache_salt="s")


pytestmark = pytest.mark.usefixtures("nothing_is_left")


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
def test_kills_at_random_moments(seed: int, tmp_path: Path) -> None:
    """kill -9 under 32 streams: nobody notices."""

    async def work() -> None:
        rng = random.Random(seed)
        killed_at = [rng.randint(1, 20) for _ in range(5)]  # without them the work is 120 iterations
        options = Options(slots=16, pace=SLOW, starts=str(tmp_path / "starts"), killed_at=killed_at)
        async with serving(options) as client:
            params = SamplingParams(max_tokens=60, ignore_eos=True, logprobs=1)
            jobs = [client.open([7, index], params, seed=index) for index in range(32)]
            for job in await asyncio.gather(*map(follow, jobs)):
                check_finished(job)
            assert client.restarts == 5

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
            await until(lambda: client.restarts == 1)  # the engine may have been done when it was stopped
            assert not psutil.pid_exists(stopped[0])

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


def test_an_engine_that_sends_what_is_no_message_is_replaced() -> None:
    async def work() -> None:
        async with serving(Options(pace=SLOW, garbage_at=100)) as client:
            check_finished(await follow(client.open([7], LONG, seed=1)))
            assert client.restarts == 1

    run(work())


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
