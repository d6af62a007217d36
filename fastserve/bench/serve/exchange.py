"""One job on the wire: a connection, a request, a streamed answer.

An asyncio protocol rather than a library's client, since a load generator that is slow measures itself. CPU a
token, with 2,000 concurrent streams of 30 tokens, on an EPYC at 2.6 GHz that others used, too:

    a protocol that only counts packets         18 µs
    this one, records, prompts and all          28 µs
    asyncio's streams, without records          29 µs
    h11 in a protocol, without records          33 µs
    httpx's AsyncClient, without records       189 µs
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Callable
from typing import Final

from .answer import DONE, ErrorEvent, message_of, note
from .http import ProtocolError, Response
from .record import JobRecord
from .sse import EventStream
from .target import Address

_MAX_MESSAGE: Final = 2**16  # bytes of an error's body that are read


class Exchange(asyncio.Protocol):
    """Fills a job's record, whatever happens, and then calls `ended` once.

    Each job has a connection of its own, as users have. It is closed when the server has said all: `[DONE]` ends the
    answer, but whoever hangs up right then looks like one who does not want it.
    """

    def __init__(
        self,
        record: JobRecord,
        request: bytes,
        *,
        origin: float,
        exact: bool,
        ended: Callable[[Exchange], None],
        connected: set[Exchange],
    ) -> None:
        """`origin`: of the record's times, on the loop's clock. `exact`: fewer tokens than asked for are an error.

        `connected` holds this exchange while it has a connection, which may outlast its job.
        """
        self.record = record
        self._request = request
        self._origin = origin
        self._exact = exact
        self._ended = ended
        self._connected = connected
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._opening: asyncio.Task[None] | None = None
        self._response = Response()
        self._events = EventStream()
        self._message = b""  # the body of an error

    def start(self, address: Address) -> None:
        self._opening = self._loop.create_task(self._open(address))

    def give_up(self, kind: str, detail: str = "") -> None:
        """End the job, if it has not ended, and hang up."""
        self._end(kind, detail)
        if self._opening is not None:
            self._opening.cancel()
        self.hang_up()

    def hang_up(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _open(self, address: Address) -> None:
        self.record.started = self._now()
        try:
            await self._loop.create_connection(
                lambda: self,
                address.host,
                address.port,
                ssl=address.context,
                server_hostname=address.name if address.context is not None else None,
            )
        except OSError as error:
            self._end(_kind(error), str(error))
        except ValueError as error:  # a TLS name that is none
            self._end("TLS failed", str(error))

    # --- what asyncio calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if self.record.end is not None:  # given up just now
            transport.abort()
            return
        self._transport = transport
        self._connected.add(self)
        self.record.sent = self._now()
        transport.write(self._request)
        self._request = b""

    def data_received(self, data: bytes) -> None:
        now = self._now()
        try:
            body = self._response.feed(data)
            if self.record.end is None:
                self._read(body, now)
        except ProtocolError as error:
            self._end("malformed answer", str(error))
        except ErrorEvent as error:
            self._end("error in the stream", str(error))
        if self._response.complete:
            self._last_words()
        if self._transport is not None and (self._response.complete or self.record.error is not None):
            self._transport.close()

    def eof_received(self) -> None:
        self._response.end()
        self._last_words()

    def connection_lost(self, exception: Exception | None) -> None:
        self._connected.discard(self)
        if exception is not None:
            self._end(_kind(exception), str(exception))
        self._last_words()

    # --- what an answer says ---

    def _read(self, body: bytes, now: float) -> None:
        record, status = self.record, self._response.status
        if not status:
            return
        record.status = status
        if status != 200:
            self._message += body[: _MAX_MESSAGE - len(self._message)]
            return
        for event in self._events.feed(body):
            if event == DONE:
                self._finish()
                return
            note(record, event, now)

    def _last_words(self) -> None:
        """Nothing follows. The job ends, if it has not ended already."""
        record = self.record
        if record.end is not None:
            return
        if record.status is None:
            self._end("no answer", "the server closed the connection")
        elif record.status != 200:
            self._end(str(record.status), message_of(self._message))
        elif "text/event-stream" not in self._response.headers.get("content-type", ""):
            self._end("no stream", f"content type {self._response.headers.get('content-type', '')[:60]!r}")
        elif record.finish_reason is None or not self._response.complete:
            self._end("cut off", f"the answer ends after {record.tokens} tokens, without an end")
        else:
            self._finish()  # some servers leave [DONE] out

    def _finish(self) -> None:
        record = self.record
        if not record.times or record.tokens < 1:
            self._end("no token", "the answer is empty")
        elif self._exact and record.usage_tokens is not None and record.usage_tokens < record.asked_tokens:
            self._end(
                "too short",
                f"{record.usage_tokens} of {record.asked_tokens} tokens: the server does not heed ignore_eos, or its "
                "context is too short",
            )
        else:
            self._end(None)

    def _end(self, error: str | None, detail: str = "") -> None:
        record = self.record
        if record.end is not None:
            return
        record.end = self._now()
        record.error, record.detail = error, " ".join(detail.split())
        self._ended(self)

    def _now(self) -> float:
        return self._loop.time() - self._origin


def _kind(error: Exception) -> str:
    """In a few words: jobs that fail alike are counted together."""
    if isinstance(error, ssl.SSLError):
        return "TLS failed"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)):
        return "connection reset"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many open files here"
    if isinstance(error, TimeoutError):
        return "connecting timed out"
    return "connection failed"
