"""Models, health, live jobs, keys, CORS, names of requests, the log, the OpenAPI document."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from http_world import World, run
from toy_engine import Beside

PATH = "/v1/completions"
PLAIN: dict[str, Any] = {"prompt": "abc", "max_tokens": 2, "ignore_eos": True}


def test_models() -> None:
    async def scenario(world: World) -> None:
        models = (await world.get("/v1/models"))["data"]
        assert [(model["id"], model["object"], model["max_model_len"]) for model in models] == [
            ("org/one", "model", 256), ("two", "model", 256)
        ]  # fmt: skip
        assert (await world.get("/v1/models/org/one"))["id"] == "org/one"
        assert (await world.get("/v1/models/toy", status=404))["error"]["code"] == "model_not_found"
        for name, told in (("two", "two"), ("org/one", "org/one"), (None, "org/one")):
            assert (await world.post(PATH, {**PLAIN, "model": name}))["model"] == told

    run(scenario, served_model_name=("org/one", "two"))


def test_health() -> None:
    async def scenario(world: World) -> None:
        health = await world.get("/health")
        assert (await world.client.head("/health")).status_code == 200
        assert health["status"] == "ok" and health["engine"] == {"pids": [4711], "restarts": 0}
        assert health["engines"] == [{"status": "ok", "pids": [4711], "restarts": 0, "open_jobs": 0}]
        world.engine.ready = False  # being restarted: requests wait, and nothing is lost
        assert (await world.get("/health"))["status"] == "restarting"
        await world.post(PATH, PLAIN)

    run(scenario)


def test_health_of_several_engines() -> None:
    async def scenario(world: World) -> None:
        why = "its file is gone"
        world.engine.others = [
            Beside(ready=False, pids=[4712], restarts=2, jobs=3), Beside(ready=False, failure=why)
        ]  # fmt: skip
        health = await world.get("/health")
        assert health["status"] == "ok", "work is done as long as one engine is up"
        assert health["engines"][1:] == [
            {"status": "restarting", "pids": [4712], "restarts": 2, "open_jobs": 3},
            {"status": "unhealthy", "pids": [], "restarts": 0, "open_jobs": 0, "error": why},
        ]

    run(scenario)


def test_live_jobs_of_several_engines() -> None:
    async def scenario(world: World) -> None:
        world.engine.others = [Beside(jobs=1)]
        tasks = [asyncio.create_task(world.client.post(PATH, json=PLAIN)) for _ in range(2)]
        await world.engine.until(lambda engine: len(engine.open_jobs) == 2)
        world.engine.open_jobs[1].engine = 1
        told = await world.get("/v1/fastserve/jobs")
        assert [job["engine"] for job in told["data"]] == [0, 1]
        assert told["server"]["engines"] == [{"ready": True, "open_jobs": 1}, {"ready": True, "open_jobs": 1}]
        world.engine.others.clear()
        told = await world.get("/v1/fastserve/jobs")
        assert "engines" not in told["server"] and not any("engine" in job for job in told["data"])
        world.engine.release()
        await asyncio.gather(*tasks)

    run(scenario, held=True)


def test_live_jobs() -> None:
    async def scenario(world: World) -> None:
        headers = {"X-Request-Id": "mine"}
        task = asyncio.create_task(world.client.post(PATH, json={**PLAIN, "user": "ann"}, headers=headers))
        await world.engine.until(lambda engine: engine.open_jobs)
        (job,) = (await world.get("/v1/fastserve/jobs"))["data"]
        assert (job["request_id"], job["user"], job["prompt_tokens"], job["tier"]) == ("mine", "ann", 3, "none")
        world.engine.release()
        assert (await task).status_code == 200
        assert (await world.get("/v1/fastserve/jobs"))["data"] == []

    run(scenario, held=True)


def test_keys() -> None:
    async def scenario(world: World) -> None:
        for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer nobody"}, {"Authorization": "one"}):
            error = await world.refuse(PATH, PLAIN, status=401, headers=headers)
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert world.headers["www-authenticate"] == "Bearer"
        await world.get("/v1/models", status=401)
        await world.get("/v1/nothing", status=401)
        await world.get("/health")
        for key in ("one", "two"):
            await world.post(PATH, PLAIN, headers={"Authorization": f"Bearer {key}"})

    run(scenario, api_key=("one", "two"))


def test_pages_of_other_origins() -> None:
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}

    async def refused(world: World) -> None:
        response = await world.client.options(PATH, headers=preflight)
        assert response.status_code == 405 and "access-control-allow-origin" not in response.headers

    async def allowed(world: World) -> None:
        response = await world.client.options(PATH, headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        await world.refuse(PATH, PLAIN, status=401, headers={"Origin": "https://a.example"})
        assert world.headers["access-control-allow-origin"] == "https://a.example"

    run(refused)
    run(allowed, cors_origin=("https://a.example",), api_key=("k",))


def test_names_of_requests() -> None:
    async def scenario(world: World) -> None:
        body = await world.post(PATH, PLAIN, headers={"X-Request-Id": "mine"})
        assert (body["id"], world.headers["x-request-id"]) == ("cmpl-mine", "mine")
        names = set()
        for given in ("x" * 129, "a\tb", ""):
            await world.post(PATH, PLAIN, headers={"X-Request-Id": given})
            names.add(world.headers["x-request-id"])
        assert len(names) == 3 and all(name.startswith("req-") for name in names)
        await world.get("/nothing", status=404, headers={"X-Request-Id": "lost"})
        assert world.headers["x-request-id"] == "lost"

    run(scenario)


def test_a_line_a_request(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        headers = {"X-Request-Id": "mine"}
        await world.post(PATH, {**PLAIN, "made_up": 1}, headers=headers)
        await world.client.get("/a%0Ab%1b", headers=headers)

    for log_format in ("json", "text"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "fastserve.requests"):
            run(scenario, log_format=log_format)
        lines = [record.getMessage() for record in caplog.records if record.name == "fastserve.requests"]
        assert len(lines) == 2 and all("\n" not in line and "\x1b" not in line for line in lines)
        if log_format == "json":
            first = json.loads(lines[0])
            assert (first["request_id"], first["status"], first["path"]) == ("mine", 200, PATH)
            assert (first["prompt_tokens"], first["output_tokens"], first["finish_reasons"]) == (3, 2, ["length"])
            assert first["ignored_fields"] == ["made_up"] and json.loads(lines[1])["status"] == 404
        else:
            assert "POST /v1/completions 200" in lines[0] and "3+2 tokens mine" in lines[0]


def test_the_document_tells_of_the_errors() -> None:
    async def scenario(world: World) -> None:
        document = await world.get("/openapi.json")
        paths = document["paths"]
        assert {"/v1/models", PATH, "/v1/chat/completions", "/tokenize", "/detokenize", "/health"} <= set(paths)
        responses = paths[PATH]["post"]["responses"]
        assert {"200", "400", "404", "408", "413", "415", "429", "503", "504"} <= set(responses)
        assert "422" not in responses and "HTTPValidationError" not in json.dumps(document)

    run(scenario)
