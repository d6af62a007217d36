"""One run: every job is sent at its time, whether or not earlier ones have been answered.

But for the later calls of programs, which are sent when the one before has been answered, and thought about.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from ...workloads import SimJob, calls_of
from .exchange import Exchange
from .prompts import Asking, Said
from .record import UNFINISHED, JobRecord
from .target import Target

TELL_SECONDS: Final = 0.5  # between two tellings of progress
_LEAD: Final = 0.05  # seconds from the start to the first arrival: time to get ready
_SPARE_FILES: Final = 64


@dataclass(slots=True)
class Replayed:
    """What a run left: its jobs in order of arrival, each with the calls behind it, and what it cost this process."""

    records: list[JobRecord]
    seconds: float  # from the first arrival to the last end
    cpu_seconds: float
    pieces: int  # received, of all answers
    peak_open: int  # most jobs at once
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a run is."""

    total: int
    ended: int
    failed: int
    open: int
    waiting: int  # for the concurrency limit
    seconds: float


Tell = Callable[[Standing], None]


@dataclass(slots=True)
class Replay:
    """One run against one server; `run` it once, in a running event loop. Jobs are in order of arrival.

    When a call fails, those behind it are never asked, and fail.

    `timeout`: seconds after its arrival at which a job is given up; None: never. `concurrency`: most jobs at once, the
    others wait here; None: no limit, the loop is open. `salt` makes prompts that other runs do not have.
    """

    target: Target
    jobs: Sequence[SimJob]
    asking: Asking
    salt: tuple[int, ...] = (0,)
    timeout: float | None = None
    concurrency: int | None = None
    tell: Tell | None = None
    _calls: list[SimJob] = field(default_factory=list)  # all jobs, and those behind them
    _firsts: list[int] = field(default_factory=list)  # of these, the jobs
    _said: dict[int, tuple[Said, str]] = field(default_factory=dict)  # in programs: before a call, and by it
    _thinking: dict[int, asyncio.TimerHandle] = field(default_factory=dict)  # about calls to come
    _records: list[JobRecord] = field(default_factory=list)
    _origin: float = 0.0
    _open: dict[Exchange, asyncio.TimerHandle | None] = field(default_factory=dict)
    _connected: set[Exchange] = field(default_factory=set)
    _next: int = 0  # of the firsts, to come
    _timer: asyncio.TimerHandle | None = None
    _waiting: deque[int] = field(default_factory=deque)
    _left: int = 0
    _failed: int = 0
    _peak: int = 0
    _interrupted: bool = False
    _over: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> Replayed:
        """Until the last job has ended, or `stop`."""
        loop = asyncio.get_running_loop()
        _allow_files(len(self.jobs) if self.concurrency is None else min(self.concurrency, len(self.jobs)))
        for job in self.jobs:
            self._firsts.append(len(self._calls))
            for place, call in enumerate(calls_of(job)):
                self._records.append(_record(len(self._calls), place, call, job.arrival))
                self._calls.append(call)
        self._left = len(self._calls)
        if not self.jobs:
            self._over.set()
        gc.collect()
        gc.freeze()  # what is there stays: no pause of a run is for looking through it
        cpu = time.process_time()
        self._origin = loop.time() + _LEAD
        self._dispatch()
        ticking = loop.call_later(TELL_SECONDS, self._tick) if self.tell is not None else None
        try:
            await self._over.wait()
        finally:
            if ticking is not None:
                ticking.cancel()
            self.stop()
            for exchange in list(self._connected):  # of servers that do not hang up
                exchange.hang_up()
            cpu = time.process_time() - cpu
            gc.unfreeze()
            self.tell = None
        ends = [record.end for record in self._records if record.end is not None]
        first = min((record.arrival for record in self._records), default=0.0)
        return Replayed(
            self._records,
            max(ends, default=first) - first,
            cpu,
            sum(len(record.times) for record in self._records),
            self._peak,
            self._interrupted,
        )

    @property
    def records(self) -> Sequence[JobRecord]:
        """Of all calls, as far as they are; none before the run."""
        return self._records

    def stop(self) -> None:
        """Send nothing more and hang up; jobs under way are unfinished. Does nothing after the end."""
        if self._over.is_set():
            return
        self._interrupted = True
        if self._timer is not None:
            self._timer.cancel()
        self._waiting.clear()
        for timer in self._thinking.values():
            timer.cancel()
        for exchange in list(self._open):
            exchange.give_up(UNFINISHED)
        for record in self._records:
            if record.end is None and record.error is None:
                record.error = UNFINISHED
        self._over.set()

    def _dispatch(self) -> None:
        """Send what is due, in order: timers of the same time would be called in any."""
        loop = asyncio.get_running_loop()
        while self._next < len(self.jobs):
            arrival = self._origin + self.jobs[self._next].arrival
            if arrival > loop.time():
                self._timer = loop.call_at(arrival, self._dispatch)
                return
            self._next += 1
            self._due(self._firsts[self._next - 1])

    def _due(self, index: int) -> None:
        if self.concurrency is not None and len(self._open) >= self.concurrency:
            self._waiting.append(index)
            return
        self._send(index, self._records[index].arrival)

    def _send(self, index: int, due: float) -> None:
        loop, job, record = asyncio.get_running_loop(), self._calls[index], self._records[index]
        record.due = due
        said, asked = self._said.get(index, (Said(), None))[0], None
        salt = (*self.salt, index)
        if self.asking.words or self.asking.endpoint == "chat" or record.said is not None:
            asked = self.asking.new_text(job, salt, said)
            self._said[index] = said, asked
        body = self.asking.body(job, self.target, salt, asked, said)
        request = self.target.request(self.asking.endpoint, body)
        exchange = Exchange(
            record,
            request,
            origin=self._origin,
            exact=self.asking.ignore_eos,
            ended=self._ended,
            connected=self._connected,
        )
        timer = None
        if self.timeout is not None:
            timer = loop.call_at(
                self._origin + record.arrival + self.timeout,
                exchange.give_up,
                "timed out",
                f"not answered within {self.timeout:g} s",
            )
        self._open[exchange] = timer
        self._peak = max(self._peak, len(self._open))
        exchange.start(self.target.address)

    def _ended(self, exchange: Exchange) -> None:
        timer = self._open.pop(exchange)
        if timer is not None:
            timer.cancel()
        record = exchange.record
        said = self._said.pop(record.index, None)
        self._left -= 1
        self._failed += record.error is not None
        if self._calls[record.index].then is not None and not self._interrupted:
            self._follow(record, said)
        if self._waiting and not self._interrupted:
            loop = asyncio.get_running_loop()
            self._send(self._waiting.popleft(), loop.time() - self._origin)
        if not self._left:
            self._over.set()

    def _follow(self, record: JobRecord, said: tuple[Said, str] | None) -> None:
        """A call has ended, and there is another behind it."""
        loop, job, following = asyncio.get_running_loop(), self._calls[record.index], record.index + 1
        if record.error is not None or record.end is None:
            for later in range(following, record.index + sum(1 for _ in calls_of(job))):
                self._records[later].error = "never asked"
                self._records[later].detail = "the call before it failed"
                self._left -= 1
                self._failed += 1
            return
        if said is not None:
            self._said[following] = said[0].and_then(said[1], job, record.text), ""
        self._records[following].arrival = arrival = record.end + job.think_time
        self._thinking[following] = loop.call_at(self._origin + arrival, self._thought, following)

    def _thought(self, index: int) -> None:
        del self._thinking[index]
        self._due(index)

    def _tick(self) -> None:
        if self.tell is None:
            return
        loop = asyncio.get_running_loop()
        total, seconds = len(self._calls), loop.time() - self._origin
        self.tell(Standing(total, total - self._left, self._failed, len(self._open), len(self._waiting), seconds))
        loop.call_later(TELL_SECONDS, self._tick)


def _record(index: int, place: int, job: SimJob, arrival: float) -> JobRecord:
    record = JobRecord(index, arrival, job.prompt_tokens, job.output_tokens)
    record.call, record.program, record.user = place, job.program, job.user
    if job.then is not None or place:
        record.said = []
    return record


def _allow_files(jobs: int) -> None:
    """Let this process have a connection for each job, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = jobs + _SPARE_FILES if hard == resource.RLIM_INFINITY else min(jobs + _SPARE_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
