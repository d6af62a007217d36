"""What operators and programs ask of the server itself: models, health."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from ..version import __version__
from .engine_api import EngineState
from .openapi import errors
from .schemas import Health, ModelCard, ModelList
from .service import Service

_UNHEALTHY: dict[str, Any] = {"model": Health, "description": "Work is refused, and `status` says why."}


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    def card(name: str) -> dict[str, Any]:
        names = service.settings.names
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "fastserve",
            "root": service.settings.model,
            "parent": None if name == names[0] else names[0],
            "max_model_len": service.engine.max_model_len,
        }

    @routes.get("/v1/models", responses={200: {"model": ModelList}, **errors(401)})
    async def list_models() -> dict[str, Any]:
        """The model, under each name that it is served by."""
        return {"object": "list", "data": [card(name) for name in service.settings.names]}

    @routes.get("/v1/models/{model:path}", responses={200: {"model": ModelCard}, **errors(401, 404)})
    async def retrieve_model(model: str) -> dict[str, Any]:
        """The model, by one of its names."""
        return card(service.check_model(model))

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health", responses={200: {"model": Health}, 503: _UNHEALTHY})
    async def health() -> JSONResponse:
        """200 while work is taken in, even if the engine is being restarted: nothing is lost by that."""
        engine = service.engine
        status = service.state
        body: dict[str, Any] = {
            "status": status,
            "version": __version__,
            "engine": {"pids": list(engine.pids), "restarts": engine.restarts},
            "engines": [_engine(each) for each in engine.engines],
            "open_jobs": service.admission.open_jobs,
        }
        if engine.failure is not None:
            body["error"] = engine.failure
        return JSONResponse(body, 200 if status in ("ok", "restarting") else 503)

    return routes


def _engine(engine: EngineState) -> dict[str, Any]:
    told = {
        "status": "unhealthy" if engine.failure is not None else "ok" if engine.ready else "restarting",
        "pids": list(engine.pids),
        "restarts": engine.restarts,
        "open_jobs": engine.jobs,
    }
    return told if engine.failure is None else {**told, "error": engine.failure}
