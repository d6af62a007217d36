"""The HTTP application put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from ..version import __version__
from . import board, chat, completions, operations, tokens
from .errors import add_error_handlers
from .gate import Gate
from .service import Service

RouterOf = Callable[[Service], APIRouter]


def create_app(service: Service, more: Sequence[RouterOf] = ()) -> FastAPI:
    """All endpoints over one service. `more` makes further routers, as tests have them."""
    app = _App(title="FastServe", version=__version__, docs_url=None, redoc_url=None)
    for make in (completions.router, chat.router, tokens.router, operations.router, board.router, *more):
        app.include_router(make(service))
    add_error_handlers(app)
    app.add_middleware(Gate, settings=service.settings)
    if service.settings.cors_origin:  # around the gate, so that a page can read errors, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Without FastAPI's 422s: what is wrong with a body is a 400 here."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
        return super().openapi()
