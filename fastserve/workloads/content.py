"""What prompts hold, worked out of the identities of their parts when it is read.

A token is a function of the identity of its part and of its place there. So prompts that begin with the same identities
begin with the same tokens, and prompts of ten thousand tokens take no memory while they wait.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from ..types import Int32Array, LazyTokens
from .job import SimJob

MAX_IDENTITY: Final = 2**63 - 1

_CHUNK: Final = 2**16  # tokens worked out at once, where somebody goes through a prompt

UInt64s = npt.NDArray[np.uint64]

# Of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
_STEP: Final = np.uint64(0x9E3779B97F4A7C15)
_FACTORS: Final = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS: Final = (np.uint64(30), np.uint64(27), np.uint64(31))


def content_tokens(job: SimJob, start: int, stop: int, *, first: int, ids: int, salt: bytes = b"") -> Int32Array:
    """Tokens start … stop - 1 of the prompt of a job that has content: of `ids` different ones, from `first` on.

    Another salt gives other tokens to the same identities.
    """
    content, block = job.content, job.content_block
    if content is None:
        raise ValueError("a job without content has no tokens in common with any other")
    begin = start // block
    parts, places = np.divmod(np.arange(start, stop), block)  # of what is asked only: parts may be as long as prompts
    identities = np.array(content[begin : -(-stop // block)], np.uint64)
    if salt:
        identities = identities ^ np.uint64(int.from_bytes(hashlib.blake2b(salt, digest_size=8).digest(), "little"))
    mixed = _mixed(_mixed(identities)[parts - begin] + (places + 1).astype(np.uint64) * _STEP) % np.uint64(ids)
    return (mixed + np.uint64(first)).astype(np.int32)


def continues(before: SimJob, after: SimJob) -> bool:
    """Whether a prompt begins with another one and what was put out to it, whatever that is."""
    if before.content is None or after.content is None or before.content_block != after.content_block:
        return False
    longer = after.prompt_tokens > before.prompt_tokens
    return longer and after.content[: len(before.content)] == before.content


@dataclass(frozen=True, slots=True)
class Answer:
    """What is put out in the middle of a later prompt: `tokens` from `start` on, all 0 but for the last."""

    start: int
    tokens: int
    last: int


class ContentPrompt(LazyTokens):
    """The prompt of a job that has content, of tokens from `first` to below `bound`, but where others were answered."""

    def __init__(self, job: SimJob, first: int, bound: int, answers: tuple[Answer, ...] = ()) -> None:
        self.bound = bound
        self.answers = answers
        self._job = job
        self._first = first

    def array(self, start: int, stop: int) -> Int32Array:
        """Tokens start … stop - 1."""
        found = content_tokens(self._job, start, stop, first=self._first, ids=self.bound - self._first)
        for answer in self.answers:
            begin, end = max(start, answer.start), min(stop, answer.start + answer.tokens)
            if begin < end:
                found[begin - start : end - start] = 0
                if end == answer.start + answer.tokens:
                    found[end - start - 1] = answer.last
        return found

    def __len__(self) -> int:
        return self._job.prompt_tokens

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            tokens: list[int] = self.array(start, max(start, stop)).tolist() if step == 1 else list(self)[index]
            return tokens
        place = range(len(self))[index]
        return int(self.array(place, place + 1)[0])

    def __iter__(self) -> Iterator[int]:
        for start in range(0, len(self), _CHUNK):
            yield from self.array(start, min(start + _CHUNK, len(self))).tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self.array(0, len(self)).astype(np.int32 if dtype is None else dtype)


def _mixed(state: UInt64s) -> UInt64s:
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        state = (state ^ (state >> shift)) * factor
    return state ^ (state >> _SHIFTS[2])
