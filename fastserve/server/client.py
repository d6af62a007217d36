"""EngineClient: the engine's process as the API server sees it. It may die at any time; open jobs do not notice.

HTTP layer ── open, close, list_jobs ──▶ EngineClient ─┬─ Ledger       what is owed
                                                       └─ Supervisor   the process, and the socket to it
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ..ipc import FromEngine, Jobs, JobStatus, ListJobs, Ready, Refused, Status, Step
from ..tokenizer import Tokenizer
from ..types import FinishReason, SamplingParams
from .engine_api import EngineUnavailable
from .jobs import OpenJob
from .ledger import Ledger
from .supervisor import Health, Send, Supervisor
from .totals import Totals


def worker_command(options: Mapping[str, Any]) -> list[str]:
    """How the engine is started: `options` are those of LLM, ready for JSON."""
    return [sys.executable, "-m", "fastserve.worker", "--options", json.dumps(dict(options))]


class EngineClient:
    """Every method and attribute belongs to the event loop that ran `start`.

    `command`      what starts the engine; `--address ADDRESS` is added
    `tokenizer`    turns output into text; None: `text` stays empty, and stop strings are refused
    """

    def __init__(self, command: Sequence[str], tokenizer: Tokenizer | None, *, health: Health | None = None) -> None:
        self._ledger = Ledger(tokenizer)
        self._supervisor = Supervisor(command, health or Health(), self)
        self._totals = Totals()
        self._send: Send | None = None
        self._closed = "the engine has not been started"  # why nothing can be opened; "" while it can
        self._pids: list[int] = []
        self._queries = itertools.count(1)
        self._query = 0  # the one that `_listing` waits for
        self._listing: asyncio.Future[list[tuple[OpenJob, JobStatus]]] | None = None
        self.info: dict[str, Any] = {}  # as LLM.info
        self.max_model_len = 0
        self.vocab_size = 0
        self.status: Status | None = None  # the engine's last; None while there is no engine
        self.failure: str | None = None  # why the engine does not come up, after too many failed starts

    @property
    def open_jobs(self) -> Mapping[int, OpenJob]:
        """By key; jobs that have ended or were closed are not in it."""
        return MappingProxyType(self._ledger.open_jobs)

    @property
    def ready(self) -> bool:
        """An engine is up. While none is, jobs may be opened all the same: they wait for the next."""
        return self._send is not None

    @property
    def healthy(self) -> bool:
        """False after too many failed starts in a row, until one succeeds. `failure` says why."""
        return self.failure is None

    @property
    def pids(self) -> list[int]:
        """Of the engine's processes; of the one that was started while it loads; none while there is none."""
        if self._send is not None:
            return list(self._pids)
        return [] if self._supervisor.pid is None else [self._supervisor.pid]

    @property
    def restarts(self) -> int:
        return self._supervisor.restarts

    @property
    def counters(self) -> dict[str, float]:
        """What all engines did, by the names that Status has for it."""
        return self._totals.values()

    async def start(self) -> None:
        """Return when the engine is up, which may take minutes. Raises EngineStartError, whose message is one line."""
        await self._supervisor.start()

    async def stop(self) -> None:
        """Stop the engine. Jobs still open end with finish_reason "abort". Idempotent."""
        self._closed = "the server is stopping"
        self._ledger.end_all(FinishReason.ABORT, self._closed)
        await self._supervisor.stop()
        self._ledger.down()
        self._forget_engine()

    def hasten(self) -> None:
        """Let `stop`, under way or to come, give the engine no time to end by itself."""
        self._supervisor.hasten()

    def open(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        seed: int,
        priority: int = 0,
        user: str | None = None,
        arrival: float | None = None,
    ) -> OpenJob:
        """Hand over one prompt for one output (`params.n` is the caller's business). `arrival` is on time.monotonic.

        Raises EngineUnavailable before start, after stop and while there is a `failure`, and InvalidRequest for what
        can be told to no engine. What this one does not take is raised by the job's `news`.
        """
        if self._closed or self.failure is not None:
            raise EngineUnavailable(self._closed or self.failure)
        return self._ledger.open(prompt, params, seed, priority, user, arrival)

    def close(self, job: OpenJob) -> None:
        """Nobody wants the job any more: the engine drops it at its next iteration. Idempotent."""
        self._ledger.close(job)

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
        self.info, self.max_model_len, self.vocab_size = ready.info, ready.max_model_len, ready.vocab_size
        self._pids = ready.pids
        if self._supervisor.restarts == 0:
            self._supervisor.fixed_options = _fixed(ready.info)
        self._send, self.failure, self._closed = send, None, ""
        self._ledger.up(send)

    def engine_said(self, message: FromEngine) -> None:
        if isinstance(message, Step):
            self._ledger.step(message)
        elif isinstance(message, Status):
            self.status = message
            self._totals.said(message)
        elif isinstance(message, Refused):
            self._ledger.refused(message)
        elif isinstance(message, Jobs) and message.query == self._query:
            self._answer(self._named(message.jobs))

    def engine_down(self, crashed: bool) -> None:
        self._forget_engine()
        self._ledger.down(crashed=crashed)

    def engine_fails(self, reason: str) -> None:
        self.failure = reason
        self._ledger.end_all(FinishReason.ERROR, reason)

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


def _fixed(info: Mapping[str, Any]) -> dict[str, Any]:
    """Options that every later engine has from the first: how much KV fits decides where a job without max_tokens ends.

    Left to itself, the pool's size follows the memory that is free at the moment.
    """
    return {"kv_cache_memory": info["kv_cache_bytes"]} if "kv_cache_bytes" in info else {}
