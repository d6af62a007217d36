"""Starts the engine process, watches it, and starts the next one when it dies.

start ──▶ loading ──Ready──▶ up ──exit, silence──▶ down ── back-off ──▶ loading …
             └──exit, Failed, too long──▶ the first time: start() raises; later: a failed start, and down
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import zmq

from ..ipc import FromEngine, Ready, ToEngine
from ..types import InvalidRequest
from .engine_api import EngineUnavailable
from .process import EngineProcess

log = logging.getLogger(__name__)

_LOOKS = 8  # at the engine, in one heartbeat_timeout
_WORTH = 10  # back-offs that an engine has to be up for to start them over

Send = Callable[[ToEngine], None]


class EngineStartError(EngineUnavailable):
    """The engine did not start the first time. `field` is the option at fault, where it is one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, kw_only=True)
class Health:
    """How long things may take, in seconds, and how often they may fail."""

    heartbeat_timeout: float = 30.0  # silence after which an engine that is up is killed
    start_timeout: float = 1800.0  # from the start of the process to Ready
    stop_timeout: float = 5.0  # from Stop to the end of the process
    backoff: float = 0.1  # before a restart; doubles from one to the next
    max_backoff: float = 30.0
    healthy_after: float = 60.0  # an engine that was up for so long, or ten back-offs, starts the back-off over
    max_failed_starts: int = 5  # in a row, after which there is a failure to tell of

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
                raise InvalidRequest(field.name, f"must be a number above 0, got {value!r}")


class BackOff:
    """How long to wait before a restart. Doubles from one to the next, but not after an engine that was worth it.

    So waiting takes a tenth of the time at most where engines die now and then, and one that dies at once is hardly
    ever started.
    """

    def __init__(self, health: Health) -> None:
        self._health = health
        self._next = health.backoff

    def after(self, lived: float) -> float:
        """Seconds to wait, after an engine that was up for so many."""
        if lived >= min(self._health.healthy_after, _WORTH * self._next):
            self._next = self._health.backoff
        wait, self._next = self._next, min(2 * self._next, self._health.max_backoff)
        return wait


class Listener(Protocol):
    """Who the supervisor tells. Called in the event loop; must return at once."""

    def engine_up(self, ready: Ready, send: Send) -> None:
        """A new engine takes Adds, through `send`."""

    def engine_said(self, message: FromEngine) -> None:
        """Any message but Ready and Failed, of the engine that is up."""

    def engine_down(self, crashed: bool) -> None:
        """The engine that was up is gone, and nothing it said is on its way any more.

        `crashed`: of itself, as far as can be told; else somebody outside may have ended it.
        """

    def engine_fails(self, reason: str) -> None:
        """Another start has failed, after too many in a row."""


class Supervisor:
    """Keeps one engine process running. `command` is run with `--address ADDRESS` added."""

    def __init__(self, command: Sequence[str], health: Health, listener: Listener, name: str = "") -> None:
        """`name` comes before all that is logged: "engine 1: " where there are several."""
        self._name = name
        self._command = list(command)
        self._health = health
        self._listener = listener
        self._task: asyncio.Task[None] | None = None
        self._stopping: EngineProcess | None = None  # that has been told to, and has its grace
        self._grace = health.stop_timeout
        self.pid: int | None = None  # of the process that runs, loading or up
        self.restarts = 0  # starts but the first
        self.fixed_options: dict[str, Any] = {}  # that every later engine is started with

    async def start(self) -> None:
        """Return when the first engine is up. Raises EngineStartError when it does not come up."""
        if self._task is not None:
            raise RuntimeError("the supervisor has been started")
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._supervise(first), name="fastserve-supervisor")
        try:
            await first
        except BaseException:  # a cancellation, too
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the engine and wait for its end. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def hasten(self) -> None:
        """No grace for an engine that is being stopped, or will be."""
        self._grace = 0.0
        if self._stopping is not None:
            self._stopping.kill()

    async def _supervise(self, first: asyncio.Future[None]) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            await self._keep_running(context, first)
        except Exception as error:
            if not first.done():
                first.set_exception(error)
            else:  # a mistake of ours: whoever waits must hear that nobody looks after the engine any more
                log.exception("%sthe supervisor of the engine has failed", self._name)
                self._listener.engine_fails(f"the supervisor of the engine has failed: {error!r}")
        finally:
            context.term()

    async def _keep_running(self, context: zmq.Context[zmq.Socket[bytes]], first: asyncio.Future[None]) -> None:
        """Returns never. Raises EngineStartError when the first start fails."""
        failed, backoff = 0, BackOff(self._health)
        while True:
            lived = 0.0
            try:
                lived = await self._one_life(context, first)
                failed = 0
            except EngineStartError as error:
                if not first.done():
                    raise
                failed += 1
                log.error("%srestart %d of the engine failed: %s", self._name, self.restarts, error)
                if failed >= self._health.max_failed_starts:
                    self._listener.engine_fails(
                        f"the engine does not start any more ({failed} times in a row): {error}"
                    )
            await asyncio.sleep(backoff.after(lived))
            self.restarts += 1

    async def _one_life(self, context: zmq.Context[zmq.Socket[bytes]], first: asyncio.Future[None]) -> float:
        """An engine from its start to its death. Returns the seconds for which it was up. Raises EngineStartError."""
        try:
            engine = EngineProcess(context)
        except (OSError, zmq.ZMQError) as error:
            raise EngineStartError(f"no socket for the engine could be made: {error}") from error
        up_since: float | None = None
        try:
            ready = await self._load(engine)
            up_since = time.monotonic()
            engine.on_message = self._listener.engine_said
            self._listener.engine_up(ready, engine.send)
            if not first.done():
                first.set_result(None)
            reason = await self._watch(engine)
        finally:
            stopping = self._task is None and up_since is not None
            self._stopping = engine
            await _undisturbed(engine.end(self._grace if stopping else 0.0))
            self._stopping = None
            self.pid = None
        lived = time.monotonic() - up_since
        log.error("%s%s; it was up for %.1f s and is started again", self._name, reason, lived)
        self._listener.engine_down(engine.crashed)
        return lived

    async def _load(self, engine: EngineProcess) -> Ready:
        """Raises EngineStartError."""
        try:
            self.pid = await engine.start(self._command_line())
        except OSError as error:
            raise EngineStartError(f"the engine cannot be started: {self._command[0]}: {error.strerror}") from error
        waited: set[asyncio.Future[Any]] = {engine.ready, engine.exited, engine.failing, engine.gone}
        await asyncio.wait(waited, timeout=self._health.start_timeout, return_when=asyncio.FIRST_COMPLETED)
        if await self._has_ended(engine):
            field = engine.failed.field if engine.failed is not None else None
            raise EngineStartError(engine.last_words(), field)
        if not engine.ready.done():
            raise EngineStartError(f"the engine was not ready after {self._health.start_timeout:g} s")
        return engine.ready.result()

    def _command_line(self) -> list[str]:
        return [*self._command, *(["--options", json.dumps(self.fixed_options)] if self.fixed_options else [])]

    async def _watch(self, engine: EngineProcess) -> str:
        """Return when the engine is dead or has to be, and why.

        Silence is counted in looks, not read from a clock: when it was this process that stood still, what the engine
        said meanwhile is waiting to be read, and there has been one look only.
        """
        silent = 0
        while silent < _LOOKS:
            engine.heard = False
            waited: set[asyncio.Future[Any]] = {engine.exited, engine.failing, engine.gone}
            await asyncio.wait(waited, timeout=self._look, return_when=asyncio.FIRST_COMPLETED)
            if await self._has_ended(engine):
                return engine.last_words()
            silent = 0 if engine.heard else silent + 1
        return f"the engine was silent for {self._health.heartbeat_timeout:g} s and has been killed"

    async def _has_ended(self, engine: EngineProcess) -> bool:
        """Whether the process has, and all it said is heard.

        Or its rank 0 has, or has failed: then it gets a moment to end by itself, and not more, for a launcher may wait
        for ranks on a host that is not there any more.
        """
        if engine.failing.done() or engine.gone.done():
            await asyncio.wait({engine.exited}, timeout=self._look)
        elif not engine.exited.done():
            return False
        engine.drain()  # it may have said who was running, or that a job had ended
        return True

    @property
    def _look(self) -> float:
        """Seconds from one look at the engine to the next."""
        return self._health.heartbeat_timeout / _LOOKS


async def _undisturbed(work: Coroutine[Any, Any, None]) -> None:
    """Do it to the end, and be cancelled only then."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled
