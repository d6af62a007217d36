"""What people write in a conversation stays text, even where it reads like one of the model's control tokens.

A template writes `<|im_start|>user` around a message. Were the same words in the message the same token, whoever writes
messages could end theirs and speak as the system. So control tokens are the template's alone.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from .types import InvalidRequest


class Literals:
    """Takes the words of control tokens out of messages before a template renders them, and spells them out after."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder().items()
        self._control = {token: entry.content for token, entry in added if entry.special}
        words = sorted(filter(None, self._control.values()), key=len, reverse=True)
        self._words = words
        self._pattern = re.compile("|".join(map(re.escape, words)) or r"(?!)")
        # In their place: letters and digits, which templates leave as they are and nobody else can write.
        self._mark = f"w{secrets.token_hex(12)}n"
        self._marked = re.compile(self._mark + r"(\d+)e")

    def hide(self, value: Any) -> Any:
        """A message, or any part of one, with a mark in place of each control token's words."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: f"{self._mark}{self._words.index(found[0])}e", value)
        if isinstance(value, Mapping):
            return {key: self.hide(each) for key, each in value.items()}
        return [self.hide(each) for each in value] if isinstance(value, (list, tuple)) else value

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a rendered text: its control tokens, and between them text in which marks are words again.

        Raises InvalidRequest (`messages`) for text that is not valid Unicode.
        """
        try:
            found = encoding(self._backend, text, add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest("messages", "must be valid Unicode text") from error
        if self._mark not in text:
            return found.ids
        first, last = _without_added(found)
        ids, run = list(found.ids[:first]), list[int]()
        start = 0
        for token, (begin, end) in zip(found.ids[first:last], found.offsets[first:last], strict=True):
            if token in self._control and end > begin:
                ids += [*self._spelled(text[start:begin], run), token]
                run, start = [], end
            else:
                run.append(token)
        return [*ids, *self._spelled(text[start:], run), *found.ids[last:]]

    def _spelled(self, text: str, tokens: list[int]) -> list[int]:
        """Of a text without control tokens: `tokens`, unless there are marks in it."""
        words = self._marked.sub(lambda mark: self._words[int(mark[1])], text)
        return tokens if words == text else encoding(self._plain, words, False).ids

    @cached_property
    def _plain(self) -> Backend:
        """The same tokenizer, to which the words of control tokens are text. A second one, since threads share both."""
        plain = Backend.from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain


def encoding(backend: Backend, text: str, add_special_tokens: bool) -> Encoding:
    """As `Backend.encode`, which would stop all other threads of this process meanwhile."""
    return backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]


def _without_added(found: Encoding) -> tuple[int, int]:
    """From where to where its tokens are the text's: before and after are those of a post-processor."""
    mask = found.special_tokens_mask
    first = next((place for place, added in enumerate(mask) if not added), len(mask))
    last = next((place for place in range(len(mask), first, -1) if not mask[place - 1]), first)
    return first, last
