"""Ranks as processes of this host: a group that is started here, watched, and ended as a whole.

It shares memory and needs no MPI; groups on several hosts are mpiexec's, mpirun's or srun's to start.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from . import _C

PATH_VARIABLE = "FASTSERVE_SHARED_MEMORY"
_LAUNCHER_VARIABLE = "FASTSERVE_LAUNCHER"  # a descriptor that ends with the launcher
_GRACE = 3.0  # seconds between asking a process to end and ending it


class RankFailed(RuntimeError):
    """A rank ended before its time, and the others with it."""

    def __init__(self, rank: int, process: int, status: int) -> None:
        self.rank = rank
        self.status = status
        why = f"exited with status {status}" if status >= 0 else f"was ended by {_signal_name(-status)}"
        super().__init__(f"rank {rank} on {socket.gethostname()} (process {process}) {why}; the group was ended")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


_held: weakref.WeakSet[Ranks] = weakref.WeakSet()  # groups that this process is the launcher of


def _let_go() -> None:
    """In a child of a fork, which is no launcher: else ranks would outlive theirs for as long as the child runs."""
    for ranks in list(_held):
        ranks._close_launcher()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


class Ranks:
    """Processes that are ranks `first` … `size - 1` of a group of `size`; those below `first` are the caller's.

    As a context, all are ended at its end.
    """

    def __init__(
        self,
        argv: Sequence[str],
        size: int,
        *,
        first: int = 0,
        environment: Mapping[str, str] | None = None,
        ended_by: signal.Signals = signal.SIGTERM,
    ) -> None:
        """Start them, each with the same arguments. They join in `distributed.connect`. `ended_by` asks them to end.

        Where ranks below `first` are the caller's, the others do not hear of Ctrl-C: it is for the caller to end them.

        Raises OSError when the program cannot be started, and _C.Error when there is no memory to share.
        """
        self._memory = _C.SharedMemory(size)
        self._size = size
        self._ended_by = ended_by
        self._first = first
        self._watching: threading.Thread | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        # Its other end is open here, and closed by the system whatever becomes of this process.
        ours, theirs = os.pipe()
        self._launcher: tuple[int, ...] = (ours, theirs)
        _held.add(self)
        common = {
            **(os.environ if environment is None else environment),
            "FASTSERVE_WORLD_SIZE": str(size),
            PATH_VARIABLE: self._memory.path,
            _LAUNCHER_VARIABLE: str(ours),
        }
        # What a child inherits as blocked stays so, from its first instruction on.
        deaf = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT} if first > 0 else set())
        try:
            for rank in range(first, size):
                own = {**common, "FASTSERVE_RANK": str(rank)}
                self._processes.append(subprocess.Popen(argv, env=own, pass_fds=(ours,)))
        except BaseException:
            self.end()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, deaf)

    @property
    def path(self) -> str:
        """Of the memory they share: what `_C.join_shared_memory` takes."""
        return self._memory.path

    @property
    def processes(self) -> list[int]:
        """Their ids, in rank order."""
        return [process.pid for process in self._processes]

    def watch(self, on_failure: Callable[[RankFailed], None]) -> None:
        """From now on, as soon as one has failed, the others are ended, and joining them or waiting for them fails.

        It says what RankFailed says, which `on_failure` is given, in a thread of its own.
        """

        def work() -> None:
            try:
                self.wait()
            except RankFailed as failure:
                _C.abort_shared_memory(self._memory.path, self._size, str(failure))
                on_failure(failure)

        self._watching = threading.Thread(target=work, name="fastserve-ranks", daemon=True)
        self._watching.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all have ended well; whether they have within `timeout` seconds.

        Raises RankFailed, after ending the others, as soon as one has not.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for process in self._processes:
                if process.poll() is None:
                    descriptor = os.pidfd_open(process.pid)
                    selector.register(descriptor, selectors.EVENT_READ)
            try:
                while True:
                    self._check()
                    if all(process.returncode is not None for process in self._processes):
                        return True
                    rest = None if deadline is None else deadline - time.monotonic()
                    if rest is not None and rest <= 0:
                        return False
                    for key, _ in selector.select(rest):
                        selector.unregister(key.fd)
                        os.close(key.fd)
            finally:
                for key in selector.get_map().values():
                    os.close(key.fd)

    def _check(self) -> None:
        failed = [
            (status > 0, rank, process.pid, status)  # a rank that was ended by a signal is why others exit
            for rank, process in enumerate(self._processes, self._first)
            if (status := process.poll())
        ]
        if failed:
            _, rank, process_id, status = min(failed)
            self.end()
            raise RankFailed(rank, process_id, status)

    def end(self, grace: float = 0.0) -> None:
        """End all that still run after so many seconds: asked first, killed after three more."""
        if self._watching is not None and threading.current_thread() is not self._watching:
            self._watching.join(grace)
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(self._ended_by)
        deadline = time.monotonic() + _GRACE
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._close_launcher()

    def _close_launcher(self) -> None:
        launcher, self._launcher = self._launcher, ()
        for descriptor in launcher:
            os.close(descriptor)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def launch(size: int, argv: Sequence[str]) -> int:
    """Run a program as a group of `size` ranks on this host, and wait for it.

    Returns its exit status: 0, or the status of the rank that failed first (128 + n for signal n), after one line on
    stderr that says which one, where, and why. An interrupt ends the group.
    """
    with Ranks(argv, size) as ranks:
        try:
            ranks.wait()
        except RankFailed as failure:
            print(f"fastserve: {failure}", file=sys.stderr)
            return failure.status if failure.status > 0 else 128 - failure.status
    return 0


def end_with_launcher() -> None:
    """In a rank: end when the process that started it is no more."""
    descriptor = os.environ.pop(_LAUNCHER_VARIABLE, None)  # once, and not for processes that this one starts
    if descriptor is None:
        return

    def watch() -> None:
        os.read(int(descriptor), 1)  # nobody writes: it returns when the last writer is gone
        if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
            os._exit(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="fastserve-launcher", daemon=True).start()
