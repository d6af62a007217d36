"""What the endpoints read of a request beside its body."""

from __future__ import annotations

from fastapi import Request

from ..origin import Origin, check_text
from .answers import generation_timeout
from .errors import ApiError, refused
from .protocol import GenerationRequest
from .requestlog import RequestLog
from .tenants import named

_PROGRAM_HEADER = "x-program-id"


async def require_json(request: Request) -> None:
    """Raises ApiError, 415, for a body that does not say it is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"Content-Type must be application/json, got {kind!r}", code="unsupported_media_type")


def origin_of(request: Request, log: RequestLog, body: GenerationRequest) -> Origin:
    """Users are tenants, each within the API key of its request. Raises ApiError for two different ones, of either."""
    if body.user and body.safety_identifier and body.user != body.safety_identifier:
        raise refused("safety_identifier", "must be the same as user, its older name, where both are sent")
    return Origin(
        tenant=named(log.key, body.user or body.safety_identifier or ""),
        program=_program(body.program_id or None, request.headers.getlist(_PROGRAM_HEADER)),
        cache_salt=body.cache_salt or "",
        cache_key=body.prompt_cache_key or None,
    )


def _program(field: str | None, headers: list[str]) -> str | None:
    different = {header for header in headers if header}
    if not different:
        return field
    if len(different) > 1:
        raise refused("X-Program-Id", "must say the same, where the header is sent more than once")
    (header,) = different
    try:
        program = header.encode("latin-1").decode()  # what a header's bytes are, nobody says; ours are UTF-8
        check_text("X-Program-Id", program)
    except UnicodeDecodeError:
        raise ApiError(400, "X-Program-Id: must be UTF-8", code="invalid_value") from None
    if field not in (None, program):
        raise refused("program_id", "must be the same as in the header X-Program-Id, where both are sent")
    return program


def timeout_of(request: Request, body: GenerationRequest) -> float | None:
    return generation_timeout(body.timeout, request.headers.get("x-request-timeout"))
