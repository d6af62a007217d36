"""What every request passes, as one layer of raw ASGI: a name, a key, a body of bounded size, a line in the log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .auth import ApiKeys
from .errors import ApiError
from .requestlog import RequestLog
from .settings import ServerSettings

_logger = logging.getLogger("fastserve.server")
_MAX_ID = 128
_CLOSE = {"Connection": "close"}
_PATIENCE = 30.0  # seconds that any body may take to come, and
_PACE = 64 * 1024  # bytes that come in another second at least
# Of a body that is too large. Its client may read no answer before it has sent all.
_DRAIN_BYTES = 64 * 2**20
_DRAIN_SECONDS = 5.0


class Gate:
    """The outermost layer of ours. An exception that nobody expected becomes a 500 and a traceback in the log."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._keys = ApiKeys(settings.api_key)
        self._body_limit = settings.body_limit
        self._log_format = settings.log_format

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        client = scope.get("client") or ("-",)
        log = RequestLog(_request_id(headers.get(b"x-request-id")), scope["method"], scope["path"], client[0])
        log.attach(scope)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                log.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", log.request_id.encode())]
            await send(message)

        try:
            log.key = self._keys.check(scope["path"], headers.get(b"authorization"))
            body = await self._read(headers, receive)
            await self._app(scope, _replayed(body, receive), named)
        except _Gone:
            log.disconnected = True
        except ApiError as error:
            await error.response()(scope, receive, named)
        except Exception:
            _logger.exception("request %s failed", log.request_id)
            if log.status is not None:
                raise  # the connection has to break: half an answer is out
            await ApiError(500, "internal error; the server's log has more", code="internal_error").response()(
                scope, receive, named
            )
        finally:
            log.write(self._log_format)

    async def _read(self, headers: Mapping[bytes, str], receive: Receive) -> bytes:
        """The body. Raises ApiError, 408 and 413, whatever the client said of the length, and _Gone."""
        limit = self._body_limit
        patience = _PATIENCE + limit / _PACE
        sends = headers.get(b"expect", "").lower() != "100-continue"  # before it is told to, which `receive` does
        if _announced(headers) <= limit:
            try:
                body = await asyncio.wait_for(_read_body(receive, limit), patience)
            except asyncio.TimeoutError:
                message = f"the body did not come within {patience:.0f} s"
                raise ApiError(408, message, code="body_timeout", headers=_CLOSE) from None
            if body is not None:
                return body
            sends = True
        if sends:
            await _drain(receive)
        raise ApiError(
            413,
            f"the body is larger than the {limit} bytes of --max-body-size",
            code="body_too_large",
            headers=_CLOSE,
        )


class _Gone(Exception):
    """The client went away before its request was complete."""


def _request_id(given: str | None) -> str:
    """The client's, where it is fit for a header and a log."""
    if given and len(given) <= _MAX_ID and given.isascii() and given.isprintable():
        return given
    return f"req-{secrets.token_hex(12)}"


def _announced(headers: Mapping[bytes, str]) -> int:
    length = headers.get(b"content-length", "")
    return int(length[:20]) if length.isascii() and length.isdecimal() else 0


async def _read_body(receive: Receive, limit: int) -> bytes | None:
    """None as soon as it has more bytes than it may. Raises _Gone."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in _chunks(receive):
        size += len(chunk)
        if size > limit:
            return None
        chunks.append(chunk)
    return b"".join(chunks)


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    """What is left of a body. Raises _Gone."""
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise _Gone
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def _drain(receive: Receive) -> None:
    """Drop what is left of a body, unless that is too much: who closes on unread bytes takes its own answer back."""

    async def drop() -> None:
        size = 0
        async for chunk in _chunks(receive):
            size += len(chunk)
            if size > _DRAIN_BYTES:
                return

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(drop(), _DRAIN_SECONDS)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then what else comes: the disconnect."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
