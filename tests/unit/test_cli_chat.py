"""`fastserve chat`."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import toy_llm
from cli_shell import Shell, enter
from toy_llm import ToyWorld

from fastserve import LLM


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    return enter(monkeypatch)


@pytest.fixture
def shell(world: ToyWorld, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def test_chat_remembers_and_resets(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, str]]] = []
    stream_chat = LLM.stream_chat

    def spy(self: LLM, messages: Any, params: Any) -> Any:
        asked.append(list(messages))
        return stream_chat(self, messages, params)

    monkeypatch.setattr(LLM, "stream_chat", spy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nyo\n/help\n/reset\nhi\n/exit\nnever\n"))
    answers = shell("chat", "--system", "be", "--max-tokens", "4", "--ignore-eos").splitlines()
    assert [[message["role"] for message in messages] for messages in asked] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert asked[1][2]["content"] == answers[0] and len(answers) == 3
    assert "/reset" in shell.errors


def test_ctrl_c_stops_an_answer_and_not_the_conversation(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    stream_chat = LLM.stream_chat

    def interrupted(self: LLM, messages: Any, params: Any) -> Any:
        stream = stream_chat(self, messages, params)
        if len(messages) > 1:
            yield from stream
            return
        try:
            yield next(stream)
            yield next(stream)
            raise KeyboardInterrupt
        finally:
            stream.close()
            closed.append(not self._live)

    monkeypatch.setattr(LLM, "stream_chat", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nyo\n"))
    answers = shell("chat", "--max-tokens", "8", "--ignore-eos").splitlines()
    assert closed == [True]
    assert len(answers[0]) <= 2 < len(answers[1])
    assert "stopped" in shell.errors and "8 tokens" in shell.errors


def test_a_conversation_that_grew_too_long_is_not_the_end(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a" * 300 + "\nhi\n"))
    assert len(shell("chat", "--max-tokens", "4", "--ignore-eos").splitlines()) == 1
    assert "/reset starts over" in shell.errors


def test_chat_needs_a_template(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_llm, "TEMPLATE", None)
    shell("chat", code=2)
    assert shell.errors == "fastserve: --model: smollm2 has no chat template; use: fastserve generate --model smollm2\n"
