"""Whose a request is, by body, header and key; and what the answer says that its prompt found in the cache."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from http_world import World, run
from toy_engine import ToyEngine, ToyJob

from fastserve.ipc import TenantStatus
from fastserve.origin import Origin
from fastserve.types import SamplingParams

PATH, CHAT = "/v1/completions", "/v1/chat/completions"
PLAIN: dict[str, Any] = {"prompt": "abc", "max_tokens": 4, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "hi"}]


def bodies(**more: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(PATH, {**PLAIN, **more}), (CHAT, {"messages": MESSAGES, "max_tokens": 4, "ignore_eos": True, **more})]


@pytest.mark.parametrize(
    ("given", "headers", "origin"),
    [
        ({}, {}, Origin()),
        ({"user": "ann"}, {}, Origin(tenant="ann")),
        ({"safety_identifier": "ann"}, {}, Origin(tenant="ann")),
        ({"user": "ann", "safety_identifier": "ann"}, {}, Origin(tenant="ann")),
        ({"user": "", "safety_identifier": "4711"}, {}, Origin(tenant="4711")),
        ({"program_id": "agent é"}, {}, Origin(program="agent é")),
        ({}, {"X-Program-Id": "agent"}, Origin(program="agent")),
        ({}, {"X-Program-Id": "agent é".encode()}, Origin(program="agent é")),
        ({"program_id": "agent"}, {"X-Program-Id": "agent"}, Origin(program="agent")),
        ({}, [("X-Program-Id", "agent"), ("X-Program-Id", "agent")], Origin(program="agent")),
        ({"program_id": ""}, {"X-Program-Id": ""}, Origin()),
        ({"program_id": "p" * 256, "cache_salt": "s" * 256}, {}, Origin(program="p" * 256, cache_salt="s" * 256)),
        ({"prompt_cache_key": "docs"}, {}, Origin(cache_key="docs")),
        ({"user": None, "program_id": None, "cache_salt": None, "prompt_cache_key": None}, {}, Origin()),
    ],
)
def test_where_a_request_comes_from(given: dict[str, Any], headers: Any, origin: Origin) -> None:
    async def scenario(world: World) -> None:
        for path, body in bodies(**given):
            await world.post(path, body, headers=headers)
        assert [job.origin for job in world.engine.opened] == [origin] * 2

    run(scenario)


def test_the_users_of_a_key_are_tenants_of_their_own() -> None:
    async def scenario(world: World) -> None:
        for key in ("one", "two"):
            for user in ({}, {"user": "key 0/"}, {"safety_identifier": "ann"}):
                await world.post(PATH, {**PLAIN, **user}, headers={"Authorization": f"Bearer {key}"})
        tenants = [job.origin.tenant for job in world.engine.opened]
        assert tenants == ["key 0/", "key 0/key 0/", "key 0/ann", "key 1/", "key 1/key 0/", "key 1/ann"]

    run(scenario, api_key=("one", "two"))


@pytest.mark.parametrize(
    ("given", "headers", "param"),
    [
        ({"cache_salt": ""}, {}, "cache_salt"),
        ({"cache_salt": "s" * 257}, {}, "cache_salt"),
        ({"cache_salt": 4}, {}, "cache_salt"),
        ({"program_id": "p" * 257}, {}, "program_id"),
        ({"program_id": ["p"]}, {}, "program_id"),
        ({"safety_identifier": {}}, {}, "safety_identifier"),
        ({"safety_identifier": "u" * 257}, {}, "safety_identifier"),
        ({"prompt_cache_key": 5}, {}, "prompt_cache_key"),
        ({"prompt_cache_key": "k" * 257}, {}, "prompt_cache_key"),
        ({"program_id": "one"}, {"X-Program-Id": "two"}, "program_id"),
        ({}, [("X-Program-Id", "one"), ("X-Program-Id", "two")], "X-Program-Id"),
        ({"program_id": "one"}, [("X-Program-Id", "one"), ("X-Program-Id", "two")], "X-Program-Id"),
        ({"user": "ann", "safety_identifier": "4711"}, {}, "safety_identifier"),
        ({}, {"X-Program-Id": "p" * 257}, "X-Program-Id"),
        ({}, {"X-Program-Id": b"agent \xe9"}, None),
    ],
)
def test_what_is_no_origin_is_named(given: dict[str, Any], headers: Any, param: str | None) -> None:
    async def scenario(world: World) -> None:
        for path, body in bodies(**given):
            error = await world.refuse(path, body, headers=headers)
            assert error["param"] == param and (param or "X-Program-Id") in error["message"]
        assert not world.engine.opened

    run(scenario)


@pytest.mark.parametrize("field", ["program_id", "cache_salt", "safety_identifier", "prompt_cache_key"])
def test_half_a_character_is_told_to_nobody(field: str) -> None:
    async def scenario(world: World) -> None:
        content = b'{"prompt": "abc", "%s": "\\ud800"}' % field.encode()
        answer = await world.client.post(PATH, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field

    run(scenario)


def test_live_jobs_tell_whose_they_are() -> None:
    async def scenario(world: World) -> None:
        given = {"user": "ann", "program_id": "agent", "cache_salt": "secret"}
        asked = asyncio.create_task(world.client.post(PATH, json={**PLAIN, **given}))
        await world.engine.until(lambda engine: engine.open_jobs)
        answer = await world.get("/v1/fastserve/jobs")
        (job,) = answer["data"]
        assert (job["user"], job["program_id"], job["cached_tokens"]) == ("ann", "agent", 0)
        assert "secret" not in str(answer)
        world.engine.release()
        await asked

    run(scenario, held=True)


def test_a_key_is_told_nothing_of_what_others_call_things() -> None:
    async def scenario(world: World) -> None:
        ours, theirs = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        tasks = []
        for headers, user in ((ours, "ann"), (theirs, "bob"), (theirs, "")):
            body = {**PLAIN, "user": user, "program_id": f"agent of {user}"}
            named = {**headers, "X-Request-Id": f"asked by {user}"}
            tasks.append(asyncio.create_task(world.client.post(PATH, json=body, headers=named)))
            await world.engine.until(lambda engine: len(engine.opened) == len(tasks))
        world.engine.tenants.said([TenantStatus(f"key {name}", 1.0) for name in ("0/ann", "1/bob", "1/")])
        label = world.engine.tenants.label("key 1/bob")

        told = await world.get("/v1/fastserve/jobs", headers=ours)
        whose = {job["user"]: (job["request_id"], job["program_id"]) for job in told["data"]}
        assert whose == {"key 0/ann": ("asked by ann", "agent of ann"), label: (None, None), "key 1": (None, None)}
        assert [(each["tenant"], each["open_jobs"]) for each in told["server"]["tenants"]] == [
            ("key 0/ann", 1), ("key 1", 1), (label, 1)
        ]  # fmt: skip
        assert "bob" not in str(told)

        told = await world.get("/v1/fastserve/jobs", headers=theirs)
        assert {job["user"] for job in told["data"]} >= {"key 1/bob", "key 1/"} and "ann" not in str(told)
        world.engine.release()
        await asyncio.gather(*tasks)

    run(scenario, held=True, api_key=("one", "two"))


# --- what was found in the cache --------------------------------------------------------------------------------------


class Finding(ToyEngine):
    """Finds of a prompt as many tokens as jobs were opened before."""

    def open(self, prompt: list[int], params: SamplingParams, **more: Any) -> ToyJob:
        job = super().open(prompt, params, **more)
        job.found = job.key
        return job


def test_cached_tokens_are_of_the_first_answer_to_each_prompt() -> None:
    async def scenario(world: World) -> None:
        assert (await world.post(PATH, PLAIN))["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        (_, chat) = bodies()[1]
        assert (await world.post(CHAT, chat))["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
        several = {**PLAIN, "prompt": ["abc", "ab"], "n": 3}  # jobs 2, 3, 4 and 5, 6, 7
        assert (await world.post(PATH, several))["usage"]["prompt_tokens_details"] == {"cached_tokens": 2 + 5}

    run(scenario, Finding)


def test_a_stream_tells_of_the_cache_at_its_end() -> None:
    async def scenario(world: World) -> None:
        for path, body in bodies(stream_options={"include_usage": True, "continuous_usage_stats": True}):
            *events, last = await world.events(path, body)
            assert events and all("prompt_tokens_details" not in event["usage"] for event in events)
            assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": len(world.engine.opened) - 1}

    run(scenario, Finding)


def test_an_engine_that_died_before_its_accounts_has_told_of_the_cache() -> None:
    class Silent(ToyEngine):
        def step(self) -> None:
            jobs = list(self.open_jobs.values())
            super().step()
            for job in jobs:
                job.metrics = None

    async def scenario(world: World) -> None:
        usage = (await world.post(PATH, PLAIN))["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0} and usage["fastserve"]["queue"] is None

    run(scenario, Silent)


def test_openais_client_reads_and_sends_all_of_it() -> None:
    async def scenario(world: World) -> None:
        async with world.served() as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k") as client:
            asked: dict[str, Any] = {"model": "toy", "messages": MESSAGES, "max_completion_tokens": 4}
            more = {"extra_body": {"program_id": "agent", "cache_salt": "s"}, "prompt_cache_key": "docs"}
            for _ in range(2):
                answer = await client.chat.completions.create(**asked, **more, safety_identifier="ann")
            assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.cached_tokens == 1
            header = {"X-Program-Id": "agent"}
            await client.chat.completions.create(**asked, extra_headers=header)
        sent = Origin(tenant="ann", program="agent", cache_salt="s", cache_key="docs")
        assert [job.origin for job in world.engine.opened] == [sent, sent, Origin(program="agent")]

    run(scenario, Finding)
