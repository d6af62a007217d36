"""The dashboard's page, and what it is drawn from."""

from __future__ import annotations

import asyncio
import re
import time

import pytest
from http_world import World, run
from statuses import status

from fastserve.server import board
from fastserve.types import JobMetrics, SamplingParams

JOBS = "/v1/fastserve/jobs"


def test_the_server_in_figures() -> None:
    async def scenario(world: World) -> None:
        engine = world.engine
        engine.told, engine.restarts = status(), 2
        engine.counted = {"preemptions": 21, "offloaded_bytes": 4096, "uploaded_bytes": 1024}
        engine.counted |= {"prefix_queries": 900, "prefix_hits": 600, "evicted_blocks": 7}
        told = (await world.get(JOBS))["server"]
        assert (told["status"], told["model"], told["policy"]) == ("ok", "toy", "skip-join-mlfq")
        assert (told["max_num_seqs"], told["restarts"], told["open_jobs"]) == (8, 2, 0)
        assert [(level["quantum"], level["waiting"], level["running"]) for level in told["levels"]] == [
            (0.5, 3, 1), (1.0, 0, 1), (None, 2, 0)
        ]  # fmt: skip
        device, host = {"blocks": 100, "used": 25, "cached": 30}, {"blocks": 40, "used": 8, "cached": 5}
        assert told["kv"] == {"device": device, "host": host} and told["programs"] == 3
        assert (told["running"], told["backlog"]) == (2, 12.5)
        assert (told["preemptions"], told["swapped"]) == (21, {"out": 4096, "in": 1024})
        assert told["prefix_cache"] == {"queries": 900, "hits": 600, "evicted_blocks": 7} and told["tenants"] == []
        assert told["regret"] is None and told["finished"]["count"] == 0

    run(scenario)


def test_regret_of_what_has_ended() -> None:
    """Two jobs of a second each at once, on one slot, the first of which had the other wait: 1 and 2 s is the best."""

    async def scenario(world: World) -> None:
        now = time.monotonic()
        for finish in (now - 1.0, now):
            job = world.engine.open([1], SamplingParams(), seed=0)
            world.engine.close(job)
            job.end("length")
            job.metrics = JobMetrics(now - 3.0, finish=finish, prefill_seconds=0.25, decode_seconds=0.75)
            world.service.ended(job)
        told = (await world.get(JOBS))["server"]
        assert told["regret"] == pytest.approx((2.0 + 3.0) / (1.0 + 2.0))
        assert told["finished"]["count"] == 2
        assert f'fastserve:regret{{model_name="toy"}} {told["regret"]}' in (await world.client.get("/metrics")).text

    run(scenario, max_num_seqs=1)


def test_an_engine_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "_ENGINE_ANSWERS", 0.01)

    async def scenario(world: World) -> None:
        monkeypatch.setattr(world.engine, "list_jobs", asyncio.Event().wait)
        error = (await world.get(JOBS, status=503))["error"]
        assert "has not answered" in error["message"]

    run(scenario)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    async def scenario(world: World) -> None:
        page = (await world.client.get("/")).text
        assert "<title>" in page and not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", page)
        ids = set(re.findall(r'id="([\w-]+)"', page))
        asked = set(re.findall(r'(?:text|byId)\("([\w-]+)"', page))
        assert asked <= ids and {"regret", "preemptions", "swapped"} <= asked

    run(scenario)
