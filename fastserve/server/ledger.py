"""What one engine owes: the jobs that are its to do, what of them it has been handed, and who ran when it died.

    add ──▶ [ jobs ] ──Add──▶ engine ──Step──▶ take ──▶ ended, and forgotten
               ▲  │              │
               │  └─ remove      │             another engine is to do it
               └────── down ─────┘        at the next `up` all that is here is handed over again

No sockets, no processes, no tasks: every method belongs to the event loop's thread and returns at once.

Blame. The jobs that ran when an engine died are remembered with the number of tokens they had, and carry that along if
they go to another engine. One that ran in two crashes without a token between them runs alone, nothing else in its
engine, until it has its next token; if the engine crashes again before that, the job ends with an error and the others
go on. A token clears the blame: results are deterministic, so a job that brings engines down does it at the same token
every time, and nothing else does.

A death that somebody outside may have brought about, as by SIGKILL, says less: a job may have taken all memory, or an
operator was busy. Four of those at one token have a job run alone, and it takes three more with nothing else in the
engine to end it; suspects take turns, so that chance does not meet the same one again and again.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator

from ..ipc import Abort, Add, Refused, Step, ToEngine
from ..types import FinishReason, InvalidRequest
from .jobs import OpenJob

log = logging.getLogger(__name__)

# What encoding a message raises for a value that it cannot hold. What a socket raises is neither.
_UNTELLABLE = (TypeError, ValueError, OverflowError)

# A job may be in an iteration before the API server hears so: what the engine said of it may be lost with the engine.
# It cannot be any more when so many Steps have come since its Add and none has named it.
_UNTOLD_STEPS = 3

# What a death says against those who ran, and how much of that, at one token, is enough to be kept from other engines,
# to run alone, and to end. Nobody is guilty without a death alone.
_CRASH, _KILLED = 3, 1
_CONFINED = 2
_SUSPECT = 4
_GUILTY = 7


class Ledger:
    """`jobs` holds, by key, every job of this engine that has neither ended nor been removed."""

    def __init__(self, ended: Callable[[OpenJob], None]) -> None:
        """`ended` is told of every job that has ended, once it is not here any more."""
        self.jobs: dict[int, OpenJob] = {}
        self._ended = ended
        # The engine knows a job by a ticket. Each submission has its own, so that what was still said about an earlier
        # one is not taken for news of the present one.
        self._tickets = itertools.count(1)
        self._submitted: dict[int, OpenJob] = {}
        self._send: Callable[[ToEngine], None] | None = None  # None while there is no engine
        self._running: list[int] = []  # tickets, as the engine last said
        self._steps = 0
        self._alone: OpenJob | None = None

    @property
    def up(self) -> bool:
        """There is an engine."""
        return self._send is not None

    @property
    def alone(self) -> bool:
        """A suspect has the engine for itself, and whatever else is here waits."""
        return self._alone is not None

    def job_of(self, ticket: int) -> OpenJob | None:
        """The job that the engine knows by a ticket; None when it is none of its business any more."""
        return self._submitted.get(ticket)

    def waiting(self) -> Iterator[OpenJob]:
        """The jobs of which, as far as is known, nothing has been computed, and that may go to another engine."""
        running = set(self._running)
        for job in self.jobs.values():
            if not confined(job) and (job.ticket is None or (not job.output and job.ticket not in running)):
                yield job

    # --- from whoever decides what is whose --------------------------------------------------------------------------

    def add(self, job: OpenJob) -> None:
        """The job is this engine's from now on."""
        self.jobs[job.key] = job
        if self._alone is not None:
            return
        if _suspect(job):
            self._deal()
        else:
            self._submit(job)

    def remove(self, job: OpenJob) -> None:
        """The job is another engine's from now on."""
        self._withdraw(job)
        del self.jobs[job.key]
        self._go_on(job)

    def discard(self, job: OpenJob) -> None:
        """Take out a job that could not be sent."""
        self.jobs.pop(job.key, None)
        if job.ticket is not None:
            self._submitted.pop(job.ticket, None)

    def close(self, job: OpenJob) -> None:
        """Nobody wants the job any more."""
        self._withdraw(job)
        self._end(job, FinishReason.ABORT)

    def end_all(self, reason: FinishReason, error: str) -> None:
        self._alone = None  # nobody is dealt in any more
        for job in list(self.jobs.values()):
            self._withdraw(job)
            self._end(job, reason, error)

    # --- from the engine ---------------------------------------------------------------------------------------------

    def engine_up(self, send: Callable[[ToEngine], None]) -> None:
        """A new engine: it gets what is here, in order of arrival."""
        self._send = send
        self._deal()

    def engine_down(self, *, crashed: bool = True) -> None:
        """The engine is gone: it has `crashed`, or somebody outside may have ended it. Ends the job that it died of."""
        submitted = list(self._submitted.values())
        named = [job for ticket in self._running if (job := self._submitted.get(ticket)) is not None]
        maybe = [job for job in submitted if job.told_after > self._steps]
        self._submitted.clear()
        self._send, self._alone = None, None
        self._running, self._steps = [], 0
        for job in submitted:
            job.ticket = None
            if job.stopped:  # all of its output is here
                self._end(job, FinishReason.STOP)
        for job in dict.fromkeys([*named, *maybe]):
            if job.finish_reason is None and _blame(job, _CRASH if crashed else _KILLED) >= _GUILTY:
                self._end(
                    job,
                    FinishReason.ERROR,
                    f"the engine died {job.deaths} times in a row computing token {len(job.output) + 1} of this "
                    "output, the last time with nothing else to do; other requests are not affected",
                )

    def step(self, step: Step) -> None:
        self._steps += 1
        if step.running is not None:
            self._running = step.running
        submitted = self._submitted
        stopped: list[int] = []
        for update in step.updates:
            job = submitted.get(update.key)
            if job is None:  # closed, which the engine did not know yet
                continue
            if job.take(update):
                stopped.append(update.key)
            elif job.finish_reason is not None:
                self._forget(job)
        if stopped and self._send is not None:
            self._send(Abort(stopped, True))
        if self._alone is not None and not _suspect(self._alone):
            self._deal()

    def refused(self, refused: Refused) -> None:
        job = self._submitted.get(refused.key)
        if job is not None:
            job.refuse(InvalidRequest(refused.field, refused.message.removeprefix(f"{refused.field}: ")))
            self._forget(job)
            self._go_on(job)

    # --- handing over ------------------------------------------------------------------------------------------------

    def _deal(self) -> None:
        """Give the engine all it may have: one suspect and nothing else, or everything."""
        self._alone = None
        suspects = [job for job in self.jobs.values() if _suspect(job)]
        if not suspects:
            self._submit(*sorted((job for job in self.jobs.values() if job.ticket is None), key=order))
        elif self._send is not None:
            alone = min(suspects, key=lambda job: (job.blame, *order(job)))
            for job in list(self._submitted.values()):  # who was alone before and has its token, say
                self._withdraw(job)
                if job.stopped:
                    self._end(job, FinishReason.STOP)
            self._alone = alone
            self._submit(alone)

    def _submit(self, *jobs: OpenJob) -> None:
        send = self._send
        if send is None:
            return
        for job in jobs:
            job.ticket = next(self._tickets)
            job.submissions += 1
            job.told_after = self._steps + _UNTOLD_STEPS
            self._submitted[job.ticket] = job
            try:
                send(_add(job, job.ticket))
            except _UNTELLABLE as error:  # a mistake of ours: the others are to have their engine all the same
                log.exception("job %d cannot be told to the engine", job.key)
                self._end(job, FinishReason.ERROR, f"the job cannot be told to the engine: {type(error).__name__}")

    def _withdraw(self, job: OpenJob) -> None:
        """Take a job from the engine, whatever it is doing with it."""
        if job.ticket is not None and self._send is not None:
            self._send(Abort([job.ticket], False))
            del self._submitted[job.ticket]
            job.ticket = None

    def _end(self, job: OpenJob, reason: FinishReason, error: str | None = None) -> None:
        """End an open job that the engine does not have, or has no more."""
        job.end(reason, error)
        self._forget(job)
        self._go_on(job)

    def _forget(self, job: OpenJob) -> None:
        """A job has ended."""
        del self.jobs[job.key]
        if job.ticket is not None:
            del self._submitted[job.ticket]
            job.ticket = None
        self._ended(job)

    def _go_on(self, job: OpenJob) -> None:
        """If it was alone, it is somebody else's turn."""
        if self._alone is job:
            self._deal()


def order(job: OpenJob) -> tuple[float, int]:
    """In which jobs are handed over: of arrival."""
    return job.arrival, job.key


def confined(job: OpenJob) -> bool:
    """Whether the engine that the job is on should be the last that it can bring down.

    One that ran when its engine crashed waits for that engine to come back. A single death by somebody else's hand is
    taken for what it nearly always is, so that nobody waits; a second one at the same token is not.
    """
    return job.blame >= _CONFINED and job.deaths_at == len(job.output)


def _suspect(job: OpenJob) -> bool:
    waits = job.finish_reason is None and not job.stopped
    return waits and job.blame >= _SUSPECT and job.deaths_at == len(job.output)


def _blame(job: OpenJob, evidence: int) -> int:
    """Note that an engine died with the job running; returns what all that did at this token say against it."""
    if job.deaths_at != len(job.output):
        job.deaths, job.blame, job.deaths_at = 0, 0, len(job.output)
    job.deaths += 1
    job.blame += evidence
    return job.blame


def _add(job: OpenJob, ticket: int) -> Add:
    """The job as the engine is told of it, with all that has come of it so far."""
    origin = job.origin
    return Add(
        ticket,
        job.prompt,
        job.params,
        job.seed,
        job.priority,
        job.arrival,
        job.output,
        job.last_token,
        origin.tenant,
        origin.program,
        origin.cache_salt,
        job.inherited,
        job.cached_tokens,
    )
