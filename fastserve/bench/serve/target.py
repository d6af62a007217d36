"""Servers to send jobs to: their address, resolved once, and the model they serve."""

from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NoReturn
from urllib.parse import urlsplit

import msgspec

from ...types import InvalidRequest
from .answer import message_of
from .http import ProtocolError, Response

Endpoint = Literal["completions", "chat"]
PATHS: Final[dict[str, str]] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_PATIENCE: Final = 10.0  # seconds for /v1/models
_MAX_MODELS: Final = 2**24  # bytes of its answer


class ServerError(RuntimeError):
    """A server that cannot be measured; one line."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to connect to. `host` is an IP address, so that no job waits for a name."""

    host: str
    port: int
    name: str  # as in the URL
    context: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A server that answered, and what to ask it for."""

    name: str
    base_url: str
    model: str
    address: Address
    prefix: str  # of all paths
    owner: str = ""  # of the model, as the server says: fastserve, vllm, llamacpp
    api_key: str | None = field(default=None, repr=False)

    def request(self, endpoint: str, body: bytes) -> bytes:
        """The bytes of a POST."""
        return _head("POST", self.address, self.prefix + PATHS[endpoint], self.api_key, len(body)) + body


def parse_target(text: str) -> tuple[str, str]:
    """NAME=URL. Raises InvalidRequest."""
    name, equals, url = text.partition("=")
    if not equals or not name or "://" in name:
        raise InvalidRequest("target", f"must be written NAME=URL, as in ours=http://127.0.0.1:8000, got {text!r}")
    _parse("target", url)
    return name, url


async def connect(name: str, url: str, model: str | None, api_key: str | None, option: str = "base_url") -> Target:
    """Find the server's address, and its model unless one is named.

    Raises InvalidRequest for what is no URL, and ServerError for a server that does not answer, or has no model.
    """
    scheme, host, port, prefix = _parse(option, url)
    context = ssl.create_default_context() if scheme == "https" else None
    reason = "no such host"
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ServerError(f"{url}: {error.strerror or error}") from None
    for *_, place in found:  # localhost may be two of them, with a server on one
        address = Address(str(place[0]), port, host, context)
        try:
            answer = await asyncio.wait_for(_get(address, prefix + "/v1/models", api_key), _PATIENCE)
        except asyncio.TimeoutError:
            reason = f"no answer within {_PATIENCE:g} s"
        except (OSError, ValueError) as error:
            reason = str(error)
        except ProtocolError as error:
            raise ServerError(f"{url}: /v1/models sends {error}") from None
        else:
            own, owner = _first_model(*answer)
            return Target(name, url, model or own or _no_model(url, *answer), address, prefix, owner, api_key)
    raise ServerError(f"{url}: {reason}; is the server running?")


def _parse(option: str, url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and the path before /v1."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidRequest(option, f"must be a URL, got {url!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequest(option, f"must be a URL as http://127.0.0.1:8000, got {url!r}")
    if parts.username is not None or parts.query or parts.fragment:
        raise InvalidRequest(option, "must have no user, query or fragment; keys go into --api-key")
    if any(character <= " " or character > "~" for character in parts.path + parts.hostname):
        raise InvalidRequest(option, f"must be of printable ASCII, got {url!r}")
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), prefix


def _first_model(status: int, body: bytes) -> tuple[str, str]:
    """The model that /v1/models lists first, and whose it is; nothing where there is none."""
    if status != 200:
        return "", ""
    try:
        first: Any = msgspec.json.decode(body)["data"][0]
        return str(first["id"]), str(first.get("owned_by", ""))
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        return "", ""


def _no_model(url: str, status: int, body: bytes) -> NoReturn:
    """Raises ServerError."""
    if status != 200:
        raise ServerError(f"{url}: /v1/models answers {status}: {message_of(body)}")
    raise ServerError(f"{url}: /v1/models lists no model; name one with --model")


async def _get(address: Address, path: str, api_key: str | None) -> tuple[int, bytes]:
    """Status and body. Raises OSError and ProtocolError."""
    reader, writer = await asyncio.open_connection(
        address.host,
        address.port,
        ssl=address.context,
        server_hostname=address.name if address.context is not None else None,
    )
    try:
        writer.write(_head("GET", address, path, api_key, 0))
        response, body = Response(), b""
        while not response.complete and len(body) < _MAX_MODELS:
            data = await reader.read(2**16)
            body += response.feed(data)
            if not data and not response.end():
                raise ConnectionResetError("the server closed the connection without an answer")
        return response.status, body
    finally:
        writer.close()


def _head(method: str, address: Address, path: str, api_key: str | None, length: int) -> bytes:
    host = f"[{address.name}]" if ":" in address.name else address.name
    default = 443 if address.context is not None else 80
    lines = [
        f"{method} {path} HTTP/1.1",
        f"Host: {host}" if address.port == default else f"Host: {host}:{address.port}",
        "Accept: text/event-stream, application/json",
        "User-Agent: fastserve-bench",
        "Connection: close",
    ]
    if method == "POST":
        lines += ["Content-Type: application/json", f"Content-Length: {length}"]
    if api_key is not None:
        lines.append(f"Authorization: Bearer {api_key}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
