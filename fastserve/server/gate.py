"""What every request passes, as one layer of raw ASGI: a name, a key, a body of bounded size, a line in the log."""

from __future__ import annotations

import logging
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .auth import ApiKeys
from .errors import ApiError
from .requestlog import RequestLog
from .settings import ServerSettings

_logger = logging.getLogger("fastserve.server")
_MAX_ID = 128


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
            body = await _read_body(headers.get(b"content-length"), receive, self._body_limit)
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


class _Gone(Exception):
    """The client went away before its request was complete."""


def _request_id(given: str | None) -> str:
    """The client's, where it is fit for a header and a log."""
    if given and len(given) <= _MAX_ID and given.isascii() and given.isprintable():
        return given
    return f"req-{secrets.token_hex(12)}"


async def _read_body(length: str | None, receive: Receive, limit: int) -> bytes:
    """Raises ApiError, 413, as soon as it is clear, whatever the client said of the length."""
    if length is not None and length.isdecimal() and int(length[:20]) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise _Gone
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than the {limit} bytes of --max-body-size",
        code="body_too_large",
        headers={"Connection": "close"},  # the rest of it is not worth reading
    )


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
