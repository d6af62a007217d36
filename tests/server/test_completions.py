"""POST /v1/completions: every field that is supported, in one piece and as a stream."""

from __future__ import annotations

from typing import Any

import pytest
from http_world import World, answer, ids, run, text_of

from fastserve.seeds import derived_seed

PATH = "/v1/completions"
PLAIN: dict[str, Any] = {"model": "toy", "prompt": "abc", "max_tokens": 12, "seed": 7, "ignore_eos": True}
TOKENS = answer(ids("abc"), 7, max_tokens=12, ignore_eos=True)


def test_an_answer_in_one_piece() -> None:
    async def scenario(world: World) -> None:
        body = await world.post(PATH, PLAIN)
        assert body["object"] == "text_completion" and body["model"] == "toy" and body["id"].startswith("cmpl-")
        assert body["choices"] == [
            {"index": 0, "text": text_of(TOKENS), "logprobs": None, "finish_reason": "length", "stop_reason": None}
        ]
        assert body["usage"] == {
            "prompt_tokens": 3,
            "completion_tokens": 12,
            "total_tokens": 15,
            "prompt_tokens_details": {"cached_tokens": 0},
            "fastserve": {"queue": 2.5, "prefill": 1.5, "decode": 6.0, "swap": 0.75, "preemptions": 3},
        }

    run(scenario)


def test_a_stream_says_the_same() -> None:
    async def scenario(world: World) -> None:
        events = await world.events(PATH, {**PLAIN, "stream_options": {"include_usage": True}})
        *chunks, last = events
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text_of(TOKENS)
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert all(chunk["usage"] is None and chunk["object"] == "text_completion" for chunk in chunks)
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12
        assert last["usage"]["fastserve"]["preemptions"] == 3
        assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1

    run(scenario)


def test_a_stream_without_usage_does_not_mention_it() -> None:
    async def scenario(world: World) -> None:
        assert all("usage" not in event for event in await world.events(PATH, PLAIN))
        counted = {**PLAIN, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        events = await world.events(PATH, counted)
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 12
        events = await world.events(PATH, {**counted, "echo": True})  # an event of its own
        assert events[0]["choices"][0]["text"] == "abc"
        assert all(event["usage"]["prompt_tokens"] == 3 for event in events)
        chat = {**counted, "messages": [{"role": "user", "content": "a"}]}
        events = await world.events("/v1/chat/completions", {name: chat[name] for name in chat if name != "prompt"})
        assert events[0]["choices"][0]["delta"]["role"] == "assistant"
        assert all(event["usage"]["prompt_tokens"] > 0 for event in events)

    run(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_every_kind_and_several_answers(stream: bool) -> None:
    prompts = [[4, 5], [6, 7, 8]]
    texts = ["dce", "gf"]

    async def scenario(world: World) -> None:
        for given, wanted in ((prompts, prompts), (prompts[0], prompts[:1]), (texts, [ids(text) for text in texts])):
            asked = {**PLAIN, "prompt": given, "n": 3, "stream": stream}
            if stream:
                found = [""] * len(wanted) * 3
                for event in await world.events(PATH, asked):
                    found[event["choices"][0]["index"]] += event["choices"][0]["text"]
            else:
                body = await world.post(PATH, asked)
                assert [choice["index"] for choice in body["choices"]] == list(range(len(wanted) * 3))
                found = [choice["text"] for choice in body["choices"]]
                assert body["usage"]["prompt_tokens"] == sum(map(len, wanted))
            expected = [
                text_of(answer(prompt, derived_seed(7, index), max_tokens=12, ignore_eos=True))
                for prompt in wanted
                for index in range(3)
            ]
            assert found == expected

    run(scenario)


def test_echo() -> None:
    async def scenario(world: World) -> None:
        body = await world.post(PATH, {**PLAIN, "echo": True})
        assert body["choices"][0]["text"] == "abc" + text_of(TOKENS)
        events = await world.events(PATH, {**PLAIN, "echo": True, "prompt": ids("abc")})
        assert events[0]["choices"][0]["text"] == "abc"
        assert "".join(event["choices"][0]["text"] for event in events) == "abc" + text_of(TOKENS)

    run(scenario)


def test_nothing_but_echo() -> None:
    async def scenario(world: World) -> None:
        asked = {**PLAIN, "echo": True, "max_tokens": 0, "prompt": ["abc", "de"], "n": 2}
        body = await world.post(PATH, asked)
        wanted = ["abc", "abc", "de", "de"]
        assert body["choices"] == [
            {"index": index, "text": text, "logprobs": None, "finish_reason": "length", "stop_reason": None}
            for index, text in enumerate(wanted)
        ]
        assert [body["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")] == [5, 0, 5]
        *events, last = await world.events(PATH, {**asked, "stream_options": {"include_usage": True}})
        texts, reasons = [""] * 4, [None] * 4
        for event in events:
            choice = event["choices"][0]
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"]
        assert (texts, reasons) == (wanted, ["length"] * 4) and last["usage"]["total_tokens"] == 5
        assert not world.engine.opened
        assert (await world.refuse(PATH, {**asked, "echo": False}))["param"] == "max_tokens"
        assert (await world.refuse(PATH, {**asked, "prompt": "a" * 256}))["code"] == "context_length_exceeded"
        assert (await world.refuse(PATH, {**asked, "prompt": "a" * 256, "n": 129}))["param"] == "n"

    run(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(stream: bool) -> None:
    async def scenario(world: World) -> None:
        asked = {**PLAIN, "logprobs": 2}
        merged: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        answers = await world.events(PATH, asked) if stream else [await world.post(PATH, asked)]
        text = ""
        for each in answers:
            text += each["choices"][0]["text"]
            for name, values in each["choices"][0]["logprobs"].items():
                merged[name] += values
        names = [text_of([token]) or "</s>" for token in TOKENS]
        assert merged["tokens"] == names and merged["token_logprobs"] == [-0.5] * 12
        assert all(len(top) == 2 and top[name] == -0.5 for top, name in zip(merged["top_logprobs"], names, strict=True))
        for name, offset in zip(merged["tokens"], merged["text_offset"], strict=True):
            assert name == "</s>" or text[offset:].startswith(name)

    run(scenario)


def test_stops_end_the_text() -> None:
    text = text_of(TOKENS)
    stop = text[4:6]

    async def scenario(world: World) -> None:
        body = await world.post(PATH, {**PLAIN, "stop": ["QQQ", stop]})
        choice = body["choices"][0]
        assert choice["text"] == text[: text.index(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        events = await world.events(PATH, {**PLAIN, "stop": stop})
        assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
        body = await world.post(PATH, {**PLAIN, "stop_token_ids": [TOKENS[5]]})
        assert body["choices"][0]["stop_reason"] == TOKENS[5]

    run(scenario)


def test_what_the_engine_is_asked_for() -> None:
    async def scenario(world: World) -> None:
        asked = {
            **PLAIN, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1,
            "frequency_penalty": -1, "repetition_penalty": 1.5, "logit_bias": {"4": -3}, "min_tokens": 2,
            "priority": -4, "user": "ann", "seed": -1, "skip_special_tokens": False,
        }  # fmt: skip
        await world.post(PATH, asked)
        job = world.engine.opened[-1]
        params = job.params
        assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
        assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.5)
        assert (params.logit_bias, params.min_tokens, params.ignore_eos) == ({4: -3.0}, 2, True)
        assert (job.priority, job.origin.tenant, job.seed, params.skip_special_tokens) == (-4, "ann", 2**64 - 1, False)
        await world.post(PATH, {"prompt": "abc"})
        assert world.engine.opened[-1].params.max_tokens == 16  # OpenAI's default

    run(scenario)


def test_seeds_are_drawn_from_the_servers() -> None:
    drawn: list[list[int]] = []

    async def scenario(world: World) -> None:
        await world.post(PATH, {"prompt": ["a", "b"]})
        drawn.append([job.seed for job in world.engine.opened])

    run(scenario, seed=5)
    run(scenario, seed=5)
    run(scenario, seed=6)
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2] and len(set(drawn[0])) == 2
