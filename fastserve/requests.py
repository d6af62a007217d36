"""Prompts on their way in: text and conversations become tokens, requests get a name and a seed."""

from __future__ import annotations

import itertools
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from .config import check_integer
from .origin import NOBODY, Origin
from .tokenizer import Tokenizer
from .types import InvalidRequest, SamplingParams

Prompt = str | Sequence[int]  # text, or token ids
Message = Mapping[str, Any]  # role and content, as in OpenAI's API


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt on its way in: turned into tokens, its seed drawn."""

    request_id: str
    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    seed: int
    priority: int = 0  # lower goes first among its tenant's, whatever the policy says
    origin: Origin = NOBODY


class Intake:
    """Makes requests for one model, called `model` in what it says."""

    def __init__(self, model: str, tokenizer: Tokenizer | None, seed: int) -> None:
        """`seed` draws those of requests that bring none."""
        self.made = 0  # requests that got a name here
        self._model = model
        self._tokenizer = tokenizer
        self._seeds = random.Random(seed)
        self._numbers = itertools.count()
        # Names of requests that bring none must not be names that a caller thinks of.
        self._prefix = f"req-{secrets.token_hex(4)}"

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        text: str | None = None,
        priority: int = 0,
        origin: Origin = NOBODY,
    ) -> Request:
        """Turn a prompt into a request. `text` is what to report as the prompt where `prompt` holds token ids.

        Raises InvalidRequest when the prompt is neither text nor token ids, when text is asked for or given and the
        model has no tokenizer, when the request's id is no name and its priority no integer of 32 bits.
        """
        given: Any = params
        if not isinstance(given, SamplingParams):
            raise InvalidRequest("sampling_params", f"must be SamplingParams, got {given!r:.80}")
        if request_id is None:
            request_id = f"{self._prefix}-{next(self._numbers)}"
            self.made += 1
        check_request_id(request_id)
        if isinstance(prompt, str):
            text, token_ids = prompt, self._need_tokenizer("prompt", "pass token ids").encode(prompt)
        else:
            token_ids = _token_ids(prompt)
        if params.stop:
            self._need_tokenizer("stop", "use stop_token_ids")
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        return Request(
            request_id=request_id,
            prompt=text,
            token_ids=token_ids,
            params=params,
            seed=seed,
            priority=check_integer("priority", priority, -(2**31), 2**31 - 1),
            origin=origin,
        )

    def chat_request(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        origin: Origin = NOBODY,
    ) -> Request:
        """A conversation, written out by the model's chat template, as a request. Raises InvalidRequest."""
        given: Any = messages
        if not isinstance(given, (list, tuple)) or not all(isinstance(message, Mapping) for message in given):
            raise InvalidRequest("messages", f"must be a list of dicts with role and content, got {given!r:.80}")
        tokenizer = self._need_tokenizer("messages", "use generate with token ids")
        text = tokenizer.apply_chat_template(messages)
        token_ids = tokenizer.encode_chat(messages)
        return self.request(token_ids, params, request_id=request_id, text=text, priority=priority, origin=origin)

    def _need_tokenizer(self, field: str, instead: str) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequest(field, f"needs a tokenizer, and {self._model} was loaded without one; {instead}")
        return self._tokenizer


def check_request_id(request_id: Any) -> None:
    if not isinstance(request_id, str) or not request_id:
        raise InvalidRequest("request_id", f"must be a string that is not empty, got {request_id!r}")


def _token_ids(prompt: Any) -> list[int]:
    try:
        if isinstance(prompt, (bytes, bytearray, Mapping)):
            raise TypeError
        return [index(token) for token in prompt]
    except TypeError:
        raise InvalidRequest("prompt", f"must be text or a list of token ids, got {prompt!r:.80}") from None
