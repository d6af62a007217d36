"""The scripts in examples/ do what they say, against a server."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from itertools import pairwise
from pathlib import Path

from http_world import World, run

from fastserve.origin import Origin

EXAMPLES = Path(__file__).parents[2] / "examples"


async def printed(world: World, *command: str) -> str:
    async with world.served() as url:
        process = await asyncio.create_subprocess_exec(
            *command, url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        out = (await process.communicate())[0].decode()
    assert process.returncode == 0, out
    return out


def test_openais_client() -> None:
    async def scenario(world: World) -> None:
        out = await printed(world, sys.executable, str(EXAMPLES / "openai_client.py"))
        assert [line.split(":")[0] for line in out.splitlines() if line.startswith("---")] == [
            "--- in the background", "--- as usual", "--- urgently"
        ]  # fmt: skip
        assert out.count("'queue': ") == out.count("'preemptions': ") == 3
        assert sorted(job.priority for job in world.engine.opened) == [-10, 0, 10]

    run(scenario)


def test_curl() -> None:
    async def scenario(world: World) -> None:
        out = await printed(world, "bash", str(EXAMPLES / "curl.sh"))
        answers = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert answers[0]["status"] == "ok" and answers[1]["usage"]["fastserve"]["queue"] is not None
        assert "data: [DONE]" in out and answers[-1]["object"] == "list"

    run(scenario)


def test_conversations() -> None:
    async def scenario(world: World) -> None:
        out = await printed(world, sys.executable, str(EXAMPLES / "conversation.py"))
        assert out.count(" prompt tokens were cached)") == 6
        chat, agent = (world.engine.opened[:3], world.engine.opened[3:])
        assert {job.origin for job in chat} == {Origin(tenant="ann")}
        (origin,) = {job.origin for job in agent}
        name = (origin.program or "").removeprefix("agent-")
        assert origin == Origin(tenant="ann", program=f"agent-{uuid.UUID(name)}", cache_salt="only-ours")
        for calls in (chat, agent):
            for earlier, later in pairwise(calls):
                assert later.prompt[: len(earlier.prompt)] == earlier.prompt, "a turn repeats what was before it"
        await printed(world, sys.executable, str(EXAMPLES / "conversation.py"))
        assert world.engine.opened[-1].origin.program != origin.program, "another run is another program"

    run(scenario)
