"""An engine's client without an engine: tokens by the toy's definition, given out step by step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import toy_llm
from toy import EOS, VOCAB, expected_output
from toy_llm import CONTEXT, COST

from fastserve.ipc import JobStatus, LevelStatus, Status
from fastserve.origin import NOBODY, Origin
from fastserve.server.engine_api import EngineUnavailable
from fastserve.server.tenants import TenantService
from fastserve.server.totals import COUNTERS
from fastserve.tokenizer import IncrementalDetokenizer, Tokenizer
from fastserve.types import InvalidRequest, JobMetrics, SamplingParams, TokenLogprobs


def toy_tokenizer() -> Tokenizer:
    data = toy_llm.ToySource().tokenizer_data()
    assert data is not None
    return Tokenizer.from_data(data)


class ToyJob:
    def __init__(self, key: int, prompt: list[int], params: SamplingParams, seed: int, **more: Any) -> None:
        self.key, self.prompt, self.params, self.seed = key, prompt, params, seed
        self.engine = 0
        self.origin, self.priority, self.arrival = more["origin"], more["priority"], more["arrival"]
        self.output: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.error: str | None = None
        self.metrics: JobMetrics | None = None
        self.refusal: InvalidRequest | None = None
        self.closed = False
        self.found = 0  # tokens of the prompt in the cache
        self.taken = asyncio.Event()  # set while somebody waits for news: what there was has been taken
        self._tokens = expected_output(prompt, params, seed, CONTEXT)
        self._text = IncrementalDetokenizer(
            more["tokenizer"], tuple(params.stop), params.include_stop_str_in_output, params.skip_special_tokens
        )
        self._changed = asyncio.Event()

    @property
    def text(self) -> str:
        return self._text.text

    @property
    def cached_tokens(self) -> int | None:
        return self.found if self.output else None

    async def news(self) -> None:
        self.taken.set()
        await self._changed.wait()
        self.taken.clear()
        self._changed.clear()
        if self.refusal is not None:
            raise self.refusal

    def grow(self) -> None:
        token = self._tokens[len(self.output)]
        self.output.append(token)
        if self.params.logprobs is not None:
            top = [(token, -0.5), ((token + 1) % VOCAB, -1.5)][: self.params.logprobs]
            self.logprobs.append(TokenLogprobs(token, -0.5, top))
        stops = {*self.params.stop_token_ids, *(() if self.params.ignore_eos else (EOS,))}
        if token in stops and len(self.output) > self.params.min_tokens:
            self.stop_reason = token if token in self.params.stop_token_ids else None
            return self.end("stop")
        self._text.append([token], match_stop=len(self.output) > self.params.min_tokens)
        if self._text.matched_stop is not None:
            self.stop_reason = self._text.matched_stop
            return self.end("stop")
        if len(self.output) == len(self._tokens):
            return self.end("length")
        self._changed.set()

    def end(self, reason: str, error: str | None = None) -> None:
        self._text.flush()
        self.finish_reason, self.error = reason, error
        if reason in ("stop", "length"):
            self.metrics = JobMetrics(0.0, 1.0, 2.0, 10.0, 3, 0, 1.5, 6.0, 0.75, self.found)
        self._changed.set()

    def refuse(self, refusal: InvalidRequest) -> None:
        self.refusal = refusal
        self.end("error", str(refusal))


@dataclass
class Beside:
    """An engine beside the toy's, which does nothing."""

    ready: bool = True
    pids: list[int] = field(default_factory=list)
    restarts: int = 0
    status: Status | None = None
    failure: str | None = None
    jobs: int = 0


class ToyEngine:
    """Gives each of the first `max_num_seqs` open jobs a token a step: by itself, or when told, if `held`."""

    def __init__(self, *, max_num_seqs: int = 8, held: bool = False, policy: str = "skip-join-mlfq") -> None:
        self.ready = True
        self.info: dict[str, Any] = {"max_num_seqs": max_num_seqs, "policy": policy, "cost": asdict(COST)}
        self.max_model_len, self.vocab_size = CONTEXT, VOCAB
        self.pids, self.restarts = [4711], 0
        self.failure: str | None = None
        self.told: Status | None = None  # what is said instead of nothing in particular
        self.counted: dict[str, float] = {}  # counters that are not 0
        self.backlog = 0.0
        self.tenants = TenantService()
        self.others: list[Any] = []  # engines beside this one
        self.open_jobs: dict[int, ToyJob] = {}
        self.opened: list[ToyJob] = []
        self.held = held
        self.tokenizer = toy_tokenizer()
        self.changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    @property
    def status(self) -> Status | None:
        if self.told is not None:
            return self.told
        level = LevelStatus(None, 0, 0, 0.0)
        live = len(self.open_jobs)
        return Status(0.0, live, 0, [level], self.backlog, *([0] * 11), *([0.0] * 3))

    @property
    def engines(self) -> Sequence[Any]:
        """Each as the client is to see it: this one, unless there are others."""
        return [self, *self.others]

    @property
    def jobs(self) -> int:
        return sum(job.engine == 0 for job in self.open_jobs.values())

    @property
    def counters(self) -> dict[str, float]:
        return {**dict.fromkeys(COUNTERS, 0), **self.counted}

    async def start(self) -> None: ...

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def open(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        seed: int,
        priority: int = 0,
        origin: Origin = NOBODY,
        arrival: float | None = None,
    ) -> ToyJob:
        if self.failure is not None:
            raise EngineUnavailable(self.failure)
        key = len(self.opened)
        job = ToyJob(
            key, prompt, params, seed, origin=origin, priority=priority, tokenizer=self.tokenizer,
            arrival=time.monotonic() if arrival is None else arrival,
        )  # fmt: skip
        self.open_jobs[key] = job
        self.opened.append(job)
        asyncio.get_running_loop().create_task(self._tell())
        if not self.held and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._run())
        return job

    def close(self, job: ToyJob) -> None:
        if self.open_jobs.pop(job.key, None) is not None:
            job.closed = True
            asyncio.get_running_loop().create_task(self._tell())

    def hasten(self) -> None: ...

    async def list_jobs(self) -> Sequence[tuple[ToyJob, JobStatus]]:
        return [
            (
                job,
                JobStatus(job.key, 0, False, "none", len(job.prompt), 0, len(job.output), 9, 0.0, 0.0, 0, 0, job.found),
            )
            for job in self.open_jobs.values()
        ]

    def step(self) -> None:
        running = list(self.open_jobs.values())[: self.info["max_num_seqs"]]
        for job in running:
            job.grow()
            if job.finish_reason is not None:
                del self.open_jobs[job.key]

    def release(self) -> None:
        self.held = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def until(self, condition: Any) -> None:
        """Wait until this holds of the engine; it is looked at whenever jobs are opened or closed."""
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(lambda: condition(self)), 30)

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _run(self) -> None:
        while self.open_jobs and not self.held:
            self.step()
            await self._tell()
            for _ in range(3):
                await asyncio.sleep(0)
