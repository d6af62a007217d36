"""What is refused, and how: OpenAI's shape of errors, the field at fault, the right status."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from http_world import World, run

from fastserve.server import gate
from fastserve.server.errors import ApiError
from fastserve.server.fields import check_extra
from fastserve.server.protocol import CompletionRequest
from fastserve.server.settings import ServerSettings
from fastserve.types import InvalidRequest

PATH = "/v1/completions"
AS_JSON = {"Content-Type": "application/json; charset=utf-8"}
PLAIN: dict[str, Any] = {"prompt": "abc", "max_tokens": 2}

BAD_FIELDS: list[tuple[str, Any]] = [
    ("prompt", None), ("prompt", ""), ("prompt", []), ("prompt", [[]]), ("prompt", 4), ("prompt", ["a", 4]),
    ("prompt", [True]), ("prompt", {"a": 1}), ("prompt", [61]), ("prompt", [-1]), ("prompt", [4] * 256),
    ("prompt", ["a", [4]]), ("prompt", [[4], [4.5]]), ("prompt", "\ud800"),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", "4"), ("max_tokens", 2.5), ("max_tokens", True),
    ("temperature", -1), ("temperature", "hot"), ("temperature", 1e9), ("temperature", float("nan")),
    ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("min_p", 2), ("presence_penalty", 3), ("frequency_penalty", -3),
    ("repetition_penalty", 0), ("n", 0), ("n", 129), ("n", 10**30), ("best_of", 2), ("seed", 2**64), ("seed", "x"),
    ("stop", "\ud800"), ("stop", ["a", "b\udfff"]), ("stop", "ab" * 513), ("stop", ["a", "b" * 1025]),
    ("user", "\ud800"), ("user", "a" * 257), ("stop", [""]), ("stop", ["a"] * 17), ("stop", [4]),
    ("stop_token_ids", [61]), ("stop_token_ids", ["a"]),
    ("logit_bias", {"61": 1}), ("logit_bias", {"x": 1}), ("logit_bias", {"4": 101}), ("logit_bias", [4]),
    ("logit_bias", {str(token): 1 for token in range(1025)}), ("logit_bias", {"4": float("inf")}),
    ("logprobs", 21), ("logprobs", -1), ("logprobs", True), ("min_tokens", 3), ("min_tokens", -1),
    ("stream", "yes"), ("stream_options", {"include_usage": True}), ("stream_options", 3), ("user", 4),
    ("priority", 2**31), ("priority", "high"), ("timeout", 0), ("timeout", -1), ("timeout", float("inf")),
    ("suffix", "!"), ("tools", [{}]), ("response_format", {"type": "json_object"}), ("functions", [{}]),
    ("prompt_logprobs", 1), ("use_beam_search", True), ("length_penalty", 2), ("guided_json", {}),
    ("echo", "x"), ("ignore_eos", 1), ("model", 4), ("bad_words", ["a"]), ("modalities", ["audio"]),
]  # fmt: skip

NO_EFFECT: list[tuple[str, Any]] = [
    ("model", None), ("max_tokens", None), ("temperature", None), ("n", None), ("stop", None), ("stop", []),
    ("logit_bias", None), ("logit_bias", {}), ("best_of", 1), ("best_of", None), ("suffix", None), ("suffix", ""),
    ("tools", []), ("tool_choice", "none"), ("response_format", {"type": "text"}), ("metadata", {"a": "b"}),
    ("store", True), ("service_tier", "auto"), ("use_beam_search", False), ("length_penalty", 1.0),
    ("stop", ["QQ" * 512] * 16), ("stop_token_ids", [5] * 2000), ("user", "é" * 256), ("user", "\U0001f600"),
    ("max_tokens", 2.0), ("n", 1.0), ("seed", 7.0), ("top_k", -1.0),
    ("functions", None), ("stream", False), ("stream_options", None), ("logprobs", None), ("echo", False),
    ("parallel_tool_calls", True), ("made_up", 5), ("user", ""), ("seed", -(2**63)), ("presence_penalty", 0),
]  # fmt: skip


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions"])
def test_every_bad_field_is_named(path: str) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}

    async def scenario(world: World) -> None:
        for field, value in BAD_FIELDS:
            if path != PATH and field in ("prompt", "best_of", "echo", "logprobs"):
                continue
            body = {**(PLAIN if path == PATH else chat), field: value}
            response = await world.client.post(
                path, content=json.dumps(body), headers={"Content-Type": "application/json"}
            )
            assert response.status_code == 400, (field, value, response.text)
            error = response.json()["error"]
            assert error["param"] == field and field in error["message"], (field, value, error)
            assert error["type"] == "invalid_request_error" and len(error["message"]) < 300
        assert not world.engine.opened

    run(scenario)


@pytest.mark.parametrize(("field", "value"), NO_EFFECT)
def test_what_changes_nothing_is_accepted(field: str, value: Any) -> None:
    async def scenario(world: World) -> None:
        await world.post(PATH, {**PLAIN, field: value})

    run(scenario)


def test_false_is_no_number() -> None:
    """Python would say that False == 0 and True == 1."""
    with pytest.raises(ApiError, match="length_penalty"):
        CompletionRequest(prompt="a", length_penalty=True).check()  # type: ignore[call-arg]


def test_stop_tokens_are_few_and_different() -> None:
    body = CompletionRequest(prompt="a", stop_token_ids=[5, 7, 5] * 1000)
    assert body.params(61, logprobs=None).stop_token_ids == (5, 7)
    CompletionRequest(prompt="a", stop_token_ids=list(range(1024))).params(2000, logprobs=None)
    with pytest.raises(ApiError, match=r"^stop_token_ids: must hold at most 1024 tokens, got 1025"):
        CompletionRequest(prompt="a", stop_token_ids=list(range(1025))).params(2000, logprobs=None)


def test_combinations_that_are_refused() -> None:
    async def scenario(world: World) -> None:
        error = await world.refuse(PATH, {**PLAIN, "echo": True, "logprobs": 1})
        assert (error["param"], error["code"]) == ("logprobs", "unsupported_parameter")
        error = await world.refuse(
            "/v1/chat/completions", {"messages": [], "max_tokens": 1, "max_completion_tokens": 2}
        )
        assert error["param"] == "max_tokens"
        error = await world.refuse(PATH, {**PLAIN, "prompt": "a" * 256})
        assert error["code"] == "context_length_exceeded" and "256 tokens" in error["message"]

    run(scenario)


def test_paths_methods_and_models() -> None:
    async def scenario(world: World) -> None:
        assert (await world.get("/v1/nothing", status=404))["error"]["code"] == "not_found"
        assert (await world.get(PATH, status=405))["error"]["code"] == "method_not_allowed"
        assert world.headers["allow"] == "POST"
        error = await world.refuse(PATH, {**PLAIN, "model": "gpt-5"}, status=404)
        assert (error["code"], error["param"]) == ("model_not_found", "model") and "'toy'" in error["message"]

    run(scenario)


def test_bodies_that_are_none() -> None:
    async def scenario(world: World) -> None:
        for body in (b"{", b"", b"[1]", b'"a"', b"\xff{}", b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"):
            error = await world.refuse(PATH, None, content=body, headers=AS_JSON)
            assert error["type"] == "invalid_request_error" and error["code"] == "invalid_json", body[:20]
            assert error["message"].startswith("the body ") and "parsing" not in error["message"]
        for kind in ("text/plain", "application/x-www-form-urlencoded", None):
            headers = {"Content-Type": kind} if kind is not None else {}
            error = await world.refuse(PATH, None, status=415, content=b'{"prompt": "a"}', headers=headers)
            assert "application/json" in error["message"]

    run(scenario)


def test_large_bodies_are_refused_while_they_are_read() -> None:
    sent: list[int] = []

    async def pieces() -> Any:
        for piece in range(1000):
            sent.append(piece)
            yield b"x" * 2**20

    async def scenario(world: World) -> None:
        error = await world.refuse(PATH, None, status=413, content=b"x" * 2000, headers=AS_JSON)
        assert error["code"] == "body_too_large" and "1024" in error["message"]
        assert world.headers["connection"] == "close"
        await world.refuse(PATH, None, status=413, content=pieces(), headers=AS_JSON)
        assert len(sent) == 1 + 65  # the rest of a longer body is not read
        await world.post(PATH, PLAIN)

    run(scenario, max_body_size="1K")


@pytest.mark.parametrize("expect", [False, True])
def test_a_client_that_reads_only_when_all_is_sent_hears_that_it_is_too_much(expect: bool) -> None:
    """An answer on a connection that is closed with unread bytes is lost. Who waits to be told has sent none."""
    sent: list[int] = []

    async def pieces() -> Any:
        for piece in range(20):
            sent.append(piece)
            yield b"x" * 100

    async def scenario(world: World) -> None:
        headers = {**AS_JSON, "Content-Length": "2000", **({"Expect": "100-continue"} if expect else {})}
        await world.refuse(PATH, None, status=413, content=pieces(), headers=headers)
        assert len(sent) == (0 if expect else 20)

    run(scenario, max_body_size="1K")


@pytest.mark.parametrize(("announced", "status"), [("100", 408), ("2000", 413)])
def test_a_body_that_does_not_come_is_not_waited_for(
    announced: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("_PATIENCE", "_DRAIN_SECONDS"):
        monkeypatch.setattr(gate, limit, 0.01)

    async def pieces() -> Any:
        yield b"{"
        await asyncio.Event().wait()

    async def scenario(world: World) -> None:
        headers = {**AS_JSON, "Content-Length": announced}
        error = await world.refuse(PATH, None, status=status, content=pieces(), headers=headers)
        assert error["code"] == {408: "body_timeout", 413: "body_too_large"}[status]
        assert world.headers["connection"] == "close"

    run(scenario, max_body_size="1K")


def test_what_was_sent_is_not_repeated_at_length() -> None:
    async def scenario(world: World) -> None:
        number = 10**4000
        for field, value in (
            ("prompt", [number]), ("seed", number), ("priority", number), ("n", number), ("model", "x" * 9000),
            ("stop_token_ids", [number]),
        ):  # fmt: skip
            status = 404 if field == "model" else 400
            error = await world.refuse(PATH, {**PLAIN, field: value}, status=status)
            assert error["param"] == field and len(error["message"]) < 600

    run(scenario)
    assert check_extra({f"{field} {'x' * 9000}": 1 for field in range(1000)}) == [
        f"{field} {'x' * 9000}"[:64] for field in range(32)
    ]


def test_what_nobody_expected_is_a_500_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        def fail(*_: Any, **__: Any) -> Any:
            raise KeyError("a secret")

        world.engine.open = fail  # type: ignore[method-assign]
        error = await world.refuse(PATH, PLAIN, status=500, headers={"X-Request-Id": "mine"})
        assert error["type"] == "server_error" and "secret" not in error["message"]
        assert world.headers["x-request-id"] == "mine"

    run(scenario)
    assert "request mine failed" in caplog.text and "a secret" in caplog.text


def test_a_job_that_the_engine_refuses() -> None:
    async def scenario(world: World) -> None:
        async def refuse_it() -> None:
            await world.engine.until(lambda engine: engine.open_jobs)
            world.engine.opened[-1].refuse(InvalidRequest("prompt", "never fits in the KV cache"))

        for stream in (False, True):
            refusing = asyncio.create_task(refuse_it())
            error = await world.refuse(PATH, {**PLAIN, "stream": stream})
            assert (error["param"], error["message"]) == ("prompt", "prompt: never fits in the KV cache")
            await refusing

    run(scenario, held=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("port", -1), ("port", 65536), ("max_queue", -1), ("shutdown_timeout", -1), ("shutdown_timeout", float("nan")),
        ("api_key", ("",)), ("api_key", ("a b",)), ("max_body_size", "4X"), ("max_body_size", 0), ("log_format", "xml"),
        ("served_model_name", ("",)), ("seed", -1), ("heartbeat_timeout", 1.9), ("heartbeat_timeout", float("inf")),
    ],
)  # fmt: skip
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        ServerSettings(model="toy", **{option: value})
    assert error.value.field == option
