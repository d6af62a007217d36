"""Memory that a burst of requests took, given back to the system."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from typing import Final

_BURST: Final = 256  # jobs that ended since the last time: fewer leave nothing behind worth the trouble
_AFTER: Final = 0.5  # seconds between looks


class Memory:
    """Told of every job that ended, and waits for a moment when nothing is open. Belongs to one event loop.

    The C library keeps what was freed unless it lies at the end of its heap, so after thousands of clients at once the
    server would keep the memory of its worst moment for good.
    """

    def __init__(self, idle: Callable[[], bool]) -> None:
        self._idle = idle
        self._ended = 0
        self._waiting = False

    def ended(self) -> None:
        self._ended += 1
        if self._ended >= _BURST and not self._waiting:
            self._wait()

    def _wait(self) -> None:
        self._waiting = True
        asyncio.get_running_loop().call_later(_AFTER, self._look)

    def _look(self) -> None:
        if not self._idle():
            self._wait()
            return
        self._waiting = False
        self._ended = 0
        give_back()


def give_back() -> None:
    """Some milliseconds. Does nothing where the C library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
