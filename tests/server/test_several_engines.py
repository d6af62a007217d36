"""EngineClient over several engines that are processes: any may be killed, and jobs go on in the others."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import psutil
import pytest
from engine_world import LONG, QUICK, SLOW, follow, run, serving, until
from letters import check_finished, check_growing, letters
from stand_in import Options

from fastserve.server.client import EngineClient
from fastserve.server.engine_api import EngineUnavailable
from fastserve.server.jobs import OpenJob
from fastserve.server.supervisor import EngineStartError, Health
from fastserve.types import SamplingParams

pytestmark = pytest.mark.usefixtures("nothing_is_left")

PATIENT = Health(backoff=1e6, max_backoff=1e6, heartbeat_timeout=20.0)  # an engine that is gone stays away


def test_jobs_are_shared_and_told_of_as_one() -> None:
    async def work() -> None:
        async with serving(Options(slots=4, pace=SLOW), engines=3) as client:
            assert client.ready and client.info["max_num_seqs"] == 12 and client.restarts == 0
            assert sorted(client.pids) == sorted(process.pid for process in psutil.Process().children())
            jobs = [client.open([7, seed], LONG, seed=seed) for seed in range(9)]
            assert [engine.jobs for engine in client.engines] == [3, 3, 3]
            await asyncio.gather(*(job.news() for job in jobs))
            listed = await client.list_jobs()
            assert {job for job, _ in listed} == set(jobs)
            assert [job.engine for job, _ in listed[:3]] == [0, 1, 2], "the next of each engine first"
            assert all(job.key == status.key for job, status in listed)
            await until(lambda: client.status is not None and client.status.live == 9)
            for job in await asyncio.gather(*map(follow, jobs)):
                check_finished(job)
            await until(lambda: client.counters["iterations"] >= 3 * 150)
            assert client.status is not None and client.status.device_blocks == 300

    run(work())


def test_an_engine_that_says_nothing_hides_only_its_own_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastserve.server.client._ANSWERS_WITHIN", 0.2)

    async def work() -> None:
        async with serving(Options(pace=SLOW), PATIENT, engines=2) as client:
            jobs = [client.open([7, seed], LONG, seed=seed) for seed in range(4)]
            stopped = client.engines[0].pids[0]
            os.kill(stopped, signal.SIGSTOP)
            try:
                await until(lambda: jobs[1].output and jobs[3].output)
                assert {job.engine for job, _ in await client.list_jobs()} == {1}
            finally:
                os.kill(stopped, signal.SIGCONT)
            for job in await asyncio.gather(*map(follow, jobs)):
                check_finished(job)

    run(work())


def test_jobs_go_on_in_another_engine_at_once() -> None:
    """Theirs is killed, and does not come back."""

    async def work() -> None:
        async with serving(Options(pace=SLOW), PATIENT, engines=2) as client:
            jobs = [client.open([7, seed], LONG, seed=seed) for seed in range(8)]
            killed: list[int] = []

            def kill(job: OpenJob) -> None:
                if len(job.output) >= 20 and not killed:
                    killed.append(client.engines[0].pids[0])
                    os.kill(killed[0], signal.SIGKILL)

            for job in await asyncio.gather(*(follow(job, kill) for job in jobs)):
                check_finished(job)
            await until(lambda: [engine.ready for engine in client.engines] == [False, True])  # it may have been done
            assert client.ready and client.healthy and client.info["max_num_seqs"] == 8
            assert client.info["max_num_seqs_of_all"] == 16
            assert killed[0] not in client.pids and len(client.pids) == 1

    run(work())


@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_moments_of_random_engines(seed: int, tmp_path: Path) -> None:
    async def work() -> None:
        rng = random.Random(seed)
        killed_at = [rng.randint(1, 20) for _ in range(8)]  # whoever has none of the work left lives on
        options = Options(slots=8, pace=SLOW, starts=str(tmp_path / "starts"), killed_at=killed_at)
        async with serving(options, engines=3) as client:
            params = SamplingParams(max_tokens=60, ignore_eos=True, logprobs=1)
            jobs = [client.open([7, index], params, seed=index) for index in range(48)]
            for job in await asyncio.gather(*map(follow, jobs)):
                check_finished(job)
            await until(lambda: client.restarts >= 3)

    run(work())


@pytest.mark.parametrize("killed", [False, True])
def test_a_job_that_brings_engines_down_is_found(killed: bool) -> None:
    async def work() -> None:
        options = Options(pace=SLOW, poison={"5": 30}, killed_by_poison=killed)
        async with serving(options, engines=3) as client:
            jobs = [client.open([7], LONG, seed=seed) for seed in range(9)]
            await asyncio.gather(*map(follow, jobs))
            for job in jobs:
                check_finished(job) if job.seed != 5 else check_growing(job)
            assert jobs[5].finish_reason == "error" and len(jobs[5].output) == 30
            await until(lambda: all(engine.ready for engine in client.engines))
            restarts = sorted(engine.restarts for engine in client.engines)
            assert sum(restarts) == (7 if killed else 3) and restarts[0] == 0
            assert killed or restarts[1] == 0, "one engine had it all"

    run(work())


def test_one_engine_that_does_not_start_any_more_is_told_and_done_without(tmp_path: Path) -> None:
    async def work() -> None:
        options = Options(pace=SLOW, starts=str(tmp_path / "starts"), failing=[2, 3, 4, 5, 6])
        health = Health(backoff=0.001, max_backoff=0.05)
        async with serving(options, health, engines=2) as client:
            jobs = [client.open([7], LONG, seed=seed) for seed in range(4)]
            await jobs[0].news()
            os.kill(client.engines[0].pids[0], signal.SIGSEGV)
            await until(lambda: client.engines[0].failure is not None)
            assert client.healthy and client.ready
            late = client.open([7], LONG, seed=5)
            assert late.engine == 1
            for job in await asyncio.gather(*map(follow, [*jobs, late])):
                check_finished(job)
            await until(lambda: client.engines[0].ready)
            assert client.engines[0].failure is None

    run(work())


def test_when_none_starts_any_more_all_that_is_open_ends(tmp_path: Path) -> None:
    async def work() -> None:
        options = Options(pace=SLOW, starts=str(tmp_path / "starts"), failing=list(range(2, 100)))
        health = Health(backoff=0.001, max_backoff=0.01)
        async with serving(options, health, engines=2) as client:
            jobs = [client.open([7], LONG, seed=seed) for seed in range(4)]
            await jobs[0].news()
            for pid in client.pids:
                os.kill(pid, signal.SIGKILL)
            for job in await asyncio.gather(*map(follow, jobs)):
                assert job.finish_reason == "error" and "does not start any more" in (job.error or "")
            assert not client.healthy and not client.open_jobs
            with pytest.raises(EngineUnavailable, match="does not start any more"):
                client.open([7], LONG, seed=1)

    run(work())


def test_the_first_is_alone_and_the_others_have_its_kv_cache(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(Options(starts=str(tmp_path / "starts")), engines=3) as client:
            infos = [engine.info for engine in client.engines]
            assert infos[0]["start"] == 0 and {info["start"] for info in infos} == {0, 1, 2}
            assert {info["kv_cache_bytes"] for info in infos} == {4096}

    run(work())


def test_where_one_does_not_start_none_is_left(tmp_path: Path) -> None:
    async def work() -> None:
        before = asyncio.all_tasks()
        client = EngineClient(
            Options(starts=str(tmp_path / "starts"), failing=[2]).command(), letters(), health=QUICK, engines=3
        )
        with pytest.raises(EngineStartError, match="start 2 was told to fail") as caught:
            await client.start()
        assert caught.value.field == "model" and client.pids == [] and asyncio.all_tasks() <= before
        with pytest.raises(EngineUnavailable, match="not been started"):
            client.open([7], LONG, seed=1)

    run(work())
