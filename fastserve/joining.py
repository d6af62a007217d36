"""While the ranks that a launcher has started come together: who does not come, and what MPI dies of.

MPI's own start waits without a limit, in a call that nothing interrupts, and dies where shared memory is full. So a
thread watches meanwhile, and ends this process with one line that says why.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import _C

LIMIT_VARIABLE: Final = "FASTSERVE_JOIN_TIMEOUT"
_LOOK: Final = 0.5  # seconds between two looks at the others
_SURE: Final = 2  # looks in a row that miss a rank; a process that replaces its program has no environment for a moment
_ALL_STARTED: Final = 5.0  # seconds after which a launcher has started all of a host, when it has started this one
_RANK_0_FIRST: Final = 1.5  # seconds that others stay: a launcher ends all ranks when the first ends
_FAILED: Final = 2  # exit code
_DONE: Final = b"d"
_SEGMENT: Final = 1.1  # MB in /dev/shm that MPICH has for each rank of a host

# How many ranks of this host a launcher has started.
_LOCAL_SIZES: Final = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")


@dataclass(frozen=True)
class Awaited:
    """The ranks that are to come, as one of them knows them."""

    launcher: str
    variable: str  # of the environment, which has a process's rank
    rank: int
    size: int
    host: str

    @property
    def here(self) -> int | None:
        """How many of them are on this host, where the launcher says it."""
        told = next((os.environ[name] for name in _LOCAL_SIZES if name in os.environ), "")
        return int(told) if told.isascii() and told.isdigit() else None


def limit_of(timeout: float, size: int, environment: Mapping[str, str] = os.environ) -> float:
    """Seconds that the first of `size` ranks waits for the last. `timeout`: that ranks at work wait for each other.

    They all start at once, and what sets them apart is how fast they load Python: much, where many hosts read it from
    one file server. FASTSERVE_JOIN_TIMEOUT says otherwise. Raises ValueError for what is no number of seconds.
    """
    if LIMIT_VARIABLE in environment:
        seconds = float(environment[LIMIT_VARIABLE])
        if not seconds > 0:
            raise ValueError(f"must be above 0, got {seconds:g}")
        return seconds
    return max(20.0, min(timeout, 120.0)) + size / 2


@contextlib.contextmanager
def watched(awaited: Awaited, limit: float, on_failure: Callable[[str], None] | None = None) -> Iterator[int]:
    """Ends this process when what is within takes too long, or cannot end well any more.

    Yields the descriptor for _C.connect_mpi's `alarm`. `on_failure`: told why, on rank 0, before the end, by another
    thread while this one is in MPI.
    """
    ear, mouth = os.pipe()
    watch = threading.Thread(
        target=_watch, args=(awaited, limit, on_failure, ear), name="fastserve-joining", daemon=True
    )
    watch.start()
    try:
        yield mouth
    finally:
        os.write(mouth, _DONE)
        watch.join()
        os.close(ear)
        os.close(mouth)


def _watch(awaited: Awaited, limit: float, on_failure: Callable[[str], None] | None, ear: int) -> None:
    neighbours = Neighbours(awaited.variable)
    begin, missed = time.monotonic(), 0
    seen: set[int] = set()
    while True:
        if select.select([ear], [], [], _LOOK)[0]:
            if os.read(ear, 1) == _DONE:
                return
            return _end(awaited, _no_room(awaited), on_failure)
        waited = time.monotonic() - begin
        there = neighbours.ranks()
        lost = None if there is None else _lost(awaited, seen, there, waited > _ALL_STARTED)
        seen |= there or set()
        missed = 0 if lost is None else missed + 1
        if lost is not None and missed >= _SURE:
            return _end(awaited, f"{lost} before the ranks came together", on_failure)
        if waited > limit:
            return _end(awaited, _late(awaited, limit, there), on_failure)


def _lost(awaited: Awaited, seen: set[int], there: set[int], all_started: bool) -> str | None:
    """What has ended, by those who were and are there; None: nothing, as far as can be told."""
    gone = seen - there
    if not gone and awaited.here == awaited.size and all_started:
        gone = set(range(awaited.size)) - there
    if gone:
        return f"rank {min(gone)} on {awaited.host} has ended"
    if awaited.here is not None and len(there) < awaited.here and all_started:
        return f"{awaited.here - len(there)} of the {awaited.here} ranks on {awaited.host} have ended ({_those(there)})"
    return None


def _late(awaited: Awaited, limit: float, there: set[int] | None) -> str:
    seen = "" if there is None else f"; on {awaited.host} {_those(there)}"
    return (
        f"others of the {awaited.size} ranks that {awaited.launcher} started have not reached MPI_Init within "
        f"{limit:g} seconds{seen}. Where hosts need longer to load Python, {LIMIT_VARIABLE} says how many seconds"
    )


def _no_room(awaited: Awaited) -> str:
    space = os.statvfs("/dev/shm")
    ranks = awaited.here or 1
    return (
        f"/dev/shm is full: MPI needs about {_SEGMENT * ranks:.1f} MB there for {ranks} ranks on {awaited.host}, and "
        f"of {space.f_blocks * space.f_frsize / 1e6:.1f} MB {space.f_bavail * space.f_frsize / 1e6:.1f} are free. "
        "Remove what is left there of programs that have ended (mpich_shm_*), or make it larger (docker run --shm-size)"
    )


def _those(ranks: set[int]) -> str:
    return f"there {'is rank' if len(ranks) == 1 else 'are ranks'} {', '.join(map(str, sorted(ranks)))}"


def _end(awaited: Awaited, reason: str, on_failure: Callable[[str], None] | None) -> None:
    _C.unlink_mpi_memory()
    who = f"rank {awaited.rank} of {awaited.size} on {awaited.host}"
    print(f"fastserve: {who}: {reason}", file=sys.stderr, flush=True)
    if awaited.rank > 0:
        time.sleep(_RANK_0_FIRST)
    elif on_failure is not None:
        on_failure(f"{who}: {reason}")
    _C.unlink_mpi_memory()  # the thread in MPI may have made its memory since
    os._exit(_FAILED)


class Neighbours:
    """Processes of the launcher that has started this one, by their ranks: those below the same helper of it."""

    def __init__(self, variable: str) -> None:
        self._variable = f"{variable}=".encode()
        self._helper: int | None = None
        with contextlib.suppress(OSError):  # then nothing can be told
            own = process = os.getpid()
            with contextlib.suppress(PermissionError):  # a helper may be another user's
                while self._rank(process) == self._rank(own):
                    process = _parent(process)
            self._helper = process

    def ranks(self) -> set[int] | None:
        """Those that run; None where the system does not tell."""
        if self._helper is None:
            return None
        try:
            return {rank for each in _descendants(self._helper) if (rank := self._rank(each)) is not None}
        except OSError:
            return None

    def _rank(self, process: int) -> int | None:
        """Raises PermissionError for another user's, and ProcessLookupError below the first one."""
        try:
            environment = Path(f"/proc/{process}/environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            return None
        for each in environment.split(b"\0"):
            if each.startswith(self._variable) and each[len(self._variable) :].isdigit():
                return int(each[len(self._variable) :])
        return None


def _parent(process: int) -> int:
    """Raises ProcessLookupError where it is out of sight."""
    stat = Path(f"/proc/{process}/stat").read_text()
    parent = int(stat.rpartition(")")[2].split()[1])
    if parent == 0:
        raise ProcessLookupError(process)
    return parent


def _descendants(process: int) -> Iterator[int]:
    """Raises OSError where the system does not tell of children."""
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            for child in map(int, (task / "children").read_text().split()):
                yield child
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                    yield from _descendants(child)
