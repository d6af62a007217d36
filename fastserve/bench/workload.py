"""Prompts for benchmarks: synthetic token ids, or a file of texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..types import InvalidRequest


def synthetic_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`count` prompts of `length` token ids, drawn evenly from the vocabulary. Equal seeds give equal prompts."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (count, length))
    prompts: list[list[int]] = tokens.tolist()
    return prompts


def read_prompts(path: Path) -> list[str]:
    """One prompt a line of a UTF-8 file, with or without a byte order mark; blank lines are skipped.

    Lines end in \\n or \\r\\n. Other characters that Unicode counts as line ends belong to the prompt.

    Raises InvalidRequest naming the file when it cannot be read or holds no prompt.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("prompts_file", f"cannot read {path}: {error}") from error
    prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise InvalidRequest("prompts_file", f"{path} holds no prompt; write one a line")
    return prompts


def at_least(option: str, value: int, low: int) -> None:
    """Raise InvalidRequest, naming the option, where a count is below `low`."""
    if value < low:
        raise InvalidRequest(option, f"must be an integer of at least {low}, got {value}")
