"""EngineClient: engines in processes of their own. Any of them may die at any time; open jobs do not notice.

HTTP layer ── open, close, list_jobs ──▶ EngineClient ─┬─ Router ── Ledger   which engine owes what
                                                       └─ Replica ── Supervisor   a process, and the socket to it
"""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from types import MappingProxyType
from typing import Any, Final

from ..distributed import Grid
from ..engine_options import EngineOptions, worker_command
from ..ipc import JobStatus, Status
from ..origin import NOBODY, Origin
from ..tokenizer import Tokenizer
from ..types import FinishReason, InvalidRequest, SamplingParams
from .engine_api import EngineUnavailable
from .jobs import OpenJob
from .replica import Replica, fixed_options
from .router import Router
from .supervisor import Health
from .tenants import TenantService
from .totals import COUNTERS, together


def engine_command(options: Mapping[str, Any], engines: int = 1, launcher: str | None = None) -> list[str]:
    """How one of so many engines of a host is started: `options` are those of LLM, ready for JSON.

    What of them is left open is its part of the host: of the cores, and of the memory. `launcher` starts the ranks of
    an engine, given -n, their number and what each shall run. Raises InvalidRequest for a launcher that is no command.
    """
    said = EngineOptions.from_json(json.dumps({**options, "host_share": engines}))
    if launcher is None:
        return worker_command(said)
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise InvalidRequest("launcher", f"must be a command such as 'mpiexec -f hosts': {error}") from None
    ranks = Grid(said.tensor_parallel_size, said.pipeline_parallel_size).size
    if not words or shutil.which(words[0]) is None:
        raise InvalidRequest("launcher", f"must be a command such as 'mpiexec -f hosts', and there is no {launcher!r}")
    if ranks == 1:
        raise InvalidRequest(
            "launcher", "is for several ranks; give tensor_parallel_size or pipeline_parallel_size, or leave it out"
        )
    return [*words, "-n", str(ranks), *worker_command(said)]


def _numbered(command: Sequence[str], number: int) -> list[str]:
    return [*command, "--options", json.dumps({"engine": number})] if number else [*command]


# Seconds that one of several engines may take to tell what it holds.
_ANSWERS_WITHIN: Final = 2.0


class EngineClient:
    """Every method and attribute belongs to the event loop that ran `start`.

    `command`      what starts an engine; `--address ADDRESS` is added, and which one it is to those after the first
    `tokenizer`    turns output into text; None: `text` stays empty, and stop strings are refused
    `engines`      how many there are, all alike; each job is one engine's
    """

    def __init__(
        self, command: Sequence[str], tokenizer: Tokenizer | None, *, health: Health | None = None, engines: int = 1
    ) -> None:
        self._router = Router(tokenizer, engines)
        self.tenants = TenantService()
        self._replicas = [
            Replica(number, _numbered(command, number), health or Health(), self._router, self.tenants)
            for number in range(engines)
        ]
        self._stopping = False

    @property
    def engines(self) -> Sequence[Replica]:
        return self._replicas

    @property
    def open_jobs(self) -> Mapping[int, OpenJob]:
        """By key; jobs that have ended or were closed are not in it."""
        return MappingProxyType(self._router.open_jobs)

    @property
    def info(self) -> Mapping[str, Any]:
        """As LLM.info, of the first engine; `max_num_seqs` counts the rows of all that are up, or else of all.

        Of several, `max_num_seqs_of_all` counts those of engines that will be back, too.
        """
        info = self._replicas[0].info
        if len(self._replicas) == 1 or "max_num_seqs" not in info:
            return info
        up = [replica for replica in self._replicas if replica.ready] or self._replicas
        rows = {
            name: sum(replica.info.get("max_num_seqs", 0) for replica in replicas)
            for name, replicas in (("max_num_seqs", up), ("max_num_seqs_of_all", self._replicas))
        }
        return {**info, **rows}

    @property
    def max_model_len(self) -> int:
        ready = self._replicas[0].greeting
        return 0 if ready is None else ready.max_model_len

    @property
    def vocab_size(self) -> int:
        ready = self._replicas[0].greeting
        return 0 if ready is None else ready.vocab_size

    @property
    def ready(self) -> bool:
        """An engine is up. While none is, jobs may be opened all the same: they wait for the next."""
        return any(replica.ready for replica in self._replicas)

    @property
    def healthy(self) -> bool:
        """False after too many failed starts in a row of every engine, until one succeeds. `failure` says why."""
        return self.failure is None

    @property
    def failure(self) -> str | None:
        """Why there is no engine, and none starts."""
        return None if None in self._router.failures else self._router.failures[-1]

    @property
    def pids(self) -> list[int]:
        """Of all engines' processes."""
        return [pid for replica in self._replicas for pid in replica.pids]

    @property
    def restarts(self) -> int:
        """Of all engines."""
        return sum(replica.restarts for replica in self._replicas)

    @property
    def status(self) -> Status | None:
        """What the engines said last, as if they were one; None while there is none."""
        if len(self._replicas) == 1:
            return self._replicas[0].status
        statuses = [replica.status for replica in self._replicas if replica.status is not None]
        return together(statuses, self.counters)

    @property
    def counters(self) -> dict[str, float]:
        """What all engines did, by the names that Status has for it."""
        each = [replica.counters for replica in self._replicas]
        return {name: sum(counters[name] for counters in each) for name in COUNTERS}

    async def start(self) -> None:
        """Return when all engines are up, which may take minutes. Raises EngineStartError, whose message is one line.

        The first is alone meanwhile: it measures the machine, and the others remember what it found.
        """
        first, *others = self._replicas
        await first.start({})
        starting = [asyncio.ensure_future(other.start(fixed_options(first.info))) for other in others]
        try:
            await asyncio.gather(*starting)
        except BaseException:  # a cancellation, too
            for start in starting:
                start.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            await self._end_engines()
            raise

    async def stop(self) -> None:
        """Stop the engines. Jobs still open end with finish_reason "abort". Idempotent."""
        self._stopping = True
        self._router.end_all(FinishReason.ABORT, self._refusal())
        await self._end_engines()

    def hasten(self) -> None:
        """Let `stop`, under way or to come, give the engines no time to end by themselves."""
        for replica in self._replicas:
            replica.supervisor.hasten()

    def open(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        seed: int,
        priority: int = 0,
        origin: Origin = NOBODY,
        arrival: float | None = None,
    ) -> OpenJob:
        """Hand over one prompt for one output (`params.n` is the caller's business). `arrival` is on time.monotonic.

        Raises EngineUnavailable before start, after stop and while there is a `failure`, and InvalidRequest for what
        can be told to no engine. What this one does not take is raised by the job's `news`.
        """
        if refusal := self._refusal():
            raise EngineUnavailable(refusal)
        return self._router.open(prompt, params, seed, priority, origin, arrival)

    def close(self, job: OpenJob) -> None:
        """Nobody wants the job any more: its engine drops it at its next iteration. Idempotent."""
        self._router.close(job)

    async def list_jobs(self) -> list[tuple[OpenJob, JobStatus]]:
        """What the engines hold, the next to run first; nothing while there is no engine.

        Of several, one that says nothing is left out, unless none says anything.
        """
        if len(self._replicas) == 1:
            return await self._replicas[0].list_jobs()
        answers = [asyncio.wait_for(replica.list_jobs(), _ANSWERS_WITHIN) for replica in self._replicas]
        lists, silent = [], None
        for answer in await asyncio.gather(*answers, return_exceptions=True):
            if isinstance(answer, asyncio.TimeoutError):
                silent = answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                lists.append(answer)
        if silent is not None and not lists:
            raise silent
        return [each for each in chain.from_iterable(zip_longest(*lists)) if each is not None]

    async def _end_engines(self) -> None:
        await asyncio.gather(*(replica.stop() for replica in self._replicas))

    def _refusal(self) -> str:
        """Why nothing can be opened; "" while it can."""
        if self._stopping:
            return "the server is stopping"
        if any(replica.greeting is None for replica in self._replicas):
            return "the engine has not been started"
        return self.failure or ""
