"""Runs of a load against servers: at every rate, in every round, against each in turn."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final

from ...types import InvalidRequest
from ...workloads import SimJob, calls_of
from .comparison import compare
from .plan import Plan
from .prompts import Asking
from .replay import Replay, Standing
from .results import ServeRun, Slo, summarize
from .target import ServerError, Target, connect

_WARMUP: Final = 2**32 - 1  # where a run's salt has its number
_MAX_ROUNDS: Final = 1000


class Watcher:
    """Hears what happens, for whoever shows it; a context manager around it all."""

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def began(self, target: Target, rate: float | None, round: int, jobs: int) -> None: ...

    def standing(self, standing: Standing) -> None: ...

    def ended(self, run: ServeRun) -> None: ...


@dataclass(frozen=True, slots=True)
class Experiment:
    """Which servers get which load. Raises InvalidRequest for what cannot be."""

    servers: Sequence[tuple[str, str]]  # name and base URL
    plan: Plan
    asking: Asking = field(default_factory=Asking)
    rates: Sequence[float] = ()
    rounds: int = 1
    warmup: int = 4  # jobs sent to each server before its first run
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout: float | None = None
    concurrency: int | None = None
    slo: Slo | None = None
    label: str | None = None
    loads: dict[float | None, list[SimJob]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        names = [name for name, _ in self.servers]
        if len(set(names)) < len(names):
            raise InvalidRequest("target", f"must have names that differ, got {', '.join(names)}")
        if not 1 <= self.rounds <= _MAX_ROUNDS:
            raise InvalidRequest("rounds", f"must be an integer between 1 and {_MAX_ROUNDS}, got {self.rounds}")
        if self.warmup < 0:
            raise InvalidRequest("warmup", f"must be an integer of at least 0, got {self.warmup}")
        if self.timeout is not None and not self.timeout > 0:
            raise InvalidRequest("timeout", f"must be a number of seconds above 0, got {self.timeout:g}")
        if self.concurrency is not None and self.concurrency < 1:
            raise InvalidRequest("concurrency_limit", f"must be an integer of at least 1, got {self.concurrency}")
        if self.rates and not self.plan.has_rate:
            raise InvalidRequest("rate", "cannot be given with --arrival all-at-once")
        if len(set(self.rates)) < len(self.rates):
            raise InvalidRequest("rate", "must not be given twice with the same value")
        self.loads.update({rate: self.plan.jobs(rate) for rate in self.rates or (None,)})

    @property
    def title(self) -> str:
        jobs = _calls(next(iter(self.loads.values())))
        return " · ".join(filter(None, (self.label, f"{jobs} jobs, {self.plan.name}", f"seed {self.plan.seed}")))

    def as_dict(self, runs: Sequence[ServeRun]) -> dict[str, Any]:
        """The JSON of `fastserve bench serve`."""
        return {
            "benchmark": "serve",
            "label": self.label,
            "load": self.plan.name,
            "seed": self.plan.seed,
            "endpoint": self.asking.endpoint,
            "ignore_eos": self.asking.ignore_eos,
            "temperature": self.asking.temperature,
            "concurrency_limit": self.concurrency,
            "timeout": self.timeout,
            "levels": [level.as_dict() for level in compare(runs)],
            "runs": [run.as_dict() for run in runs],
        }

    async def run(self, watcher: Watcher) -> list[ServeRun]:
        """All runs that ended; the last one is incomplete after Ctrl-C, and the only one to be.

        Raises ServerError for a server that cannot be reached or fails all of its warm-up.
        """
        several = len(self.servers) > 1
        targets = [
            await connect(name, url, self.model, self.api_key, "target" if several else "base_url")
            for name, url in self.servers
        ]
        for target in targets:
            await self._warm_up(target)
        runs: list[ServeRun] = []
        for round in range(self.rounds):
            for number, (rate, jobs) in enumerate(self.loads.items()):
                for target in targets:
                    watcher.began(target, rate, round, _calls(jobs))
                    # All servers get the same prompts, and none gets any twice: what a cache finds is of this run.
                    salt = (self.plan.seed, round, number)
                    run = await self._replay(target, rate, round, jobs, salt, watcher)
                    runs.append(run)
                    watcher.ended(run)
                    if run.summary["interrupted"]:
                        return runs
        return runs

    async def _replay(
        self,
        target: Target,
        rate: float | None,
        round: int,
        jobs: Sequence[SimJob],
        salt: tuple[int, ...],
        watcher: Watcher,
    ) -> ServeRun:
        replay = Replay(target, jobs, self.asking, salt, self.timeout, self.concurrency, watcher.standing)
        with _on_interrupt(replay.stop):
            replayed = await replay.run()
        return ServeRun(target, rate, round, summarize(replayed, self.slo), replayed.records)

    async def _warm_up(self, target: Target) -> None:
        jobs = [
            replace(job, arrival=0.0, then=None, think_time=0.0)
            for job in next(iter(self.loads.values()))[: self.warmup]
        ]
        if not jobs:
            return
        replayed = await Replay(target, jobs, self.asking, (self.plan.seed, _WARMUP), self.timeout).run()
        failed = [record for record in replayed.records if not record.ok]
        if len(failed) == len(jobs):
            raise ServerError(
                f"{target.base_url}: all {len(jobs)} jobs of the warm-up failed: {failed[0].error}: {failed[0].detail}"
            )


def _calls(jobs: Sequence[SimJob]) -> int:
    return sum(1 for job in jobs for _ in calls_of(job))


@contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C stops the run instead of the program; a second one stops that."""
    loop = asyncio.get_running_loop()
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not ours here
        return
    previous = signal.getsignal(signal.SIGINT)

    def interrupted() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, previous)
