"""Files that are written as a whole, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """A file for text that takes the place of the one at `path` once all is written, which may be read until then.

    Where writing fails, what was there stays, and nothing else does. What is no file, such as a pipe, is written to as
    it is. Raises OSError where `path` cannot be written.
    """
    given = Path(path)
    if given.exists() and not given.is_file():
        with given.open("w", encoding="utf-8") as file:
            yield file
        return
    target = Path(os.path.realpath(given))  # a link stays one
    there = target.exists()
    if there:
        target.open("r+b").close()  # raises for a file that may not be written, which a folder would let us replace
    beside = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with beside.open("x", encoding="utf-8") as file:
            if there:
                shutil.copymode(target, beside)
            yield file
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
