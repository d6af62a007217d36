"""What jobs ask: prompts of a given number of tokens, and the bodies of requests.

Prompts have in common what their content has, and else nothing with any that a server has seen. In a program, a call's
prompt begins with the one before and with what was answered to it, as clients of chats do it: in text, whatever the
tokens were.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from ...types import Int32Array, InvalidRequest
from ...workloads import SimJob
from ...workloads.content import content_tokens, continues
from .target import PATHS, Target

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
class Said:
    """What was said in a program: texts of its user and of the server, in turn, and the prompt's tokens they stand for.

    The tokens are those of the plan: how many a server makes of the text is its own affair.
    """

    texts: tuple[str, ...] = ()
    tokens: int = 0

    def and_then(self, asked: str, job: SimJob, answer: str) -> Said:
        """With the new part of the job's prompt and the answer to it, where the next call continues the job."""
        if job.then is None or not continues(job, job.then):
            return Said()
        return Said(
            (*self.texts, asked, answer), min(job.prompt_tokens + job.output_tokens, job.then.prompt_tokens - 1)
        )


@dataclass(frozen=True, slots=True)
class Asking:
    """How every request asks."""

    endpoint: str = "completions"
    words: bool = False  # prompts of words, rather than of token ids; chats and programs are always of words
    ignore_eos: bool = True
    temperature: float = 0.0
    program_ids: bool = True  # say which calls are of one program, where the server knows what that is
    extra_body: dict[str, Any] = field(default_factory=dict)

    def new_text(self, job: SimJob, salt: tuple[int, ...], said: Said) -> str:
        """What the prompt adds to what was said."""
        if job.content is None:
            return _words(np.random.default_rng(salt).integers(0, len(_WORDS), job.prompt_tokens))
        blank = " " if said.texts and self.endpoint != "chat" else ""
        return blank + _words(_content(job, said.tokens, 0, len(_WORDS), salt))

    def body(self, job: SimJob, target: Target, salt: tuple[int, ...], asked: str | None, said: Said) -> bytes:
        """The JSON of a request, of which `asked` is new_text, if it is a text at all.

        Equal salts give equal requests; each number of a salt is at least 0, and the last one is the job's own: what
        jobs have in common does not depend on it.
        """
        draw = np.random.default_rng(salt)
        values: dict[str, Any] = {"model": target.model}
        if asked is None:
            values["prompt"] = self._ids(job, draw, salt)
        elif self.endpoint == "chat":
            roles = ("user", "assistant")
            values["messages"] = [
                {"role": roles[turn % 2], "content": text} for turn, text in enumerate((*said.texts, asked))
            ]
        else:
            values["prompt"] = "".join((*said.texts, asked))
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
        if self.program_ids and job.program is not None and target.owner == "fastserve":  # nobody else knows it
            values["program_id"] = f"{'-'.join(map(str, salt[:-1]))}-{job.program}"
        return _encode(values | self.extra_body)

    @staticmethod
    def _ids(job: SimJob, draw: np.random.Generator, salt: tuple[int, ...]) -> list[int]:
        ids: list[int]
        if job.content is None:
            ids = draw.integers(LOWEST_ID, HIGHEST_ID + 1, job.prompt_tokens).tolist()
        else:
            ids = _content(job, 0, LOWEST_ID, HIGHEST_ID + 1 - LOWEST_ID, salt).tolist()
        return ids


def _content(job: SimJob, start: int, first: int, ids: int, salt: tuple[int, ...]) -> Int32Array:
    """What the job's content says from `start` on; all jobs of a run agree on it."""
    return content_tokens(job, start, job.prompt_tokens, first=first, ids=ids, salt=repr(salt[:-1]).encode())


def _words(indices: npt.NDArray[Any]) -> str:
    return " ".join(_WORDS[i] for i in indices.tolist())


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
    return Asking(endpoint, words, ignore_eos, temperature, extra_body=more)
