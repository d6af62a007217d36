"""A server in a process of its own, over a toy engine: `serve_toy.py SHUTDOWN_TIMEOUT [hung]`. Prints its URL.

A hung engine does not stop unless it is hastened. Every job gets one token when it is opened, and the rest after
POST /release.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from fastapi import APIRouter
from toy_engine import ToyEngine, ToyJob

from fastserve.server.app import create_app
from fastserve.server.run import bind, serve
from fastserve.server.service import Service
from fastserve.server.settings import ServerSettings


class Engine(ToyEngine):
    hung: asyncio.Event | None = None

    async def stop(self) -> None:
        if self.hung is not None:
            print("stopping", flush=True)
            await self.hung.wait()
        await super().stop()

    def hasten(self) -> None:
        if self.hung is not None:
            self.hung.set()

    def open(self, *arguments: Any, **options: Any) -> ToyJob:
        job = super().open(*arguments, **options)
        job.grow()
        return job


async def main() -> int:
    engine = Engine(held=True)
    if sys.argv[2:] == ["hung"]:
        engine.hung = asyncio.Event()
    settings = ServerSettings(model="toy", port=0, shutdown_timeout=float(sys.argv[1]))
    service = Service(settings, engine, engine.tokenizer)

    def release(service: Service) -> APIRouter:
        router = APIRouter()

        @router.post("/release")
        async def release_jobs() -> None:
            engine.release()

        return router

    app = create_app(service, [release])
    return await serve(service, app, bind(settings), on_ready=lambda url: print(url, flush=True))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
