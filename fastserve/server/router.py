"""Which engine does which job: the truth of all open jobs, over what each of several engines owes.

    open ──▶ [ open_jobs ] ──the engine that is expected to be done first──▶ Ledger ──▶ engine
                                   ▲                                          │
                                   └── down, slow to come back, overfull ─────┘

A job is always some engine's. It goes to another when its engine dies and another is expected to be done with it
sooner, when its engine does not come back as soon as was thought, when a suspect has its engine for itself, and when
it has not begun and another engine has rows to spare. Results are deterministic, and a job's output goes with it, so
nobody sees that but by the clock.

Blame limits where a job may go (ledger.py): one that may have brought an engine down stays with that engine, so that
however many there are, a job crashes one of them only.

A job whose prompt begins like one that an engine has had lately (affinity.py) is less work there, by the prefill of
what they have in common. So the next turn of a conversation and the next call of an agent go where the last was, unless
another engine would be done sooner all the same; and answers to one prompt each go their own way, unless they find it
computed. Where engines are equally good, a program goes to the one it was on.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

import numpy as np

from ..backlog import OutputLengths
from ..config import check_integer
from ..ipc import Ready, Refused, Status, Step
from ..origin import Origin
from ..tokenizer import Tokenizer
from ..types import MAX_SEED, FinishReason, InvalidRequest, SamplingParams
from .affinity import Affinity
from .jobs import OpenJob
from .ledger import Ledger, confined, order
from .load import Load, Work
from .program_service import ProgramService
from .supervisor import Send

_LOOK: Final = 1024  # jobs of an engine that may go to others at a time: an engine is heard of four times a second


class Router:
    """`open_jobs` holds, by key, every job that has neither ended nor been closed. Engines go by their number.

    No sockets, no processes, no tasks: every method belongs to the event loop's thread and returns at once.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, engines: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.open_jobs: dict[int, OpenJob] = {}
        self.ledgers = [Ledger(self._ended) for _ in range(engines)]
        self.loads = [Load(clock) for _ in range(engines)]
        self.failures: list[str | None] = [None] * engines  # why an engine does not start any more
        self._tokenizer = tokenizer
        self._lengths = OutputLengths()
        self._affinity = Affinity(engines)
        self._programs = ProgramService()
        self._context = 2**31 - 1  # tokens of prompt and output at most
        self._keys = 0
        self._turn = 0  # who is first where all are alike

    # --- from the HTTP layer -----------------------------------------------------------------------------------------

    def open(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int,
        priority: int,
        origin: Origin,
        arrival: float | None,
    ) -> OpenJob:
        """Raises InvalidRequest for what can be told to no engine, and for stop strings without a tokenizer."""
        if params.stop and self._tokenizer is None:
            raise InvalidRequest("stop", "needs a tokenizer, and the model has none; use stop_token_ids")
        tokens = _ids(prompt)
        check_integer("seed", seed, 0, MAX_SEED)
        check_integer("priority", priority, -(2**31), 2**31 - 1)
        self._keys += 1
        arrival = time.monotonic() if arrival is None else arrival
        job = OpenJob(self._keys, tokens, params, seed, priority, arrival, origin, self._tokenizer)
        job.inherited = self._programs.of(origin)
        if len(self.ledgers) > 1:
            job.pieces = self._affinity.pieces(origin, tokens)
        job.engine, work = self._choose(job)
        self._turn = (job.engine + 1) % len(self.ledgers)
        self.open_jobs[job.key] = job
        try:
            self._give(job, job.engine, work)
        except BaseException:  # nobody will have the job, to close it
            self.ledgers[job.engine].discard(job)
            self.loads[job.engine].drop(job.key)
            self.open_jobs.pop(job.key, None)
            raise
        return job

    def close(self, job: OpenJob) -> None:
        """Nobody wants the job any more. Nothing happens when it has ended."""
        if job.finish_reason is None:
            self.ledgers[job.engine].close(job)

    def end_all(self, reason: FinishReason, error: str) -> None:
        for ledger in self.ledgers:
            ledger.end_all(reason, error)

    # --- from the engines --------------------------------------------------------------------------------------------

    def engine_up(self, engine: int, ready: Ready, send: Send) -> None:
        """An engine takes jobs, through `send`."""
        self._context = ready.max_model_len
        self.failures[engine] = None
        self.loads[engine].came(ready.info)
        self._affinity.came(engine, ready.info)
        self.ledgers[engine].engine_up(send)
        self._even_out()

    def engine_said(self, engine: int, message: Step | Status | Refused) -> None:
        ledger = self.ledgers[engine]
        if isinstance(message, Step):
            ledger.step(message)
        elif isinstance(message, Refused):
            ledger.refused(message)
        else:
            self.loads[engine].said(message, len(ledger.jobs))
            self._even_out()

    def engine_down(self, engine: int, *, crashed: bool = True) -> None:
        """An engine is gone. Each of its jobs waits for it to come back, or goes on where that is expected sooner."""
        self.ledgers[engine].engine_down(crashed=crashed)
        self.loads[engine].went()
        self._affinity.went(engine)
        self._hand_on(engine, confined)

    def engine_fails(self, engine: int, reason: str) -> None:
        """An engine does not start any more: its jobs are others', and where there are none, they end."""
        self.failures[engine] = reason
        if None not in self.failures:
            self.end_all(FinishReason.ERROR, reason)
        else:
            self._hand_on(engine, lambda job: False)

    # --- whose a job is ----------------------------------------------------------------------------------------------

    def _choose(self, job: OpenJob) -> tuple[int, Work]:
        """The engine that is expected to be done with it first, and what it is there.

        Where that is several it is the one that the job's program was on, else they take turns.
        """
        engines, anywhere = len(self.ledgers), self._work(job)
        best, most, least = self._turn, anywhere, (2, 0.0, False)
        home = self._affinity.home(job.origin) if engines > 1 else None
        for engine in (*range(self._turn, engines), *range(self._turn)) if engines > 1 else ():
            work = self._there(engine, job, anywhere)
            found = self._rank(engine), self.loads[engine].seconds(work), engine != home
            if found < least:
                best, most, least = engine, work, found
        return best, most

    def _there(self, engine: int, job: OpenJob, work: Work) -> Work:
        """What a job is to one engine, which may have the beginning of its prompt."""
        return work._replace(cached=min(self._affinity.found(engine, job.pieces), work.known - 1))

    def _rank(self, engine: int) -> int:
        """0 for an engine that takes jobs, or will; 1 while a suspect has it, 2 where it does not start any more."""
        return 2 if self.failures[engine] is not None else int(self.ledgers[engine].alone)

    def _hand_on(self, engine: int, stays: Callable[[OpenJob], bool]) -> None:
        """Find an engine for each job of one that is down. It may be the same, and is for those that have to stay."""
        if len(self.ledgers) == 1:
            return
        ledger, load = self.ledgers[engine], self.loads[engine]
        for job in sorted(ledger.jobs.values(), key=order):
            load.drop(job.key)
            chosen, work = (engine, self._work(job)) if stays(job) else self._choose(job)
            if chosen == engine:
                load.take(job.key, work)
            else:
                ledger.remove(job)
                self._give(job, chosen, work)

    def _even_out(self) -> None:
        """Give jobs that wait to engines that are expected to be done with them sooner than their own.

        Of an engine that works, those beyond its rows that it has not begun, and only to rows that are free. All jobs
        of an engine are as good as any, so the first that is better off where it is ends the search.
        """
        working = [engine for engine in range(len(self.ledgers)) if self._works(engine)]
        for engine, ledger in enumerate(self.ledgers):
            works, load = engine in working, self.loads[engine]
            others = [other for other in working if other != engine and (not works or self._spare(other) > 0)]
            most = -self._spare(engine) if works else len(ledger.jobs)
            if not others or most <= 0:
                continue
            for job in list(islice(ledger.waiting(), min(most, _LOOK))):
                work = self._work(job)
                there = [(other, self._there(other, job, work)) for other in others]
                seconds, best, moved = min((self.loads[other].seconds(each), other, each) for other, each in there)
                if not ledger.alone and seconds >= load.seconds():
                    break
                load.give_up(job.key, work)
                ledger.remove(job)
                self._give(job, best, moved)
                if works and self._spare(best) <= 0:
                    others.remove(best)
                    if not others:
                        break

    def _works(self, engine: int) -> bool:
        """It runs whatever it has."""
        return self.ledgers[engine].up and self._rank(engine) == 0

    def _spare(self, engine: int) -> int:
        """Rows of an iteration that no job needs; below 0, jobs that have none."""
        return self.loads[engine].rows - len(self.ledgers[engine].jobs)

    def _give(self, job: OpenJob, engine: int, work: Work) -> None:
        job.engine = engine
        self.loads[engine].take(job.key, work)
        if len(self.ledgers) > 1:
            self._affinity.given(engine, job.origin, job.pieces)
        self.ledgers[engine].add(job)

    def _work(self, job: OpenJob) -> Work:
        age, prompt, most = len(job.output), len(job.prompt), job.params.max_tokens
        room = self._context - prompt if most is None else min(most, self._context - prompt)
        left = self._lengths.left(np.array([age], np.float64), np.array([max(0, room - age)], np.float64))
        return Work(prompt + age, float(left[0]))

    def _ended(self, job: OpenJob) -> None:
        del self.open_jobs[job.key]
        self.loads[job.engine].drop(job.key)
        self._programs.ended(job)
        if len(self.ledgers) > 1 and job.output:
            self._affinity.ended(job.engine, job.origin, job.pieces, job.prompt, job.output)
        if job.finish_reason in ("stop", "length"):
            self._lengths.ended(len(job.output))


def _ids(prompt: Sequence[int]) -> list[int]:
    """A list of ints is kept as it is: the jobs of an `n` share it."""
    try:
        checked = array("i", prompt if isinstance(prompt, list) else list(prompt))
        return prompt if type(prompt) is list and set(map(type, prompt)) <= {int} else checked.tolist()
    except (TypeError, OverflowError) as error:
        raise InvalidRequest("prompt", f"must be a list of token ids: {error}") from None
