"""Which rank of a launcher's group ended first, and by what: mpiexec ends the others before one of them can tell."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

# By which a program ends of itself. SIGKILL may be the system's answer to a lack of memory, or an operator's.
OWN_SIGNALS = {
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSEGV,
    signal.SIGSYS,
    signal.SIGTRAP,
}
_NAMES = {each.value: each.name for each in signal.Signals}
# MPICH's mpiexec exits with the signal of the first rank to end, or-ed with the SIGKILL that it sends to the others.
# No rank heeds SIGTERM (worker.py), which leaves SIGABRT and SIGBUS for 15.
_OF_MPICH = {9: ("SIGKILL", False), 11: ("SIGSEGV", True), 13: ("SIGILL", True), 15: ("SIGABRT or SIGBUS", True)}


def name_of(number: int) -> str:
    """A signal's."""
    return _NAMES.get(number, f"signal {number}")


def ended_by(code: int) -> tuple[str, bool] | None:
    """The signal that ended a rank, by its launcher's exit code, and whether of itself; None: by none."""
    if code in _OF_MPICH:
        return _OF_MPICH[code]
    if code - 128 in _NAMES:  # Open MPI's and Slurm's way
        return _NAMES[code - 128], code - 128 in OWN_SIGNALS
    return None


class Deaths:
    """Handles of the ranks on this host (pidfds), watched from now on by the running event loop.

    It hears of their ends in the order in which they came, however late it looks: epoll keeps it.
    """

    def __init__(self, members: Sequence[Mapping[str, Any]]) -> None:
        """`members` as in LLM.info: rank, process and host of each, of rank 0 first, which is on this host."""
        self._loop = asyncio.get_running_loop()
        self._members = list(members)
        self._handles: dict[int, Mapping[str, Any]] = {}
        self._first: Mapping[str, Any] | None = None
        for member in self._members:
            if member["host"] == self._members[0]["host"]:
                with contextlib.suppress(AttributeError, OSError):  # no such handles on this system, or it has ended
                    handle = os.pidfd_open(member["process"])
                    self._handles[handle] = member
                    self._loop.add_reader(handle, self._ended, handle)

    def __str__(self) -> str:
        """Who ended first, where that can be told; else where it may have been."""
        hosts = list(dict.fromkeys(str(member["host"]) for member in self._members))
        if len(hosts) > 1 or self._first is None:  # one elsewhere may have been before those here
            return f"a rank on {' or '.join(hosts)}" if hosts else "a rank"
        return f"rank {self._first['rank']} on {self._first['host']} (process {self._first['process']})"

    def close(self) -> None:
        """Watch no more. Idempotent."""
        for handle in list(self._handles):
            self._forget(handle)

    def _ended(self, handle: int) -> None:
        self._first = self._first or self._handles[handle]
        self._forget(handle)

    def _forget(self, handle: int) -> None:
        del self._handles[handle]
        self._loop.remove_reader(handle)
        os.close(handle)
