"""Log probabilities in OpenAI's two shapes: the old one of completions, and that of chats."""

from __future__ import annotations

from typing import Any

from ..tokenizer import IncrementalDetokenizer, Tokenizer
from ..types import TokenLogprobs
from .engine_api import OpenJob

_LEAST = -9999.0  # OpenAI's; JSON has no infinity


def token_name(tokenizer: Tokenizer | None, token: int) -> tuple[str, bytes]:
    """A token's text, or `bytes:\\xe2\\x80` where it is no whole characters; and its bytes."""
    if tokenizer is None:
        name = f"token_id:{token}"
        return name, name.encode()
    raw = tokenizer.piece(token)
    try:
        return raw.decode(), raw
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


class CompletionLogprobs:
    """Of one answer, told in order. `text_offset` counts characters of the answer's text from where it began."""

    def __init__(self, tokenizer: Tokenizer | None, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._text = None
        if tokenizer is not None:
            self._text = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._offset = 0

    def tell(self, job: OpenJob, start: int) -> dict[str, Any]:
        """Of the job's tokens from `start` on."""
        entries = job.logprobs[start : len(job.output)]
        return {
            "tokens": [token_name(self._tokenizer, entry.token)[0] for entry in entries],
            "token_logprobs": [max(entry.logprob, _LEAST) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": [self._advance(entry.token) for entry in entries],
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """With the chosen token, which may be none of the likeliest: so many entries and one more."""
        top = {token_name(self._tokenizer, token)[0]: max(logprob, _LEAST) for token, logprob in entry.top}
        return top | {token_name(self._tokenizer, entry.token)[0]: max(entry.logprob, _LEAST)}

    def _advance(self, token: int) -> int:
        before = self._offset
        if self._text is not None:
            self._offset += len(self._text.append([token]))
        return before


class ChatLogprobs:
    """Of one answer, told in order."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def tell(self, job: OpenJob, start: int) -> dict[str, Any]:
        """Of the job's tokens from `start` on."""
        content = [
            {
                **self._entry(entry.token, entry.logprob),
                "top_logprobs": [self._entry(token, logprob) for token, logprob in entry.top],
            }
            for entry in job.logprobs[start : len(job.output)]
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        name, raw = token_name(self._tokenizer, token)
        return {"token": name, "logprob": max(logprob, _LEAST), "bytes": list(raw)}
