"""Answers as JSON: whole, and piece by piece as server-sent events whose fixed parts are encoded once a request."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from ..tokenizer import Tokenizer
from .engine_api import OpenJob
from .logprobs import ChatLogprobs, CompletionLogprobs

DONE = b"data: [DONE]\n\n"
encode = msgspec.json.Encoder().encode


def event(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + encode(payload) + b"\n\n"


class Shape(Protocol):
    """What one endpoint's answers look like. `index` counts answers, over all prompts of the request."""

    def opening(self, index: int, usage: Mapping[str, Any] | None) -> bytes:
        """Events before anything of an answer; maybe none."""

    def grown(self, index: int, text: str, usage: Mapping[str, Any] | None) -> bytes:
        """An event that only brings text. Called for every token."""

    def chunk(self, index: int, job: OpenJob, text: str, start: int, usage: Mapping[str, Any] | None) -> bytes:
        """An event with all else: logprobs of the tokens from `start` on, and why the answer ended."""

    def closing(self, usage: Mapping[str, Any]) -> bytes:
        """The event after all answers that says what they took."""

    def whole(self, jobs: Sequence[OpenJob], usage: Mapping[str, Any]) -> dict[str, Any]:
        """The answer in one piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """What both endpoints' shapes go by."""

    id: str
    model: str
    tokenizer: Tokenizer | None
    logprobs: bool
    skip_special_tokens: bool
    usage: bool  # whether chunks have the field


class _Events:
    """Events of one object: `choices` hold one choice, or none in the last."""

    def __init__(self, style: Style, kind: str) -> None:
        self._style = style
        self._base = {"id": style.id, "object": kind, "created": int(time.time()), "model": style.model}
        self._heads: dict[int, bytes] = {}
        self._tail = b""

    def _prepare(self, choice: Mapping[str, Any], mark: str) -> bytes:
        """The event's bytes before the text, whose place `mark` holds; those after it are the same for all choices."""
        fields: dict[str, Any] = {**self._base, "choices": [choice]}
        if self._style.usage:
            fields["usage"] = None
        head, _, self._tail = event(fields).partition(encode(mark))
        return head

    def _event(self, choices: list[dict[str, Any]], usage: Mapping[str, Any] | None) -> bytes:
        fields: dict[str, Any] = {**self._base, "choices": choices}
        if self._style.usage:
            fields["usage"] = usage
        return event(fields)

    def closing(self, usage: Mapping[str, Any]) -> bytes:
        return self._event([], usage)


_MARK = "\x00"  # no field of ours holds it


class CompletionShape(_Events):
    """/v1/completions. `echo`: the texts of the prompts, to come first."""

    def __init__(self, style: Style, *, echo: Sequence[str] | None, n: int) -> None:
        super().__init__(style, "text_completion")
        self._echo = echo
        self._n = n
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def opening(self, index: int, usage: Mapping[str, Any] | None) -> bytes:
        echoed = self._echoed(index)
        return self.grown(index, echoed, usage) if echoed else b""

    def grown(self, index: int, text: str, usage: Mapping[str, Any] | None) -> bytes:
        if usage is not None:
            return self._event([self._choice(index, text)], usage)
        head = self._heads.get(index)
        if head is None:
            head = self._heads[index] = self._prepare(self._choice(index, _MARK), _MARK)
        return head + encode(text) + self._tail

    def chunk(self, index: int, job: OpenJob, text: str, start: int, usage: Mapping[str, Any] | None) -> bytes:
        logprobs = self._tell(index, job, start)
        return self._event([self._choice(index, text, logprobs, job.finish_reason, job.stop_reason)], usage)

    def whole(self, jobs: Sequence[OpenJob], usage: Mapping[str, Any]) -> dict[str, Any]:
        choices = [
            self._choice(
                index, self._echoed(index) + job.text, self._tell(index, job, 0), job.finish_reason, job.stop_reason
            )
            for index, job in enumerate(jobs)
        ]
        return {**self._base, "choices": choices, "usage": usage}

    def _tell(self, index: int, job: OpenJob, start: int) -> dict[str, Any] | None:
        if not self._style.logprobs:
            return None
        if index not in self._logprobs:
            self._logprobs[index] = CompletionLogprobs(self._style.tokenizer, self._style.skip_special_tokens)
        return self._logprobs[index].tell(job, start)

    def _echoed(self, index: int) -> str:
        return self._echo[index // self._n] if self._echo is not None else ""

    @staticmethod
    def _choice(
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        stop_reason: str | int | None = None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }


class ChatShape(_Events):
    """/v1/chat/completions."""

    def __init__(self, style: Style) -> None:
        super().__init__(style, "chat.completion.chunk")
        self._logprobs = ChatLogprobs(style.tokenizer)

    def opening(self, index: int, usage: Mapping[str, Any] | None) -> bytes:
        return self._event([self._choice(index, {"role": "assistant", "content": ""})], usage)

    def grown(self, index: int, text: str, usage: Mapping[str, Any] | None) -> bytes:
        if usage is not None:
            return self._event([self._choice(index, {"content": text})], usage)
        head = self._heads.get(index)
        if head is None:
            head = self._heads[index] = self._prepare(self._choice(index, {"content": _MARK}), _MARK)
        return head + encode(text) + self._tail

    def chunk(self, index: int, job: OpenJob, text: str, start: int, usage: Mapping[str, Any] | None) -> bytes:
        choice = self._choice(index, {"content": text} if text else {})
        choice["logprobs"] = self._tell(job, start)
        choice["finish_reason"] = job.finish_reason
        if job.finish_reason is not None:
            choice["stop_reason"] = job.stop_reason
        return self._event([choice], usage)

    def whole(self, jobs: Sequence[OpenJob], usage: Mapping[str, Any]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": job.text, "refusal": None},
                "logprobs": self._tell(job, 0),
                "finish_reason": job.finish_reason,
                "stop_reason": job.stop_reason,
            }
            for index, job in enumerate(jobs)
        ]
        return {**self._base, "object": "chat.completion", "choices": choices, "usage": usage}

    def _tell(self, job: OpenJob, start: int) -> dict[str, Any] | None:
        return self._logprobs.tell(job, start) if self._style.logprobs else None

    @staticmethod
    def _choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
