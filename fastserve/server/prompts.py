"""Prompts of requests as token ids: texts, token ids, lists of either, and conversations."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..tokenizer import Tokenizer
from .errors import ApiError, refused, unsupported

_KINDS = "must be text, a list of texts, a list of token ids, or a list of lists of token ids"
# Characters that are tokenized between two tokens of other streams, in about a millisecond; more are in a thread.
_SHORT = 4096
_EACH = 64  # of them that a text or a message is worth beside its own
# Of several texts, what the thread takes at a time: for a request that has ended, it does no more.
_BATCH = 65536
# Of a text, what is tokenized first to see whether it can be short enough at all.
_BEGINNING = 65536
_ROLES = ("system", "developer", "user", "assistant")
_NO_TOOLS = ("tool_calls", "function_call", "tool_call_id", "audio")


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """What the engine takes."""

    max_model_len: int  # tokens of prompt and output
    vocab_size: int

    def check(self, field: str, tokens: Sequence[int]) -> None:
        """Raises ApiError, naming the field, for a prompt that is empty, too long or not of this vocabulary."""
        if not tokens:
            raise refused(field, "must hold at least one token")
        if len(tokens) >= self.max_model_len:
            raise self.too_long(field, str(len(tokens)))
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < self.vocab_size)
            raise refused(field, f"token ids are 0 to {self.vocab_size - 1} for this model, got {wrong}")

    def too_long(self, field: str, count: str) -> ApiError:
        return ApiError(
            400,
            f"{field}: has {count} tokens; with room for one of output, the context of "
            f"{self.max_model_len} tokens allows {self.max_model_len - 1}",
            param=field,
            code="context_length_exceeded",
        )


def as_prompts(prompt: Any, limit: int) -> list[str | list[int]]:
    """Each prompt that a completion's `prompt` is. Raises ApiError for what is none, and for more than `limit`."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise refused("prompt", _KINDS)
    if not prompt:
        raise refused("prompt", "must not be an empty list")
    if _is_ids(prompt):
        return [prompt]
    if len(prompt) > limit:
        raise refused("prompt", f"holds {len(prompt)} prompts, and this server never has room for more than {limit}")
    if all(isinstance(each, str) for each in prompt) or all(_is_ids(each) for each in prompt):
        return list(prompt)
    raise refused("prompt", _KINDS)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)  # bool is an int to isinstance


async def encode(
    tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool, limits: PromptLimits | None = None
) -> list[list[int]]:
    """The tokens of each text. With `limits`, one that is far too long is refused without being read to its end.

    Raises InvalidRequest (`prompt`) for text that is not valid Unicode, and ApiError.
    """

    def tokens(batch: Sequence[str]) -> list[list[int]]:
        return [_encode(tokenizer, text, add_special_tokens, limits) for text in batch]

    if sum(len(text) + _EACH for text in texts) <= _SHORT + _EACH:
        return tokens(texts)
    encoded: list[list[int]] = []
    for batch in _batches(texts):
        encoded += await asyncio.to_thread(tokens, batch)
    return encoded


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch, length = list[str](), 0
    for text in texts:
        if batch and length + len(text) > _BATCH:
            yield batch
            batch, length = [], 0
        batch.append(text)
        length += len(text) + _EACH
    yield batch


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool, limits: PromptLimits | None) -> list[int]:
    if limits is not None:
        _refuse_far_too_long(tokenizer, text, limits)
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _refuse_far_too_long(tokenizer: Tokenizer, text: str, limits: PromptLimits) -> None:
    """Raises ApiError for a text whose beginning has twice the tokens that the whole of it may have.

    Twice, as words that are cut may have more tokens, and what merges over the cut is no more than a word.
    """
    length = max(_BEGINNING, limits.max_model_len)
    while length < len(text):
        count = len(tokenizer.encode(text[:length], add_special_tokens=False))
        if count >= 2 * limits.max_model_len:
            raise limits.too_long("prompt", f"more than {count // 2}")
        length *= 4


async def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    add_special_tokens: bool = False,
    limits: PromptLimits | None = None,
) -> list[int]:
    """The conversation as the model's template writes it. Raises ApiError and InvalidRequest (`messages`)."""
    plain = [_plain(index, message) for index, message in enumerate(messages)]

    length = sum(len(message["content"]) + _EACH for message in plain)

    def tokens() -> list[int]:
        if limits is not None and length > _BEGINNING:
            _refuse_far_too_long(tokenizer, tokenizer.apply_chat_template(plain, add_generation_prompt), limits)
        return tokenizer.encode_chat(plain, add_generation_prompt, add_special_tokens)

    return tokens() if length <= _SHORT + _EACH else await asyncio.to_thread(tokens)


def _plain(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates know it: a role and a text."""
    place = f"messages[{index}]"
    for field in _NO_TOOLS:
        if message.get(field):
            raise _unsupported(f"{place}.{field}")
    role = message.get("role")
    if role in ("tool", "function"):
        raise _unsupported(f"{place}.role", f"{role!r} is not supported, as tools are not")
    if role not in _ROLES:
        raise _refused(f"{place}.role", f"must be one of {', '.join(_ROLES)}, got {role!r}")
    plain = {
        "role": "system" if role == "developer" else role,  # what OpenAI calls the former one
        "content": _text(f"{place}.content", message.get("content"), required=role != "assistant"),
    }
    name = message.get("name")
    if name is not None:
        if not isinstance(name, str):
            raise _refused(f"{place}.name", "must be text")
        plain["name"] = name
    return plain


def _text(place: str, content: Any, *, required: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and not required:
        return ""
    if not isinstance(content, list):
        raise _refused(place, "must be text or a list of parts with type text")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("image_url", "input_audio", "file", "video_url"):
            raise _unsupported(f"{place}[{index}].type", f"{kind!r} is not supported; send text")
        text = part.get("text") if isinstance(part, Mapping) and kind == "text" else None
        if not isinstance(text, str):
            raise _refused(f"{place}[{index}]", 'must be {"type": "text", "text": …}')
        texts.append(text)
    return "\n".join(texts)


def _refused(place: str, message: str) -> ApiError:
    error = refused(place, message)
    error.param = "messages"
    return error


def _unsupported(place: str, message: str = "is not supported; leave it out") -> ApiError:
    error = unsupported(place, message)
    error.param = "messages"
    return error
