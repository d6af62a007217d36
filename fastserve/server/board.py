"""What people and their tools look at: the live queue, Prometheus' page, and the dashboard."""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from ..origin import key_of
from .engine_api import EngineUnavailable, OpenJob
from .openapi import errors
from .requestlog import RequestLog
from .schemas import LiveJobs
from .service import Service
from .tenants import named

_ENGINE_ANSWERS = 5.0  # seconds
_TEXT = {"schema": {"type": "string"}}


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    page = files(__package__).joinpath("dashboard", "index.html").read_text(encoding="utf-8")

    @routes.get("/", include_in_schema=False)
    async def dashboard() -> HTMLResponse:
        return HTMLResponse(page)

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": _TEXT}}})
    async def metrics() -> Response:
        """For Prometheus: vLLM's names where it has them, `fastserve:` for the rest."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/v1/fastserve/jobs", responses={200: {"model": LiveJobs}, **errors(401, 503)})
    async def list_jobs(request: Request) -> dict[str, Any]:
        """The jobs that the engine has, the next to run first; levels, memory and recent figures beside them.

        Where there are API keys, those that were asked for with another have neither `request_id` nor `program_id`, and
        a hash for the user, as in /metrics: who has a key may see how busy the others are, not what they call things.

        Where there are several engines: the next of each, then those after them, and so on; figures are of all.
        Seconds; tokens a second in `throughput`; `finished` has percentiles of the last five minutes, and `regret` the
        mean completion time of those jobs over what preemptive SRPT would have made of them, null where none ended;
        `tenants` their shares of the service in the last minutes, those that are too small to be named as null.
        """
        try:
            jobs = await asyncio.wait_for(service.engine.list_jobs(), _ENGINE_ANSWERS)
        except asyncio.TimeoutError:
            raise EngineUnavailable(f"the engine has not answered for {_ENGINE_ANSWERS:g} s") from None
        several = len(service.engine.engines) > 1
        key = RequestLog.of(request.scope).key
        data = [
            {
                **msgspec.structs.asdict(status),
                "key": job.key,
                **_whose(service, job, key),
                **({"engine": job.engine} if several else {}),
            }
            for job, status in jobs
        ]
        return {"object": "list", "data": data, "server": _server(service, key)}

    return routes


def _whose(service: Service, job: OpenJob, key: int | None) -> dict[str, Any]:
    """As far as it is told to who asks with this key."""
    tenant = job.origin.tenant
    if not _may_read(tenant, key):
        return {"request_id": None, "user": service.engine.tenants.label(tenant), "program_id": None}
    return {
        "request_id": service.request_ids.get(job.key),
        "user": tenant or None,
        "program_id": job.origin.program,
    }


def _may_read(tenant: str, key: int | None) -> bool:
    """Whether who asks with this key may see a tenant's name; where there are no keys, anybody may."""
    return key is None or key_of(tenant) == key_of(named(key, ""))


def _server(service: Service, key: int | None) -> dict[str, Any]:
    engine, status = service.engine, service.engine.status
    info, counters = engine.info, engine.counters
    told: dict[str, Any] = {
        "status": service.state,
        "model": service.settings.names[0],
        "policy": info.get("policy"),
        "device": info.get("device"),
        "max_num_seqs": info.get("max_num_seqs"),
        "restarts": engine.restarts,
        "open_jobs": service.admission.open_jobs,
        "finished": service.recent.finished(),
        "throughput": service.recent.throughput(status),
        "regret": service.regret(),
        "preemptions": counters["preemptions"],
        "swapped": {"out": counters["offloaded_bytes"], "in": counters["uploaded_bytes"]},
        "prefix_cache": {
            "queries": counters["prefix_queries"],
            "hits": counters["prefix_hits"],
            "evicted_blocks": counters["evicted_blocks"],
        },
        "tenants": _tenants(service, key),
    }
    if engine.failure is not None:
        told["error"] = engine.failure
    if len(engine.engines) > 1:
        told["engines"] = [{"ready": each.ready, "open_jobs": each.jobs} for each in engine.engines]
    if status is not None:
        told |= {
            "levels": [msgspec.structs.asdict(level) for level in status.levels],
            "running": status.running,
            "backlog": status.backlog,
            "kv": {
                "device": {
                    "blocks": status.device_blocks,
                    "used": status.device_blocks_used,
                    "cached": status.device_blocks_cached,
                },
                "host": {
                    "blocks": status.host_blocks,
                    "used": status.host_blocks_used,
                    "cached": status.host_blocks_cached,
                },
            },
            "programs": status.programs,
        }
    return told


def _tenants(service: Service, key: int | None) -> list[dict[str, Any]]:
    """Who has had most of late, and how many jobs each has open."""
    open_jobs, tenants = service.admission.users, service.engine.tenants
    told: list[dict[str, Any]] = []
    for each in tenants.shares():
        name = each["tenant"]
        if name is None:
            told.append(each)
            continue
        label = name if _may_read(name, key) else tenants.label(name)
        told.append({**each, "tenant": label, "open_jobs": open_jobs.get(name, 0)})
    return told
