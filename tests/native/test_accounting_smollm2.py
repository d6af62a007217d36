"""What a request took, told through the whole server by a real engine that has too little KV memory."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from fastserve.cost import CostModel
from fastserve.loaders import open_model
from fastserve.server.app import create_app
from fastserve.server.client import EngineClient, engine_command
from fastserve.server.service import Service
from fastserve.server.settings import ServerSettings
from fastserve.tokenizer import Tokenizer

PATH = "/v1/completions"
FIELDS = ("queue", "prefill", "decode", "swap", "preemptions")
BLOCK = 16 * 2 * 30 * 3 * 64 * 2  # bytes: tokens, K and V, layers, heads, width, bfloat16
# Of a machine where moving KV is cheaper than computing it again: decisions shall not depend on noise.
COST = CostModel(per_iteration=0.008, per_row=0.0002, per_token=0.0005, per_read=1e-7)


async def accounts(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[dict[str, Any], str, dict[str, float]]:
    """The last choice of a stream, all of its text and its accounts, which are complete."""
    response = await client.post(PATH, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.status_code == 200, response.text
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    choices = [choice for event in events for choice in event["choices"]]
    told = events[-1]["usage"]["fastserve"]
    assert tuple(told) == FIELDS and None not in told.values()
    assert 0.0 <= told["swap"] <= told["queue"] and told["prefill"] > 0.0 and told["decode"] > 0.0
    return choices[-1], "".join(choice["text"] for choice in choices), told


def test_accounts_of_stop_strings_and_swapping(tmp_path: Path) -> None:
    COST.save(tmp_path / "cost.json")
    options = {
        "model": "smollm2", "policy": "mlfq", "max_num_seqs": 2, "threads": 1, "max_model_len": 256,
        "kv_cache_memory": 16 * BLOCK, "swap_space": 64 * BLOCK, "cost": str(tmp_path / "cost.json"),
    }  # fmt: skip
    data = open_model("smollm2").tokenizer_data()
    assert data is not None
    tokenizer = Tokenizer.from_data(data)
    engine = EngineClient(engine_command(options), tokenizer)
    service = Service(ServerSettings(model="smollm2"), engine, tokenizer)

    async def main() -> None:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://smollm2", timeout=120) as client:
            whole = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
            _, text, _ = await accounts(client, whole)
            stop = text[20:26]
            choice, cut, told = await accounts(client, {**whole, "stop": stop})
            assert (choice["finish_reason"], cut) == ("stop", text[: text.index(stop)])
            assert told["preemptions"] == 0 and told["swap"] == 0.0, "it was alone"
            body = {**whole, "prompt": list(range(300, 360)), "max_tokens": 50}
            together = await asyncio.gather(*(accounts(client, {**body, "seed": k}) for k in range(8)))
            assert sum(told["preemptions"] for *_, told in together) > 0
            assert sum(told["swap"] for *_, told in together) > 0.0

    async def serve() -> None:
        await engine.start()
        try:
            await main()
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(serve(), 240))
