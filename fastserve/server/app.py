"""The HTTP application put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from . import board, chat, completions, operations, tokens
from .errors import add_error_handlers
from .gate import Gate
from .openapi import DocumentedApp
from .service import Service

RouterOf = Callable[[Service], APIRouter]


def create_app(service: Service, more: Sequence[RouterOf] = ()) -> FastAPI:
    """All endpoints over one service. `more` makes further routers, as tests have them."""
    app = DocumentedApp(keys=bool(service.settings.api_key))
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
