"""Large prompts: tokenized beside the loop, in pieces, and no further than it takes to refuse them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from http_world import World, run

from fastserve.server.calls import Call

PATH = "/v1/completions"
PLAIN: dict[str, Any] = {"max_tokens": 2, "ignore_eos": True}


class Spy:
    """Sees what the tokenizer is given, and on which thread."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        self.threads: set[int] = set()
        self._encode = world.engine.tokenizer.encode
        monkeypatch.setattr(world.engine.tokenizer, "encode", self)

    def __call__(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.texts.append(text)
        self.threads.add(threading.get_ident())
        return self._encode(text, add_special_tokens)


def test_a_batch_of_short_prompts_is_tokenized_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        spy, loop = Spy(world, monkeypatch), threading.get_ident()
        await world.post(PATH, {**PLAIN, "prompt": "a" * 200})
        assert spy.threads == {loop}  # one that is short waits for no thread
        spy.threads.clear()
        prompts = [letter * 200 for letter in "abcdefghijklmnopqrstuvwxyz"]
        await world.post(PATH, {**PLAIN, "prompt": prompts})
        assert spy.texts[1:] == prompts and loop not in spy.threads
        assert [len(job.prompt) for job in world.engine.opened] == [200] * 27

    run(scenario, max_num_seqs=32)


def test_a_request_whose_time_is_over_is_tokenized_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastserve.server.prompts._BATCH", 600)

    async def scenario(world: World) -> None:
        spy, over, told = Spy(world, monkeypatch), asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def encode(text: str, add_special_tokens: bool = True) -> list[int]:
            loop.call_soon_threadsafe(over.set)
            assert told.wait(30)
            return spy(text, add_special_tokens)

        async def keep_deadline(call: Call, deadline: float) -> None:
            await over.wait()
            call.interrupt(call._too_late("is over"))

        monkeypatch.setattr(world.engine.tokenizer, "encode", encode)
        monkeypatch.setattr(Call, "_keep_deadline", keep_deadline)
        try:
            await world.refuse(PATH, {**PLAIN, "prompt": ["a" * 200] * 30, "timeout": 500}, status=504)
        finally:
            told.set()
        await loop.shutdown_default_executor()  # what the thread had to do is done
        assert len(spy.texts) == 2 and not world.engine.opened

    run(scenario, max_num_seqs=32)


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_that_is_far_too_long_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch, chat: bool) -> None:
    async def scenario(world: World) -> None:
        spy, text = Spy(world, monkeypatch), "a" * 1_000_000
        if chat:
            asked = {**PLAIN, "messages": [{"role": "user", "content": text}]}
            error = await world.refuse("/v1/chat/completions", asked)
        else:
            error = await world.refuse(PATH, {**PLAIN, "prompt": text})
        assert error["code"] == "context_length_exceeded" and error["message"].startswith("prompt: has more than ")
        assert [len(each) for each in spy.texts] == [65536]

    run(scenario)


def test_a_long_text_of_few_tokens_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        text = "b" * 1_000_000 + "a"
        monkeypatch.setattr(world.engine.tokenizer, "encode", lambda text, **_: [4] * (1 + text.count("a")))
        await world.post(PATH, {**PLAIN, "prompt": text})
        assert world.engine.opened[-1].prompt == [4, 4]

    run(scenario)
