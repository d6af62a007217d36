"""Read-only memory maps of model files, and giving their pages back."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .spec import ModelError

# What one page fault may map besides its page, before it and behind: a huge page's worth, where the file is cached so.
_FAULT_AROUND = 2 * 2**20


class MappedFile:
    """A file mapped into memory. Views stay valid for as long as anything refers to them.

    Raises ModelError when the file is missing, unreadable or empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # how mmap says that a file is empty
            raise ModelError(f"{path}: the file is empty") from error
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror or error}") from error
        self.size = len(self.memory)

    def view(self, offset: int, length: int) -> npt.NDArray[np.uint8]:
        """The bytes [offset, offset + length), without a copy."""
        return np.frombuffer(self.memory, np.uint8, length, offset)

    def release(self, offset: int, length: int) -> None:
        """Let go of the pages of a range, so that they no longer count as resident.

        Their content comes back from the file when a view reads it again, so rounding outwards is safe. What lies
        before it was mapped again by its own faults.
        """
        if hasattr(self.memory, "madvise"):  # not on Windows
            start = max(0, offset - _FAULT_AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
            self.memory.madvise(mmap.MADV_DONTNEED, start, offset + length - start)
