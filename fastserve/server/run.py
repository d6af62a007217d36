"""A server's life: bind, load, serve, drain, exit.

SIGTERM, SIGINT ──▶ draining: new work gets 503, what is open goes on ──▶ nothing open, or --shutdown-timeout over
                ──▶ what is left ends with an error ──▶ exit 0             a second SIGINT: exit 130 at once
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from ..types import InvalidRequest
from .service import Service
from .settings import ServerSettings

_LAST_WORDS = 2  # seconds that ended streams get to be written out
_TICK = 0.05  # seconds between looks at what is open
INTERRUPTED = 130


def bind(settings: ServerSettings) -> socket.socket:
    """The address, taken but not yet listening: clients are refused until the model is loaded.

    Raises InvalidRequest, naming the option, where it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise InvalidRequest("host", f"cannot find {settings.host!r}: {error}") from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_bind(settings, error) from None
    return bound


def _cannot_bind(settings: ServerSettings, error: OSError) -> InvalidRequest:
    if error.errno == errno.EADDRINUSE:
        return InvalidRequest("port", f"{settings.port} of {settings.host} is in use; choose another, or 0 for any")
    if error.errno == errno.EACCES:
        return InvalidRequest("port", f"{settings.port} needs privileges that this process does not have")
    if error.errno == errno.EADDRNOTAVAIL:
        return InvalidRequest("host", f"{settings.host} is no address of this machine")
    return InvalidRequest("host", f"cannot listen on {settings.host}:{settings.port}: {error.strerror}")


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    service: Service, app: FastAPI, bound: socket.socket, *, on_ready: Callable[[str], None] | None = None
) -> int:
    """Start the engine, serve until a signal ends it, stop the engine; the exit code.

    Raises what the engine's start raises, and InvalidRequest where another server was faster to listen.
    """
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,  # logging is the caller's
            access_log=False,  # the gate tells of requests
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_LAST_WORDS,
            server_header=False,
        )
    )
    life = _Life(service, server)
    with life.signals():
        starting = asyncio.ensure_future(service.engine.start())
        stopping = asyncio.ensure_future(life.stop.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return INTERRUPTED if life.interrupts else 0
            await starting
            try:
                bound.listen(server.config.backlog)  # whoever is told the address may connect at once
            except OSError as error:  # somebody else bound the port, too, and listened first
                raise _cannot_bind(service.settings, error) from None
            if on_ready is not None:
                on_ready(url_of(bound))
            draining = asyncio.ensure_future(life.drain())
            try:
                await server.serve(sockets=[bound])
            finally:
                draining.cancel()
        finally:
            starting.cancel()
            stopping.cancel()
            bound.close()
            await service.engine.stop()
            service.close()
    return INTERRUPTED if life.interrupted else 0


class _Server(uvicorn.Server):
    """uvicorn closes its sockets at the first signal; ours goes on answering, with 503, until it is empty."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Life:
    def __init__(self, service: Service, server: uvicorn.Server) -> None:
        self._service = service
        self._server = server
        self.interrupts = 0
        self.stop = asyncio.Event()
        self.interrupted = False

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop.set)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            loop.remove_signal_handler(signal.SIGINT)

    async def drain(self) -> None:
        await self.stop.wait()
        self._service.drain()
        loop = asyncio.get_running_loop()
        end = loop.time() + self._service.settings.shutdown_timeout
        while self._service.calls and loop.time() < end and not self.interrupted:
            await asyncio.sleep(_TICK)
        self._service.end_all()
        self._server.should_exit = True

    def _interrupt(self) -> None:
        self.interrupts += 1
        self.stop.set()
        if self.interrupts > 1:
            self.interrupted = True
            self._server.config.timeout_graceful_shutdown = 0
            self._server.should_exit = self._server.force_exit = True
            self._service.engine.hasten()
