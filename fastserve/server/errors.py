"""Everything that can go wrong as OpenAI's clients expect it: a status, and {error: {message, type, param, code}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ..types import InvalidRequest
from .engine_api import EngineUnavailable

_MAX_MESSAGE = 500  # characters; what a client sent may be in it, however long that was
_UNREADABLE = "There was an error parsing the body"  # FastAPI's, for what is not even wrong JSON

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error. `param` is the field at fault, `code` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(_shortened(message))
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def as_dict(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(json.dumps(self.as_dict()), self.status, headers=self.headers, media_type="application/json")


def _shortened(message: str) -> str:
    half = _MAX_MESSAGE // 2
    return message if len(message) <= _MAX_MESSAGE else f"{message[:half]} … {message[-half:]}"


def refused(field: str, message: str) -> ApiError:
    """A 400 whose one line names the field."""
    return ApiError(400, f"{field}: {message}", param=field, code="invalid_value")


def unsupported(field: str, message: str = "is not supported; leave it out") -> ApiError:
    return ApiError(400, f"{field}: {message}", param=field, code="unsupported_parameter")


def as_api_error(error: Exception) -> ApiError | None:
    """Of what the layers below raise; None for what nobody expects."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequest):
        return ApiError(400, str(error), param=error.field, code="invalid_value")
    if isinstance(error, EngineUnavailable):
        return ApiError(503, str(error), code="engine_unavailable", headers={"Retry-After": "5"})
    if isinstance(error, RequestValidationError):
        return _invalid_body(error)
    if isinstance(error, HTTPException):
        return _http_error(error)
    return None


def _invalid_body(error: RequestValidationError) -> ApiError:
    """The first complaint. FastAPI's status would be 422; OpenAI's is 400."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        reason = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    if not place:
        return ApiError(400, "the body must be a JSON object", code="invalid_json")
    message = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "missing":
        return ApiError(400, f"{place[0]}: is missing", param=place[0], code="missing_required_parameter")
    return ApiError(400, f"{'.'.join(place)}: {message}", param=place[0], code="invalid_type")


def _http_error(error: HTTPException) -> ApiError:
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = "there is nothing at this path; /openapi.json lists what there is", "not_found"
    elif error.status_code == 405:
        message, code = "this path does not take this method", "method_not_allowed"
    elif error.status_code == 400 and message == _UNREADABLE:
        message, code = f"the body is not valid JSON: {_why(error.__cause__)}", "invalid_json"
    elif message == HTTPStatus(error.status_code).phrase:
        message = message.lower()
    return ApiError(error.status_code, message, code=code, headers=error.headers)


def _why(cause: BaseException | None) -> str:
    """In a client's words: what Python's parser raises beside JSONDecodeError."""
    if isinstance(cause, UnicodeDecodeError):
        return f"it is not {cause.encoding.upper()} at byte {cause.start}"
    if isinstance(cause, RecursionError):
        return "it is nested too deeply"
    return "it holds a number of too many digits" if isinstance(cause, ValueError) else "it cannot be read"


async def _answer(request: Request, error: Exception) -> Response:
    known = as_api_error(error)
    if known is None:
        raise error
    return known.response()


def add_error_handlers(app: FastAPI) -> None:
    for kind in (ApiError, InvalidRequest, EngineUnavailable, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
