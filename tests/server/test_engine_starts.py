"""Engines that do not start, or take their time; and the command that starts them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_world import LONG, QUICK, SLOW, follow, kill_and_wait_for_the_next, run, serving, start_raises, until
from letters import check_finished
from stand_in import Options

from fastserve.engine_options import EngineOptions
from fastserve.server.client import EngineClient, engine_command
from fastserve.server.engine_api import EngineUnavailable
from fastserve.server.supervisor import BackOff, EngineStartError, Health
from fastserve.types import InvalidRequest

pytestmark = pytest.mark.usefixtures("nothing_is_left")


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


def test_a_launcher_that_ends_before_rank_0_comes() -> None:
    async def work() -> None:
        client = EngineClient(["false"], None)
        with pytest.raises(EngineStartError, match=r"^the launcher false ended with exit code 1 before rank 0 "):
            await client.start()

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
