"""POST /v1/chat/completions, /tokenize and /detokenize."""

from __future__ import annotations

import json
from typing import Any

import pytest
from http_world import World, answer, ids, run, text_of
from toy import EOS

from fastserve.seeds import derived_seed

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
PROMPT = ids("sbeZuhiZa")  # as the toy's template writes it
PLAIN: dict[str, Any] = {
    "model": "toy", "messages": MESSAGES, "max_completion_tokens": 10, "seed": 3, "ignore_eos": True
}  # fmt: skip
TOKENS = answer(PROMPT, 3, max_tokens=10, ignore_eos=True)


def test_an_answer_in_one_piece() -> None:
    async def scenario(world: World) -> None:
        body = await world.post(PATH, PLAIN)
        assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
        (choice,) = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": text_of(TOKENS), "refusal": None}
        assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
        assert body["usage"]["prompt_tokens"] == len(PROMPT) and body["usage"]["completion_tokens"] == 10

    run(scenario)


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_says_the_same(n: int) -> None:
    async def scenario(world: World) -> None:
        events = await world.events(PATH, {**PLAIN, "n": n, "stream_options": {"include_usage": True}})
        *chunks, last = events
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 10 * n
        for index in range(n):
            own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert own[0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(choice["delta"].get("content", "") for choice in own)
            assert text == text_of(answer(PROMPT, derived_seed(3, index), max_tokens=10, ignore_eos=True))
            assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]
        assert {chunk["object"] for chunk in events} == {"chat.completion.chunk"}

    run(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(stream: bool) -> None:
    async def scenario(world: World) -> None:
        asked = {**PLAIN, "logprobs": True, "top_logprobs": 2}
        answers = await world.events(PATH, asked) if stream else [await world.post(PATH, asked)]
        told = [each["choices"][0]["logprobs"] for each in answers]
        content = [entry for logprobs in told if logprobs is not None for entry in logprobs["content"]]
        assert len(content) == len(TOKENS)
        for token, entry in zip(TOKENS, content, strict=True):
            name = text_of([token]) or "</s>"
            assert (entry["token"], entry["logprob"], entry["bytes"]) == (name, -0.5, list(name.encode()))
            assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5]

    run(scenario)


def test_an_answer_ends_at_the_context_unless_told() -> None:
    async def scenario(world: World) -> None:
        await world.post(PATH, {"messages": MESSAGES})
        assert world.engine.opened[-1].params.max_tokens is None
        await world.post(PATH, {"messages": MESSAGES, "max_tokens": 4})
        assert world.engine.opened[-1].params.max_tokens == 4

    run(scenario)


def test_contents_of_every_kind() -> None:
    parts = [{"type": "text", "text": "hi"}]
    conversations: list[tuple[list[dict[str, Any]], str]] = [
        ([{"role": "user", "content": parts}], "uhiZa"),
        ([{"role": "developer", "content": "be", "name": "x"}, {"role": "user", "content": "hi"}], "sbeZuhiZa"),
        ([{"role": "assistant", "content": None, "tool_calls": None}, {"role": "user", "content": "b"}], "aZubZa"),
    ]

    async def scenario(world: World) -> None:
        for messages, prompt in conversations:
            await world.post(PATH, {"messages": messages, "max_tokens": 1})
            assert world.engine.opened[-1].prompt == ids(prompt)

    run(scenario)


def test_control_tokens_in_messages_are_text() -> None:
    said = "a</s>b"  # the toy has no tokens for < / and >

    async def scenario(world: World) -> None:
        for content in (said, [{"type": "text", "text": said}], said + "x" * 5000):
            messages = [{"role": "user", "content": content}]
            assert EOS not in (await world.post("/tokenize", {"messages": messages}))["tokens"]
        await world.post(PATH, {"messages": [{"role": "user", "content": said}], "max_tokens": 1})
        assert world.engine.opened[-1].prompt == ids("uasbZa")
        await world.post("/v1/completions", {"prompt": said, "max_tokens": 1})  # here they are the caller's own
        assert world.engine.opened[-1].prompt == [*ids("a"), EOS, *ids("b")]
        broken = [{"role": "user", "content": "\ud800"}]
        response = await world.client.post(
            PATH, content=json.dumps({"messages": broken}), headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 400 and response.json()["error"]["param"] == "messages"

    run(scenario)


def test_conversations_that_are_refused() -> None:
    refused: list[tuple[Any, str]] = [
        ([], "messages: must hold at least one message"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "tool", "content": "x"}], "tools are not"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": 4}], "messages[0].content"),
        ([{"role": "user", "content": "x", "name": {}}], "messages[0].name"),
        ("hi", "messages"),
        ([4], "messages"),
    ]

    async def scenario(world: World) -> None:
        for messages, words in refused:
            error = await world.refuse(PATH, {"messages": messages})
            assert words in error["message"] and error["param"] == "messages"
        error = await world.refuse(PATH, {"messages": MESSAGES, "top_logprobs": 3})
        assert error["param"] == "top_logprobs"
        assert (await world.refuse(PATH, {}))["param"] == "messages"

    run(scenario)


def test_tokenize_and_back() -> None:
    async def scenario(world: World) -> None:
        body = await world.post("/tokenize", {"prompt": "abc", "return_token_strs": True})
        assert body == {"count": 3, "max_model_len": 256, "tokens": ids("abc"), "token_strs": ["a", "b", "c"]}
        assert (await world.post("/tokenize", {"messages": MESSAGES}))["tokens"] == PROMPT
        assert await world.post("/detokenize", {"tokens": ids("abc")}) == {"prompt": "abc"}
        for body, field in (
            ({}, "prompt"),
            ({"prompt": "a", "messages": MESSAGES}, "prompt"),
            ({"prompt": 4}, "prompt"),
        ):
            assert (await world.refuse("/tokenize", body))["param"] == field
        for tokens in ([61], [-1], [10**30], ["a"], [True], None):
            assert (await world.refuse("/detokenize", {"tokens": tokens}))["param"] == "tokens"

    run(scenario)
