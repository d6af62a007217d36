"""What jobs ask: prompts of a given number of tokens that no server has seen, and the bodies of requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np

from ...types import InvalidRequest
from ...workloads import SimJob
from .target import PATHS

# Ids in the vocabularies of all models that matter, special ones left out. What they are changes no time.
LOWEST_ID: Final = 300
HIGHEST_ID: Final = 31_999
MAX_TEMPERATURE: Final = 100.0

# Each is a token in most vocabularies, with the blank before it. A server's template and tokenizer add some.
_WORDS: Final = tuple(
    word
    for line in (
        "the of and to in is that for it was on are as with his they at be this from have or one had by word but not",
        "what all were we when your can said there use an each which she do how their if will up other about out many",
        "then them these so some her would make like him into time has look two more write go see number no way could",
        "people my than first water been call who oil its now find long down day did get come made may part",
    )
    for word in line.split()
)

_encode: Final = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Asking:
    """How every request asks."""

    endpoint: str = "completions"
    words: bool = False  # prompts of words, rather than of token ids; chats are always of words
    ignore_eos: bool = True
    temperature: float = 0.0
    extra_body: dict[str, Any] = field(default_factory=dict)

    def body(self, job: SimJob, model: str, salt: tuple[int, ...]) -> bytes:
        """The JSON of a request. Equal salts give equal requests; each number of a salt is at least 0."""
        draw = np.random.default_rng(salt)
        values: dict[str, Any] = {"model": model}
        if self.endpoint == "chat":
            values["messages"] = [{"role": "user", "content": _text(draw, job.prompt_tokens)}]
        elif self.words:
            values["prompt"] = _text(draw, job.prompt_tokens)
        else:
            values["prompt"] = draw.integers(LOWEST_ID, HIGHEST_ID + 1, job.prompt_tokens).tolist()
        values |= {
            "max_tokens": job.output_tokens if self.ignore_eos or job.max_tokens is None else job.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            values["ignore_eos"] = True
        if self.temperature > 0:
            values["seed"] = int(draw.integers(2**31))
        if job.user is not None:
            values["user"] = job.user
        if job.priority:
            values["priority"] = job.priority
        return _encode(values | self.extra_body)


def _text(draw: np.random.Generator, tokens: int) -> str:
    return " ".join(_WORDS[i] for i in draw.integers(0, len(_WORDS), tokens).tolist())


def asking(endpoint: str, words: bool, ignore_eos: bool, temperature: float, extra_body: str | None) -> Asking:
    """As the options say. Raises InvalidRequest, naming the option."""
    if endpoint not in PATHS:
        raise InvalidRequest("endpoint", f"must be {' or '.join(PATHS)}, got {endpoint!r}")
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise InvalidRequest("temperature", f"must be a number between 0 and {MAX_TEMPERATURE:g}, got {temperature!r}")
    more: Any = {}
    if extra_body is not None:
        try:
            more = msgspec.json.decode(extra_body)
        except msgspec.DecodeError as error:
            raise InvalidRequest("extra_body", f"must be a JSON object: {error}") from None
        if not isinstance(more, dict):
            raise InvalidRequest("extra_body", f"must be a JSON object, got {extra_body!r}")
    return Asking(endpoint, words, ignore_eos, temperature, more)
