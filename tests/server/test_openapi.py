"""/openapi.json keeps its word: whatever schemathesis makes of it is answered as it says, and never with a 5xx."""

from __future__ import annotations

import asyncio
import itertools
import json
import queue
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis
from http_world import World, parse
from hypothesis import settings
from schemathesis.checks import CHECKS
from schemathesis.specs.openapi.checks import positive_data_acceptance
from toy_engine import ToyEngine
from toy_llm import CONTEXT

MESSAGES = [{"role": "user", "content": "hi"}]
KEY = {"Authorization": "Bearer k"}
CHECKS_OF_OURS = [
    check
    for check in CHECKS.get_all()
    if check is not positive_data_acceptance  # a schema does not know the vocabulary and the context
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server in a thread of its own, with a key and a body limit."""
    told: queue.Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def main() -> None:
        world, stop = World(ToyEngine(), api_key=("k",)), asyncio.Event()
        async with world.served() as address:
            told.put((address, asyncio.get_running_loop(), stop))
            await stop.wait()
        assert not world.engine.open_jobs and not world.service.admission.open_jobs

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    address, loop, stop = told.get(timeout=30)
    yield address
    loop.call_soon_threadsafe(stop.set)
    thread.join()


@pytest.fixture(scope="module")
def document(url: str) -> Any:
    return httpx.get(f"{url}/openapi.json", headers=KEY).raise_for_status().json()


REFUSED = {"expected-statuses": [400, 401, 404, 405, 408, 413, 415]}
API = schemathesis.openapi.from_dict(
    World(ToyEngine(), api_key=("k",)).app.openapi(),
    config=schemathesis.Config.from_dict(
        {
            "checks": {"negative_data_rejection": REFUSED},
            "max-stream-events": 2 * CONTEXT,  # else it hangs up early, and there is no [DONE]
        }
    ),
)


@API.parametrize()
@settings(max_examples=40, derandomize=True, deadline=None)
def test_answers_are_as_documented(case: schemathesis.Case, url: str, document: Any) -> None:
    response = case.call(base_url=url, headers=KEY, timeout=30)
    case.validate_response(response, checks=CHECKS_OF_OURS, headers=KEY)
    method = case.method.lower()  # not always one that there is
    if method in document["paths"][case.operation.path]:
        kind = response.headers["content-type"][0]
        check_answer(document, case.operation.path, method, response.status_code, kind, response.text)
    else:
        assert response.status_code == 405
        conforms(document, {"$ref": "#/components/schemas/ErrorBody"}, response.json())


def check_answer(document: Any, path: str, method: str, status: int, kind: str, text: str) -> None:
    """Events as well, which schemathesis does not look into."""
    content = document["paths"][path][method]["responses"][str(status)]["content"]
    kind = kind.partition(";")[0]
    if kind == "text/event-stream":
        said = content[kind]["itemSchema"]["properties"]["data"]["anyOf"][0]["contentSchema"]
        for event in parse(text):
            conforms(document, said, event)
    elif kind == "application/json":
        conforms(document, content[kind]["schema"], json.loads(text))


def conforms(document: Any, schema: Any, value: Any) -> None:
    jsonschema_rs.validate({**schema, "components": document["components"]}, value)


OPTIONS: dict[str, tuple[Any, ...]] = {
    "stream": (None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}),
    "logprobs": (False, True),
    "n": (1, 2),
    "stop": (None, ["a", "b", "c"]),
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_kind_of_answer(path: str, url: str, document: Any) -> None:
    chat = "chat" in path
    for stream, logprobs, n, stop in itertools.product((False, *OPTIONS["stream"]), *list(OPTIONS.values())[1:]):
        body: dict[str, Any] = {"messages": MESSAGES} if chat else {"prompt": ["ab", "c"], "echo": not logprobs}
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
        if stream is not False:
            body |= {"stream": True, "stream_options": stream}
        body |= {"n": n, "stop": stop, "seed": 5, "max_tokens": 8, "ignore_eos": True}
        response = httpx.post(url + path, json=body, headers=KEY)
        assert response.status_code == 200, response.text
        check_answer(document, path, "post", 200, response.headers["content-type"], response.text)
        if stream is not False:
            assert all(choice["index"] < 2 * n for event in parse(response.text) for choice in event["choices"])


def test_the_document_is_for_people_too(document: Any) -> None:
    jsonschema_rs.meta.validate({"$defs": document["components"]["schemas"]})
    for name in ("CompletionRequest", "ChatRequest", "TokenizeRequest"):
        for field, schema in document["components"]["schemas"][name]["properties"].items():
            assert schema.get("description"), f"{name}.{field} has no description"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["description"] and operation["operationId"].isidentifier(), path
            assert all(response["description"] for response in operation["responses"].values())
    assert "HTTPValidationError" not in json.dumps(document)
