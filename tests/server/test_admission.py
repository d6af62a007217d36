"""Who is taken in: the bounded queue, its fair share, and a server that shuts down."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from http_world import World, run
from statuses import status
from toy_engine import Beside

PATH = "/v1/completions"
PLAIN: dict[str, Any] = {"prompt": "abc", "max_tokens": 4, "ignore_eos": True}


async def send(
    world: World, count: int, headers: dict[str, str] | None = None, **fields: Any
) -> list[asyncio.Task[Any]]:
    """So many requests at once, waited for until their jobs are open."""
    before = len(world.engine.opened)
    body = {**PLAIN, **fields}
    tasks = [asyncio.create_task(world.client.post(PATH, json=body, headers=headers)) for _ in range(count)]
    await world.engine.until(lambda engine: len(engine.opened) >= before + count)
    return tasks


async def statuses(tasks: list[asyncio.Task[Any]]) -> set[int]:
    return {response.status_code for response in await asyncio.gather(*tasks)}


def test_a_full_queue_says_when_to_come_again() -> None:
    async def scenario(world: World) -> None:
        world.engine.backlog = 50.0  # seconds for the five that will be open
        tasks = await send(world, 5)
        error = await world.refuse(PATH, {**PLAIN, "n": 2}, status=429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert world.headers["retry-after"] == "20"  # two of five have to end
        world.engine.release()
        assert await statuses(tasks) == {200}
        await world.post(PATH, PLAIN)

    run(scenario, held=True, max_num_seqs=2, max_queue=3)


def test_what_fits_when_all_engines_are_up_is_not_refused_for_ever() -> None:
    """One of two engines of two rows is being started: a request of six jobs may come again, one of eight need not."""

    async def scenario(world: World) -> None:
        world.engine.info["max_num_seqs_of_all"] = 4
        tasks = await send(world, 1)
        assert (await world.refuse(PATH, {**PLAIN, "n": 6}, status=429))["code"] == "queue_full"
        await world.refuse(PATH, {**PLAIN, "prompt": ["abc"] * 7}, status=429)
        error = await world.refuse(PATH, {**PLAIN, "n": 8}, status=400)
        assert "never has room for more than 7" in error["message"]
        world.engine.release()
        assert await statuses(tasks) == {200}

    run(scenario, held=True, max_num_seqs=2, max_queue=3)


def test_jobs_of_several_engines_end_side_by_side() -> None:
    """Five in 50 s here and thirty in 20 s there: one and six tenths of them a second."""

    async def scenario(world: World) -> None:
        world.engine.backlog = 50.0
        world.engine.others = [Beside(status=status(live=30, backlog=20.0)), Beside(ready=False)]
        tasks = await send(world, 5)
        await world.refuse(PATH, {**PLAIN, "n": 5}, status=429)
        assert world.headers["retry-after"] == "4"  # 5 / (0.1 + 1.5), rounded up
        world.engine.release()
        assert await statuses(tasks) == {200}

    run(scenario, held=True, max_num_seqs=2, max_queue=3)


def test_a_request_that_never_has_room_is_refused() -> None:
    async def scenario(world: World) -> None:
        error = await world.refuse(PATH, {**PLAIN, "n": 6})
        assert error["param"] == "n" and "more than 5" in error["message"]
        error = await world.refuse(PATH, {**PLAIN, "prompt": ["a"] * 6})
        assert error["param"] == "prompt" and "more than 5" in error["message"]

    run(scenario, max_num_seqs=2, max_queue=3)


def test_a_full_queue_is_shared_fairly() -> None:
    async def scenario(world: World) -> None:
        tasks = await send(world, 6, user="hog")
        await world.refuse(PATH, {**PLAIN, "user": "hog"}, status=429)
        tasks += await send(world, 3, user="ann")  # half of six places is hers
        await world.refuse(PATH, {**PLAIN, "user": "ann"}, status=429)
        tasks += await send(world, 1, user="bob")
        await world.refuse(PATH, {**PLAIN, "user": "cem"}, status=429)  # ten is twice what may wait, and two run
        world.engine.release()
        assert await statuses(tasks) == {200}

    run(scenario, held=True, max_num_seqs=2, max_queue=4)


def test_an_answer_that_is_read_slowly_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job has ended; only its client has not read that yet."""

    async def scenario(world: World) -> None:
        may_send = asyncio.Event()
        sending = asyncio.Event()

        async def slow(message: Any) -> None:
            sending.set()
            await may_send.wait()

        async def stays() -> Any:
            if not asked:
                asked.append(True)
                return {"type": "http.request", "body": json.dumps({**PLAIN, "stream": True}).encode()}
            await asyncio.Event().wait()

        asked: list[bool] = []
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": headers, "query_string": b""}
        reading = asyncio.create_task(world.app(scope, stays, slow))
        await world.engine.until(lambda engine: engine.open_jobs)
        await world.refuse(PATH, PLAIN, status=429)
        world.engine.release()
        await sending.wait()
        await world.engine.until(lambda engine: not engine.open_jobs)
        monkeypatch.setattr("fastserve.server.admission._RECLAIM_EVERY", -1.0)
        await world.post(PATH, PLAIN)
        may_send.set()
        await reading

    run(scenario, held=True, max_num_seqs=1, max_queue=0)


def test_users_of_another_key_are_others() -> None:
    async def scenario(world: World) -> None:
        for key in ("one", "two"):
            await world.post(PATH, {**PLAIN, "user": "ann"}, headers={"Authorization": f"Bearer {key}"})
        assert [job.origin.tenant for job in world.engine.opened] == ["key 0/ann", "key 1/ann"]

    run(scenario, api_key=("one", "two"))


def test_a_key_gets_no_more_by_naming_many_users() -> None:
    async def scenario(world: World) -> None:
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        tasks = [task for number in range(6) for task in await send(world, 1, headers=one, user=f"u{number}")]
        await world.refuse(PATH, {**PLAIN, "user": "u6"}, headers=one, status=429)  # a seventh of six is no place
        for user in ("ann", "bob"):  # half of six is enough for two
            tasks += await send(world, 1, headers=two, user=user)
        await world.refuse(PATH, {**PLAIN, "user": "u6"}, headers=one, status=429)
        world.engine.release()
        assert await statuses(tasks) == {200}

    run(scenario, held=True, max_num_seqs=2, max_queue=4, api_key=("one", "two"))


# --- shutting down, and engines that are gone ------------------------------------------------------------------------


def test_draining_refuses_new_work_and_finishes_the_old() -> None:
    async def scenario(world: World) -> None:
        tasks = await send(world, 2)
        world.service.drain()
        error = await world.refuse(PATH, PLAIN, status=503)
        assert error["code"] == "shutting_down" and world.headers["retry-after"] == "5"
        assert (await world.get("/health", status=503))["status"] == "draining"
        world.engine.release()
        assert await statuses(tasks) == {200}

    run(scenario, held=True)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_left_at_the_end_is_told(stream: bool) -> None:
    async def scenario(world: World) -> None:
        tasks = await send(world, 2, stream=stream)
        world.engine.step()
        for _ in range(20):
            await asyncio.sleep(0)
        world.service.end_all()
        for response in await asyncio.gather(*tasks):
            assert response.status_code == (200 if stream else 503) and "shutting_down" in response.text
        assert all(job.closed for job in world.engine.opened)

    run(scenario, held=True)


def test_an_engine_that_is_gone() -> None:
    async def scenario(world: World) -> None:
        tasks = await send(world, 1)
        streams = await send(world, 1, stream=True, n=2)
        world.engine.step()
        for _ in range(20):
            await asyncio.sleep(0)
        world.engine.failure = "the engine failed to start 5 times: no memory"
        for job in list(world.engine.open_jobs.values()):
            job.end("error", world.engine.failure)
        assert (await tasks[0]).status_code == 503 and "no memory" in (await tasks[0]).text
        assert "no memory" in (await streams[0]).text.split("\n\n")[-2]
        error = await world.refuse(PATH, PLAIN, status=503)
        assert error["code"] == "engine_unavailable" and "retry-after" in world.headers
        health = await world.get("/health", status=503)
        assert (health["status"], health["error"]) == ("unhealthy", world.engine.failure)

    run(scenario, held=True)


def test_a_job_that_failed_is_a_500() -> None:
    async def scenario(world: World) -> None:
        (task,) = await send(world, 1)
        world.engine.opened[-1].end("error", "every token is masked")
        response = await task
        assert response.status_code == 500 and "every token is masked" in response.json()["error"]["message"]

    run(scenario, held=True)


def test_places_are_given_back_whatever_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` sees that nothing is left open."""

    async def scenario(world: World) -> None:
        counted: list[Any] = []

        def breaks(job: Any) -> None:
            counted.append(job)
            raise RuntimeError("the disk is gone")

        monkeypatch.setattr(world.service, "ended", breaks)
        await world.client.post(PATH, json={**PLAIN, "n": 3})
        assert counted == world.engine.opened  # each of them, and in order

    run(scenario)


def test_opening_many_jobs_lets_others_have_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives back none of their places meanwhile: who reclaims sees jobs that are not open yet."""
    monkeypatch.setattr("fastserve.server.calls._BURST", 10)

    async def scenario(world: World) -> None:
        seen: list[int] = []

        async def other() -> None:
            while len(world.engine.opened) < 12:
                world.service._reclaim()
                seen.append(len(world.engine.opened))
                assert not world.engine.opened or world.service.admission.open_jobs == 12
                await asyncio.sleep(0)

        looking = asyncio.create_task(other())
        await world.post(PATH, {**PLAIN, "n": 12})
        await looking
        assert {4, 8} <= set(seen)  # of three tokens each

    run(scenario, max_num_seqs=12)
