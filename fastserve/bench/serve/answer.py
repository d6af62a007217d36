"""What the events of a streamed completion or chat completion say."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from .http import ProtocolError
from .record import JobRecord

DONE: Final = b"[DONE]"
_DETAIL: Final = 300  # characters of a server's message


class ErrorEvent(Exception):
    """The server says, in the middle of an answer, that it failed."""


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None

    def says(self) -> bool:
        return bool(self.content or self.reasoning_content or self.reasoning or self.tool_calls)


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None
    object: str | None = None
    message: str | None = None


_decode: Final = msgspec.json.Decoder(Chunk).decode


def note(record: JobRecord, event: bytes, now: float) -> None:
    """Write one event into the record. Raises ProtocolError for one that is none of ours, and ErrorEvent."""
    try:
        chunk = _decode(event)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"an event that is no chunk of an answer: {event[:60]!r} ({error})") from None
    if chunk.error is not None or chunk.object == "error":
        raise ErrorEvent(message_of(event))
    for choice in chunk.choices:
        if _has_token(choice):
            record.times.append(now)
            if record.said is not None:
                record.said.append(_text(choice))
        record.finish_reason = choice.finish_reason or record.finish_reason
    usage = chunk.usage
    if usage is not None:
        record.prompt_tokens = usage.prompt_tokens or record.prompt_tokens
        if usage.completion_tokens is not None:
            record.usage_tokens = usage.completion_tokens
        if usage.prompt_tokens_details is not None:
            record.cached_tokens = usage.prompt_tokens_details.cached_tokens


def _has_token(choice: Choice) -> bool:
    """A token may have no text: the bytes of half a character, a special one. Then its piece still comes when it does.

    What opens a chat (a role), and what closes an answer (only a reason), is no token.
    """
    if choice.delta is None:
        return bool(choice.text) or (choice.text is not None and choice.finish_reason is None)
    return choice.delta.says() or (
        choice.delta.content is not None and choice.delta.role is None and choice.finish_reason is None
    )


def _text(choice: Choice) -> str:
    return (choice.text if choice.delta is None else choice.delta.content) or ""


def message_of(body: bytes) -> str:
    """What a server says went wrong, in a line: OpenAI's error.message where there is one."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = body.decode("utf-8", "replace")
    for key in ("error", "detail", "message"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return " ".join(str(value).split())[:_DETAIL]
