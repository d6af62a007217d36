"""One request while the engine works on it: its jobs, and all that can end it before they do."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.types import Receive

from ..origin import Origin
from ..seeds import derived_seed
from ..types import InvalidRequest, SamplingParams
from .engine_api import EngineUnavailable, OpenJob
from .errors import ApiError

if TYPE_CHECKING:
    from .service import Service

_BURST = 16384  # prompt tokens handed over in a row before others have the event loop


class Call:
    """Opens jobs and closes them whatever happens: a client that goes away, a deadline, a shutdown, an error.

    >>> with Call(service, "req-1", origin=NOBODY, jobs=2, arrival=now) as call:
    ...     await call.run(receive, answer(call))
    """

    def __init__(
        self,
        service: Service,
        request_id: str,
        *,
        origin: Origin,
        jobs: int,
        arrival: float,
        timeout: float | None = None,
    ) -> None:
        self.request_id = request_id
        self.arrival = arrival
        self.timeout = timeout
        self.jobs: list[OpenJob] = []
        self.disconnected = False
        self.cause: ApiError | None = None  # of what ended it early
        self._service = service
        self._origin = origin
        self._places = jobs
        self._all_open = False
        self._work: asyncio.Future[None] | None = None
        self._helpers: list[asyncio.Future[None]] = []

    def __enter__(self) -> Call:
        """Raises ApiError where there is no room."""
        self._service.admission.enter(self._origin.tenant, self._places)
        self._service.calls.add(self)
        return self

    def __exit__(self, *error: object) -> None:
        service = self._service
        for helper in self._helpers:
            helper.cancel()
        with contextlib.ExitStack() as last:  # from its end, and all of it whatever raises
            last.callback(service.admission.leave, self._origin.tenant, self._places)
            last.callback(service.calls.discard, self)
            for job in reversed(self.jobs):
                last.callback(service.ended, job)
                last.callback(service.request_ids.pop, job.key, None)
                last.callback(service.engine.close, job)

    def reclaim(self) -> None:
        """Give back the places of jobs that have ended: a client that reads slowly does not keep others out."""
        if not self._all_open:
            return
        live = sum(job.finish_reason is None for job in self.jobs)
        if live < self._places:
            self._service.admission.leave(self._origin.tenant, self._places - live)
            self._places = live

    async def open(self, prompts: Sequence[list[int]], params: SamplingParams, priority: int) -> None:
        """One job for each answer to each prompt. Raises ApiError, InvalidRequest and EngineUnavailable."""
        service = self._service
        for prompt in prompts:
            service.limits.check("prompt", prompt)
        if self.timeout is not None:
            service.admission.check_deadline(prompts, params, self.timeout, time.monotonic() - self.arrival)
        burst = 0
        for prompt in prompts:
            seed = service.draw_seed() if params.seed is None else params.seed
            for index in range(params.n):
                job = service.engine.open(
                    prompt,
                    params,
                    seed=derived_seed(seed, index),
                    priority=priority,
                    origin=self._origin,
                    arrival=self.arrival,
                )
                self.jobs.append(job)
                service.request_ids[job.key] = self.request_id
                burst += len(prompt)
                if burst > _BURST:
                    burst = 0
                    await asyncio.sleep(0)
        self._all_open = True
        if self.timeout is not None:
            self._helpers.append(asyncio.ensure_future(self._keep_start(self.arrival + self.timeout)))

    async def run(self, receive: Receive, work: Coroutine[Any, Any, None]) -> None:
        """Await `work`, unless something ends it before; then its cause is raised. For a client that went away: none.

        Raises what `work` does.
        """
        self._work = asyncio.ensure_future(work)
        self._helpers.append(asyncio.ensure_future(self._watch(receive)))
        if self.timeout is not None:
            self._helpers.append(asyncio.ensure_future(self._keep_deadline(self.arrival + self.timeout)))
        try:
            await self._work
        except asyncio.CancelledError:
            if self.cause is not None:
                raise self.cause from None
            if not self.disconnected:
                raise

    def interrupt(self, cause: ApiError | None) -> None:
        """End the call where it is; with no cause where nobody is there to be told."""
        if self._work is None or self._work.done() or self.cause is not None or self.disconnected:
            return
        self.cause, self.disconnected = cause, cause is None
        for job in self.jobs:  # now, as what is being written may take its time
            self._service.engine.close(job)
        self._work.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.interrupt(None)

    async def _keep_start(self, deadline: float) -> None:
        """A job whose prefill alone would now be too late is dropped before it.

        How much of its prompt is in the cache is asked for when that matters, again while it gets more.
        """
        admission, now = self._service.admission, time.monotonic()
        last = self._latest_start(deadline, {job.key: admission.cachable(job.prompt) for job in self.jobs})
        # The engine may not know it yet: at once would be too soon.
        look = min(last, max(self._latest_start(deadline, {}), now + self._service.listing_age))
        if last <= now:
            return
        while True:
            await asyncio.sleep(look - time.monotonic())
            cached = None if any(job.output for job in self.jobs) else await self._cached_of_waiting()
            if cached is None:
                return
            latest = self._latest_start(deadline, cached)
            if latest <= look:
                self.interrupt(self._too_late("had not started when it had to"))
                return
            look = max(latest, look + self._service.listing_age)  # what was said before would only be heard again

    async def _keep_deadline(self, deadline: float) -> None:
        """Any job is, when its time is over; nobody is asked for that, as an engine may be slow to answer."""
        await asyncio.sleep(deadline - time.monotonic())
        tokens = sum(len(job.output) for job in self.jobs)
        self.interrupt(self._too_late(f"had {tokens} tokens when its time was over"))

    def _latest_start(self, deadline: float, cached: Mapping[int, int]) -> float:
        """By when all jobs have to start; `cached`: of their prompts, by key, where any of it is."""
        seconds = self._service.admission.prefill_seconds
        return deadline - max((seconds(job.prompt, cached.get(job.key, 0)) for job in self.jobs), default=0.0)

    async def _cached_of_waiting(self) -> Mapping[int, int] | None:
        """What the engine has in its cache of each job's prompt; None where it has begun any, or nobody can tell."""
        try:
            states = await self._service.job_states()
        except EngineUnavailable:
            return None
        engines = self._service.engine.engines
        if not any(engines[job.engine].ready for job in self.jobs):  # being restarted: all is lost
            return {}
        known = {job.key: states[job.key] for job in self.jobs if job.key in states}
        if not known or any(state.running or state.computed_tokens for state in known.values()):
            return None
        cachable = self._service.admission.cachable
        return {job.key: known[job.key].in_cache if job.key in known else cachable(job.prompt) for job in self.jobs}

    def _too_late(self, what: str) -> ApiError:
        return ApiError(
            504,
            f"timeout: to end within {self.timeout:g} s was asked for; the job {what}, and was dropped",
            param="timeout",
            code="deadline_exceeded",
            headers={"x-should-retry": "false"},
        )


def failure(job: OpenJob, engine_failure: str | None) -> ApiError | None:
    """Of a job that has ended without an answer."""
    if job.finish_reason == "error":
        if engine_failure is not None:
            return ApiError(503, engine_failure, code="engine_unavailable", headers={"Retry-After": "5"})
        return ApiError(500, job.error or "the job failed", code="job_failed")
    if job.finish_reason == "abort":
        return ApiError(503, job.error or "the job was aborted", code="aborted", headers={"Retry-After": "5"})
    return None


EXPECTED = (ApiError, InvalidRequest, EngineUnavailable)
