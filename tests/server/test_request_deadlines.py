"""A request's deadline: refused when the job alone would miss it, dropped when it can no longer be met."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from http_world import World, run
from test_admission import PATH, PLAIN, send, statuses


@pytest.mark.parametrize("by", ["field", "header"])
def test_a_deadline_that_the_job_alone_would_miss_is_refused(by: str) -> None:
    """The toy takes 1.03 s for a prompt of three tokens, and as long for each token after the first."""

    async def scenario(world: World) -> None:
        async def ask(seconds: float, status: int) -> dict[str, Any]:
            fields = {"timeout": seconds} if by == "field" else {}
            headers = {"X-Request-Timeout": str(seconds)} if by == "header" else {}
            return dict(await world.post(PATH, {**PLAIN, **fields}, status=status, headers=headers))

        error = (await ask(1.0, 408))["error"]
        assert (error["code"], error["param"]) == ("deadline_unreachable", "timeout")
        assert error["message"].startswith("timeout: 1 s are not enough")  # what was asked for, not what is left of it
        assert world.headers["x-should-retry"] == "false" and not world.engine.opened
        await ask(3.5, 408)  # with ignore_eos, all four tokens have to come
        await ask(100.0, 200)
        error = (await world.post(PATH, PLAIN, status=400, headers={"X-Request-Timeout": "soon"}))["error"]
        assert "X-Request-Timeout" in error["message"]

    run(scenario)


def test_the_queue_counts_where_nobody_overtakes() -> None:
    async def scenario(world: World) -> None:
        world.engine.backlog = 40.0
        tasks = await send(world, 4)
        error = await world.refuse(PATH, {**PLAIN, "timeout": 20}, status=408)
        assert "30 s in the queue" in error["message"]  # three of four have to end
        world.engine.release()
        assert await statuses(tasks) == {200}

    run(scenario, held=True, max_num_seqs=2, policy="fcfs")


class Clock:
    """Replaces sleeps of deadlines: they end when told, the shortest first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fastserve.server import calls

        self.sleeps: list[tuple[float, asyncio.Future[None]]] = []

        class Loop:
            sleep = staticmethod(self._sleep)
            ensure_future = staticmethod(asyncio.ensure_future)
            CancelledError = asyncio.CancelledError

        monkeypatch.setattr(calls, "asyncio", Loop)

    async def _sleep(self, seconds: float) -> None:
        future = asyncio.get_running_loop().create_future()
        self.sleeps.append((seconds, future))
        await future

    async def pass_one(self) -> None:
        for _ in range(20):  # of the loop, for whoever is to sleep
            await asyncio.sleep(0)
        shortest = min(self.sleeps, key=lambda sleep: sleep[0])
        self.sleeps.remove(shortest)
        shortest[1].set_result(None)


def test_a_job_that_was_not_begun_in_time_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        clock = Clock(monkeypatch)
        (task,) = await send(world, 1, timeout=100)
        await clock.pass_one()  # until its prefill would be too late
        response = await task
        assert response.status_code == 504 and "had not started" in response.json()["error"]["message"]
        assert world.engine.opened[-1].closed

    run(scenario, held=True)


def test_a_job_that_no_engine_has_was_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the engine is being restarted, nothing is listed."""

    async def scenario(world: World) -> None:
        async def nothing() -> list[Any]:
            return []

        clock = Clock(monkeypatch)
        (task,) = await send(world, 1, timeout=100)
        monkeypatch.setattr(world.engine, "ready", False)
        monkeypatch.setattr(world.engine, "list_jobs", nothing)
        await clock.pass_one()
        response = await task
        assert response.status_code == 504 and "had not started" in response.json()["error"]["message"]

    run(scenario, held=True)


def test_a_deadline_holds_while_the_engine_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        clock = Clock(monkeypatch)
        monkeypatch.setattr(world.engine, "list_jobs", asyncio.Event().wait)
        (task,) = await send(world, 1, timeout=100)
        await clock.pass_one()  # its prefill would be too late, but nobody says whether it has begun
        await clock.pass_one()  # its deadline
        response = await task
        assert response.status_code == 504 and "had 0 tokens" in response.json()["error"]["message"]

    run(scenario, held=True)


def test_a_prompt_that_may_be_cached_is_not_refused() -> None:
    """Of 60 tokens, which take 1.6 s, all but the last block of 16 may be there; 1.12 s are left of it."""

    async def scenario(world: World) -> None:
        body = {**PLAIN, "prompt": "abcdef" * 10, "max_tokens": 1}
        await world.post(PATH, {**body, "timeout": 1.5}, status=408)
        world.engine.info.update(enable_prefix_caching=True, block_size=16)
        await world.post(PATH, {**body, "timeout": 1.5})
        error = await world.refuse(PATH, {**body, "timeout": 1.1}, status=408)
        assert "at least 1.12 s" in error["message"]
        world.engine.info.update(enable_prefix_caching=False)
        await world.post(PATH, {**body, "timeout": 1.5}, status=408)

    run(scenario)


@pytest.mark.parametrize("timeout", [100.0, 1.5])
def test_what_the_engine_has_of_a_prompt_leaves_time_to_start(monkeypatch: pytest.MonkeyPatch, timeout: float) -> None:
    """Nothing at first, then 16 tokens, then 48, then no more; 1.5 s would not do for the whole prompt."""

    async def scenario(world: World) -> None:
        world.engine.info.update(enable_prefix_caching=True, block_size=16)
        monkeypatch.setattr(world.service, "listing_age", 0.0)
        clock = Clock(monkeypatch)
        (task,) = await send(world, 1, prompt="abcdef" * 10, timeout=timeout, max_tokens=1)
        (job,) = world.engine.opened
        for found in (16, 48, 48):
            job.found = found
            assert not task.done()
            await clock.pass_one()
            for _ in range(20):
                await asyncio.sleep(0)
        response = await task
        assert response.status_code == 504 and "had not started" in response.json()["error"]["message"]

    run(scenario, held=True)


def test_a_prompt_that_might_be_cached_and_is_not_is_dropped_when_the_engine_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(world: World) -> None:
        world.engine.info.update(enable_prefix_caching=True, block_size=16)
        clock = Clock(monkeypatch)
        (task,) = await send(world, 1, prompt="abcdef" * 10, timeout=1.5, max_tokens=1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert min(seconds for seconds, _ in clock.sleeps) < 0.3  # as soon as it knows the job
        await clock.pass_one()
        assert (await task).status_code == 504

    run(scenario, held=True)


def test_a_cached_prompt_that_starts_later_than_it_could_uncached_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        world.engine.info.update(enable_prefix_caching=True, block_size=16)
        clock = Clock(monkeypatch)
        (task,) = await send(world, 1, prompt="abcdef" * 10, timeout=100, max_tokens=1)
        world.engine.opened[0].found = 48
        await clock.pass_one()  # the whole prompt would be too late
        world.engine.release()
        assert (await task).status_code == 200

    run(scenario, held=True)


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_whose_time_is_over_is_ended(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    async def scenario(world: World) -> None:
        clock = Clock(monkeypatch)
        (task,) = await send(world, 1, timeout=100, stream=stream)
        world.engine.step()
        for _ in range(20):
            await asyncio.sleep(0)
        await clock.pass_one()  # its prefill is over: nothing happens
        await clock.pass_one()  # its deadline
        response = await task
        if stream:
            assert response.status_code == 200 and "[DONE]" not in response.text
            assert "deadline_exceeded" in response.text.split("\n\n")[-2]
        else:
            assert response.status_code == 504 and response.json()["error"]["code"] == "deadline_exceeded"
        assert world.engine.opened[-1].closed

    run(scenario, held=True)
