"""What the endpoints read of a request beside its body."""

from __future__ import annotations

from fastapi import Request

from .admission import named
from .answers import generation_timeout
from .errors import ApiError
from .protocol import GenerationRequest
from .requestlog import RequestLog


async def require_json(request: Request) -> None:
    """Raises ApiError, 415, for a body that does not say it is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"Content-Type must be application/json, got {kind!r}", code="unsupported_media_type")


def user_of(log: RequestLog, body: GenerationRequest) -> str:
    """Who shares the queue."""
    return named(log.key, body.user or "")


def timeout_of(request: Request, body: GenerationRequest) -> float | None:
    return generation_timeout(body.timeout, request.headers.get("x-request-timeout"))
