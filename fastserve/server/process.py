"""One engine process from its start to its end, and the link to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

import zmq

from ..ipc import SERVER_PID, Failed, FromEngine, Here, Ready, Stop
from .deaths import OWN_SIGNALS, Deaths, ended_by, name_of
from .link import Link


class EngineProcess:
    """Messages but Here, Ready and Failed go to `on_message`, once that is set."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Raises OSError and ZMQError where no socket can be made."""
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Ready] = loop.create_future()
        self.exited: asyncio.Future[int] = loop.create_future()
        self.failing: asyncio.Future[Failed] = loop.create_future()  # it has said so, and exits next
        self.heard = False  # set by every message
        self.on_message: Callable[[FromEngine], None] | None = None
        self._garbage: str | None = None
        self._killed = False  # by us
        self.gone: asyncio.Future[None] = loop.create_future()  # rank 0 has ended; what has started it may not have
        self._rank_0 = -1  # a handle of it
        self._rank_0_process: int | None = None  # once it has said that it is there
        self._deaths: Deaths | None = None  # of ranks that a launcher has started
        self._program = "the launcher"
        self._launched = False  # by a launcher, which is the process that was started
        self._by_launcher = False  # the same, as the command says it
        self._process: asyncio.subprocess.Process | None = None
        self._waiting: asyncio.Task[None] | None = None
        self._link = Link(context, self._take, self._take_garbage)
        self.send = self._link.send
        self.drain = self._link.drain

    async def start(self, command: Sequence[str]) -> int:
        """Run the command; returns the pid. Raises OSError."""
        self._program = os.path.basename(command[0])
        self._by_launcher = command[0] != sys.executable  # else it is rank 0 itself
        self._process = await asyncio.create_subprocess_exec(
            *command,
            "--address",
            self._link.address,
            stdin=subprocess.DEVNULL,
            env={**os.environ, SERVER_PID: str(os.getpid())},
            start_new_session=True,  # and so a process group, with the ranks that it starts
        )
        self._waiting = asyncio.create_task(self._wait(self._process))
        return self._process.pid

    async def end(self, grace: float) -> None:
        """Stop the process, by force after `grace` seconds, and wait for its end. Nothing is heard of it any more."""
        try:
            if self._process is None or self._waiting is None:
                return
            if grace > 0:
                self.send(Stop())
                await asyncio.wait({self.exited}, timeout=grace)
            self.kill()
            await self._waiting
        finally:
            self._link.close()
            self._forget_rank_0()
            if self._deaths is not None:
                self._deaths.close()

    @property
    def failed(self) -> Failed | None:
        """Why it does not go on; it may still have to end what it has started."""
        return self.failing.result() if self.failing.done() else None

    def last_words(self) -> str:
        """Why the process has ended, in one line."""
        if self._garbage is not None:
            return f"the engine sent what is no message ({self._garbage}) and has been killed"
        if self.failed is not None:
            return self.failed.message
        if not self.exited.done():
            who = f"{socket.gethostname()} (process {self._rank_0_process})"
            return f"the engine's rank 0 on {who} has ended, and what has started it has not"
        code = self.exited.result()
        if self._launched or self._by_launcher:
            return self._launchers_last_words(code)
        if code >= 0:
            return f"the engine ended with exit code {code}"
        return f"the engine was killed by {name_of(-code)}"

    def _launchers_last_words(self, code: int) -> str:
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by {name_of(-code)}"
        said = f"{self._program} {how}"
        ended = ended_by(code)
        if self._rank_0_process is not None and ended is not None:
            return f"{self._deaths or 'a rank'} was ended by {ended[0]}, and the group with it ({said})"
        if self._rank_0_process is None:
            return f"the launcher {said} before rank 0 of the engine came"
        return f"{said}; the first to end was {self._deaths}" if self._deaths else said

    @property
    def crashed(self) -> bool:
        """It has ended of itself, or had to be killed for what it did; else somebody outside may have ended it."""
        if self.failed is not None:
            return not self.failed.outside
        code = self.exited.result()
        if self._launched and code > 0:
            ended = ended_by(code)  # other exit codes of a launcher do not tell
            return self._killed or (ended is not None and ended[1])
        return self._killed or code > 0 or -code in OWN_SIGNALS

    async def _wait(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        self._kill_all()  # a rank that hangs does not notice that it is alone
        self.exited.set_result(code)

    def kill(self) -> None:
        """By force, with all that it started; `exited` tells when it is over."""
        if self._process is not None and not self.exited.done():
            self._killed = self._kill_all() and not self.gone.done()  # else it was only a launcher that stayed

    def _kill_all(self) -> bool:
        """Whether anybody was there to be killed."""
        assert self._process is not None
        if self._rank_0 >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._rank_0, signal.SIGKILL)
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def _take(self, message: FromEngine) -> None:
        self.heard = True
        if isinstance(message, Failed):
            if not self.failing.done():
                self.failing.set_result(message)
        elif isinstance(message, Here):
            self._know(message.pid)
        elif isinstance(message, Ready):
            if not self.ready.done():
                self.ready.set_result(message)
                if self._launched and self._deaths is None:
                    self._deaths = Deaths(message.info.get("ranks", []))
        elif self.on_message is not None:
            self.on_message(message)

    def _know(self, rank_0: int) -> None:
        """mpiexec may not end when it has, and srun's processes are slurmd's, in no process group of ours."""
        self._forget_rank_0()
        self._rank_0_process = rank_0
        self._launched = self._process is not None and self._process.pid != rank_0
        with contextlib.suppress(AttributeError, OSError):  # no such handles on this system, or it has ended
            self._rank_0 = os.pidfd_open(rank_0)
            asyncio.get_running_loop().add_reader(self._rank_0, self._rank_0_ended)

    def _rank_0_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._rank_0)
        if not self.gone.done():
            self.gone.set_result(None)

    def _forget_rank_0(self) -> None:
        if self._rank_0 >= 0:
            asyncio.get_running_loop().remove_reader(self._rank_0)
            os.close(self._rank_0)
            self._rank_0 = -1

    def _take_garbage(self, error: str) -> None:
        self._garbage = error
        self.kill()
