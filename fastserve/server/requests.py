"""What the endpoints read of a request beside its body, and what they tell OpenAPI."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic import BaseModel

from .answers import generation_timeout
from .errors import ApiError
from .protocol import GenerationRequest
from .requestlog import RequestLog


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """What every error looks like."""

    error: ErrorDetail


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Which statuses an endpoint answers with beside 200."""
    return {status: {"model": ErrorBody} for status in statuses}


_SUCCESS = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}}
GENERATION: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer; with stream: true, as server-sent events while it grows.", "content": _SUCCESS},
    **errors(400, 401, 404, 408, 413, 415, 429, 500, 503, 504),
}


async def require_json(request: Request) -> None:
    """Raises ApiError, 415, for a body that does not say it is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"Content-Type must be application/json, got {kind!r}", code="unsupported_media_type")


def user_of(log: RequestLog, body: GenerationRequest) -> str:
    """Who shares the queue: the key's `user`, so that nobody has more than one share by the names it gives itself."""
    user = body.user or ""
    return user if log.key is None else f"key {log.key}/{user}"


def timeout_of(request: Request, body: GenerationRequest) -> float | None:
    return generation_timeout(body.timeout, request.headers.get("x-request-timeout"))
