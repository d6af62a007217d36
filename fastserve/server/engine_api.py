"""What the HTTP layer needs of the engine's client: one job a prompt and output, which grows until it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..ipc import JobStatus, Status
from ..origin import NOBODY, Origin
from ..types import JobMetrics, SamplingParams, TokenLogprobs
from .tenants import TenantService


class EngineUnavailable(RuntimeError):
    """There is no engine to serve a job, and nobody knows when there will be. The message is one line and says why."""


class OpenJob(Protocol):
    """One prompt on its way to one output. Everything here may have changed after `news`, and only then."""

    @property
    def key(self) -> int: ...
    @property
    def engine(self) -> int:
        """The number of the engine that it is on."""

    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def params(self) -> SamplingParams: ...
    @property
    def priority(self) -> int: ...
    @property
    def arrival(self) -> float:
        """On time.monotonic."""

    @property
    def origin(self) -> Origin: ...
    @property
    def output(self) -> Sequence[int]:
        """The tokens so far."""

    @property
    def logprobs(self) -> Sequence[TokenLogprobs]:
        """One for each of them, where asked for."""

    @property
    def text(self) -> str:
        """Safe to show: what may be the start of a stop string, or half a character, is held back."""

    @property
    def finish_reason(self) -> str | None: ...
    @property
    def stop_reason(self) -> str | int | None: ...
    @property
    def error(self) -> str | None:
        """Why, where finish_reason is error."""

    @property
    def cached_tokens(self) -> int | None:
        """Of its prompt, found in the cache when it first ran; None: no engine has told, as it does with a token."""

    @property
    def metrics(self) -> JobMetrics | None:
        """Once it has ended."""

    async def news(self) -> None:
        """Returns when something was added, or it ended, since the last call. For one waiter.

        Raises InvalidRequest where the engine does not take the job.
        """


class EngineState(Protocol):
    """One engine of those that serve."""

    @property
    def ready(self) -> bool: ...
    @property
    def pids(self) -> Sequence[int]: ...
    @property
    def restarts(self) -> int: ...
    @property
    def status(self) -> Status | None: ...
    @property
    def failure(self) -> str | None:
        """Why it does not start, after it has failed to several times."""

    @property
    def jobs(self) -> int:
        """Open jobs that are on it."""


class EngineClient(Protocol):
    """The engines' processes as the API server sees them: as one that does what all of them do, and one by one."""

    @property
    def engines(self) -> Sequence[EngineState]: ...
    @property
    def ready(self) -> bool:
        """One at least is up."""

    @property
    def info(self) -> Mapping[str, Any]: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def pids(self) -> Sequence[int]: ...
    @property
    def restarts(self) -> int: ...
    @property
    def status(self) -> Status | None: ...
    @property
    def counters(self) -> Mapping[str, float]:
        """Status's counters (totals.COUNTERS), of all engines and those before them: they never fall."""

    @property
    def tenants(self) -> TenantService:
        """Who has had how much of all engines, and those before them."""

    @property
    def failure(self) -> str | None:
        """Why no engine starts, after all have failed to several times."""

    @property
    def open_jobs(self) -> Mapping[int, Any]: ...

    async def start(self) -> None: ...
    async def stop(self) -> None: ...

    def hasten(self) -> None:
        """Let `stop`, under way or to come, take no time."""

    def open(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        seed: int,
        priority: int = 0,
        origin: Origin = NOBODY,
        arrival: float | None = None,
    ) -> OpenJob:
        """Raises EngineUnavailable."""

    def close(self, job: Any) -> None:
        """Nobody wants this OpenJob any more. For one that has ended, nothing."""

    async def list_jobs(self) -> Sequence[tuple[OpenJob, JobStatus]]:
        """The next to run first. Raises EngineUnavailable."""
