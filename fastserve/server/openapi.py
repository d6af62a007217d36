"""/openapi.json: what FastAPI finds out by itself, with what holds for all endpoints added."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel

from ..origin import MAX_LENGTH
from ..version import __version__
from .auth import OPEN_PATHS
from .schemas import ChatCompletionChunk, CompletionChunk, ErrorBody

_DESCRIPTION = """\
OpenAI's API for one model, with preemptive scheduling behind it. Answers say more than OpenAI's: `usage.fastserve` is
where the time went, `stop_reason` what ended an answer. A field that is not supported, and would change an answer, is a
400 that names it; fields that are null or have their default are accepted, and unknown ones are ignored."""

_REF = "#/components/schemas/{model}"
_REQUEST_ID = {"description": "The request's, or one that was drawn for it.", "schema": {"type": "string"}}
_HEADERS = {
    "401": {"WWW-Authenticate": {"description": "Bearer", "schema": {"type": "string"}}},
    "429": {
        "Retry-After": {
            "description": "Seconds until there will be room, by what the engine has to do.",
            "schema": {"type": "integer", "minimum": 1},
        }
    },
    "503": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}},
}


class DocumentedApp(FastAPI):
    """`keys`: whether clients have to send one."""

    def __init__(self, *, keys: bool) -> None:
        super().__init__(
            title="FastServe",
            version=__version__,
            description=_DESCRIPTION,
            docs_url=None,
            redoc_url=None,
            generate_unique_id_function=_operation_id,
        )
        self._keys = keys

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            _complete(super().openapi(), self._keys)
        return super().openapi()


def _operation_id(route: APIRoute) -> str:
    return route.name


def _complete(document: dict[str, Any], keys: bool) -> None:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # what is wrong with a body is a 400 here
        schemas.pop(name, None)
    for model in (CompletionChunk, ChatCompletionChunk):  # FastAPI sees no events
        schema = model.model_json_schema(ref_template=_REF)
        schemas |= {**schema.pop("$defs"), model.__name__: schema}
    if keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            responses.pop("422", None)
            if keys and path not in OPEN_PATHS:
                operation["security"] = [{"key": []}]
            else:
                responses.pop("401", None)
            for status, response in responses.items():
                response["headers"] = {"X-Request-Id": _REQUEST_ID, **_HEADERS.get(status, {})}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Which statuses an endpoint answers with beside 200."""
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}


_ERRORS = {
    400: "A field is wrong, or not supported.",
    401: "The API key is missing or wrong.",
    404: "There is no such model here.",
    408: "The job would miss its `timeout` even alone, or the body did not come in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The queue is full.",
    500: "The job failed, or the server did.",
    503: "The engine cannot be had, or the server is shutting down.",
    504: "The job missed its `timeout`, and was dropped.",
}


def generation(whole: type[BaseModel], chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Responses of an endpoint that generates: in one piece, or as events."""
    events = [_REF.format(model=model.__name__) for model in (chunk, ErrorBody)]
    said = {"contentMediaType": "application/json", "contentSchema": {"anyOf": [{"$ref": ref} for ref in events]}}
    stream = {  # one event, as OpenAPI 3.2 has it, and FastAPI too
        "itemSchema": {
            "type": "object",
            "properties": {"data": {"type": "string", "anyOf": [said, {"const": "[DONE]"}]}},
            "required": ["data"],
        }
    }
    told = (
        f"The answer. With `stream: true` events: a {chunk.__name__} each time it has grown, then `[DONE]`; "
        "where it breaks off, an ErrorBody and no `[DONE]`."
    )
    return {
        200: {"model": whole, "description": told, "content": {"text/event-stream": stream}},
        **errors(400, 401, 404, 408, 413, 415, 429, 500, 503, 504),
    }


REQUEST_ID: dict[str, Any] = {
    "name": "X-Request-Id",
    "in": "header",
    "required": False,
    "description": "The request's name in logs, in /v1/fastserve/jobs and in the answer's id.",
    "schema": {"type": "string"},
}
TIMEOUT: dict[str, Any] = {
    "name": "X-Request-Timeout",
    "in": "header",
    "required": False,
    "description": "Like the field `timeout`; the shorter counts.",
    "schema": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e9},
}
PROGRAM_ID: dict[str, Any] = {
    "name": "X-Program-Id",
    "in": "header",
    "required": False,
    "description": "Like the field `program_id`, for clients that cannot set it; both have to be the same.",
    "schema": {"type": "string", "maxLength": MAX_LENGTH},
}
