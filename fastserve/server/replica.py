"""One of several engines that serve the same model: its process, and what it says of itself.

Supervisor ── engine_up, engine_said, engine_down, engine_fails ──▶ Replica ──▶ Router, what concerns jobs
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ..ipc import FromEngine, Jobs, JobStatus, ListJobs, Ready, Refused, Status, Step
from .jobs import OpenJob
from .router import Router
from .supervisor import Health, Send, Supervisor
from .tenants import TenantService
from .totals import Totals


class Replica:
    """The engine that the router calls `number`. Attributes are for everybody to read."""

    def __init__(
        self, number: int, command: Sequence[str], health: Health, router: Router, tenants: TenantService
    ) -> None:
        self._number = number
        self._router = router
        self._ledger = router.ledgers[number]
        several = len(router.ledgers) > 1
        self.supervisor = Supervisor(command, health, self, f"engine {number}: " if several else "")
        self._totals = Totals()
        self._tenants = tenants
        self._send: Send | None = None
        self._pids: list[int] = []
        self._queries = itertools.count(1)
        self._query = 0  # the one that `_listing` waits for
        self._listing: asyncio.Future[list[tuple[OpenJob, JobStatus]]] | None = None
        self.greeting: Ready | None = None  # what the latest engine said at its start
        self.status: Status | None = None  # the engine's last; None while there is no engine

    @property
    def info(self) -> dict[str, Any]:
        """As LLM.info; empty until an engine has been up."""
        return {} if self.greeting is None else self.greeting.info

    @property
    def ready(self) -> bool:
        """The engine is up."""
        return self._send is not None

    @property
    def pids(self) -> list[int]:
        """Of the engine's processes; of the one that was started while it loads; none while there is none."""
        if self._send is not None:
            return list(self._pids)
        return [] if self.supervisor.pid is None else [self.supervisor.pid]

    @property
    def restarts(self) -> int:
        return self.supervisor.restarts

    @property
    def failure(self) -> str | None:
        """Why the engine does not start, after it has failed to several times."""
        return self._router.failures[self._number]

    @property
    def jobs(self) -> int:
        """Open jobs that are this engine's."""
        return len(self._ledger.jobs)

    @property
    def counters(self) -> dict[str, float]:
        """What this engine and those before it did, by the names that Status has for it."""
        return self._totals.values()

    async def start(self, fixed_options: Mapping[str, Any]) -> None:
        """Return when the engine is up. Raises EngineStartError."""
        self.supervisor.fixed_options = dict(fixed_options)
        self._router.loads[self._number].went()
        await self.supervisor.start()

    async def stop(self) -> None:
        """Idempotent."""
        await self.supervisor.stop()
        self._ledger.engine_down()
        self._forget_engine()

    async def list_jobs(self) -> list[tuple[OpenJob, JobStatus]]:
        """What the engine holds, the next to run first; nothing while there is no engine."""
        if self._send is None:
            return []
        if self._listing is None:  # who asks while another does gets the same answer
            self._listing = asyncio.get_running_loop().create_future()
            self._query = next(self._queries)
            self._send(ListJobs(self._query))
        return list(await asyncio.shield(self._listing))

    # --- Listener ----------------------------------------------------------------------------------------------------

    def engine_up(self, ready: Ready, send: Send) -> None:
        self.greeting, self._pids, self._send = ready, ready.pids, send
        if not self.supervisor.fixed_options:
            self.supervisor.fixed_options = fixed_options(ready.info)
        self._router.engine_up(self._number, ready, send)

    def engine_said(self, message: FromEngine) -> None:
        if isinstance(message, Jobs):
            if message.query == self._query:
                self._answer(self._named(message.jobs))
        elif isinstance(message, (Step, Status, Refused)):
            if isinstance(message, Status):
                self.status = message
                self._totals.said(message)
                self._tenants.said(message.tenants)
            self._router.engine_said(self._number, message)

    def engine_down(self, crashed: bool) -> None:
        self._forget_engine()
        self._router.engine_down(self._number, crashed=crashed)

    def engine_fails(self, reason: str) -> None:
        self._router.engine_fails(self._number, reason)

    def _forget_engine(self) -> None:
        self._send, self.status, self._pids = None, None, []
        self._totals.lost()
        self._answer([])

    def _named(self, statuses: Sequence[JobStatus]) -> list[tuple[OpenJob, JobStatus]]:
        """The engine calls a job by a ticket, everybody else by its key."""
        named = []
        for status in statuses:
            job = self._ledger.job_of(status.key)
            if job is not None:
                status.key = job.key
                named.append((job, status))
        return named

    def _answer(self, jobs: list[tuple[OpenJob, JobStatus]]) -> None:
        if self._listing is not None:
            self._listing.set_result(jobs)
            self._listing = None


def fixed_options(info: Mapping[str, Any]) -> dict[str, Any]:
    """Options that every other engine has from the first: how much KV fits decides where a job without max_tokens ends.

    Left to itself, the pool's size follows the memory that is free at the moment, and how layers are cut into stages.
    """
    return {name: info[name] for name in ("kv_cache_memory", "stages") if name in info}
