"""What all requests share: the engine, the tokenizer, the way in, and the calls that are open."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Final

from ..ipc import JobStatus
from ..tokenizer import Tokenizer
from ..types import InvalidRequest
from .admission import Admission
from .calls import Call
from .engine_api import EngineClient, OpenJob
from .errors import ApiError
from .memory import Memory
from .metrics import Metrics
from .prompts import PromptLimits
from .recent import Recent
from .record import TraceRecord
from .regret import Regret
from .settings import ServerSettings


class Service:
    """One model, served. Belongs to one event loop."""

    listing_age: Final = 0.25  # seconds that what the engine said of its jobs is good for

    def __init__(self, settings: ServerSettings, engine: EngineClient, tokenizer: Tokenizer | None) -> None:
        """Raises InvalidRequest where there is a record to be written, and it cannot be."""
        self.settings = settings
        self.engine = engine
        engine.tenants.keyed = bool(settings.api_key)
        self.tokenizer = tokenizer
        self.admission = Admission(engine, settings.max_queue, self._reclaim)
        self.created = int(time.time())
        self.calls: set[Call] = set()
        self.request_ids: dict[int, str] = {}  # by the key of an open job
        self.metrics = Metrics(engine, settings.names[0], self.regret)
        self.recent = Recent()
        self._regret = Regret()
        self._memory = Memory(lambda: not self.calls)
        self._record = None if settings.record is None else TraceRecord(settings.record)
        self._seeds = random.Random(settings.seed)
        self._listing: tuple[float, Mapping[int, JobStatus]] = (float("-inf"), {})

    @property
    def limits(self) -> PromptLimits:
        return PromptLimits(self.engine.max_model_len, self.engine.vocab_size)

    @property
    def state(self) -> str:
        """In one word: ok, restarting, draining or unhealthy."""
        if self.engine.failure is not None:
            return "unhealthy"
        if self.admission.draining:
            return "draining"
        return "ok" if self.engine.ready else "restarting"

    def ended(self, job: OpenJob) -> None:
        """Count a job that is over, in whatever way."""
        self.metrics.ended(job)
        self.recent.ended(job)
        self._memory.ended()
        if job.metrics is not None and job.finish_reason in ("stop", "length"):
            self._regret.ended(job.metrics)
        if self._record is not None:
            self._record.ended(job)

    def regret(self) -> float | None:
        """Mean completion time lately over what it could have been in hindsight; None where nothing has ended."""
        slots = self.engine.info.get("max_num_seqs")
        return self._regret.value(slots) if slots else None

    def draw_seed(self) -> int:
        return self._seeds.getrandbits(64)

    def check_model(self, name: str | None) -> str:
        """What the answer calls the model. Raises ApiError, 404."""
        names = self.settings.names
        if name is None:
            return names[0]
        if name not in names:
            raise ApiError(
                404,
                f"model: {name!r} is not served here; there is {', '.join(map(repr, names))}",
                param="model",
                code="model_not_found",
            )
        return name

    def need_tokenizer(self, field: str, instead: str) -> Tokenizer:
        """Raises InvalidRequest where the model came without one."""
        if self.tokenizer is None:
            raise InvalidRequest(field, f"needs a tokenizer, and the model was loaded without one; {instead}")
        return self.tokenizer

    async def job_states(self) -> Mapping[int, JobStatus]:
        """What the engine said of its jobs lately, by key. Raises EngineUnavailable."""
        now = time.monotonic()
        if now - self._listing[0] > self.listing_age:
            self._listing = (now, {job.key: status for job, status in await self.engine.list_jobs()})
        return self._listing[1]

    def _reclaim(self) -> None:
        for call in self.calls:
            call.reclaim()

    def drain(self) -> None:
        """From here on new work is refused; what is open goes on."""
        self.admission.draining = True

    def close(self) -> None:
        """Nothing is open any more."""
        if self._record is not None:
            self._record.close()

    def end_all(self) -> None:
        """End what is open, with an error for each."""
        for call in list(self.calls):
            call.interrupt(ApiError(503, "the server is shutting down", code="shutting_down"))
