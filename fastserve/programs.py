"""Programs: chains of calls, each a job, that somebody waits for as a whole, such as an agent's.

Of a program its users tell no more than that a job is a call of it. What its calls were served together, how long it
thinks between them, and how likely it is to call again, is learned here.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final, TypeVar

from .types import FinishReason, Job

Name = TypeVar("Name", str, int)

# Programs that are remembered while none of their calls is live.
_MOST_IDLE: Final = 65_536

# Tenants, and prompts that programs begin with, of which it is remembered how many calls their programs make.
_MOST_TENANTS: Final = 1024
_MOST_KINDS: Final = 1024

# Programs that are known to have ended until those that begin alike are a kind of their own.
_FEW_ENDED: Final = 8

# A program is taken to have ended when it has been thinking for this many times what 99 in 100 thoughts take.
_GIVEN_UP: Final = 3.0
# Seconds of a thought that 9 in 10 are shorter than, until some have been measured.
_GUESS: Final = 10.0
_FEW_THOUGHTS: Final = 8

# KV is kept for as long as 9 in 10 thoughts take, unless it is hardly ever come back for.
_KEPT_FOR: Final = 0.9
_KEPT_AT_MOST: Final = 3600.0  # seconds: whoever comes back later computes it again
_RARE: Final = 1 / 8

# What other programs say counts as much as this many thoughts of its own.
_OTHERS_THOUGHTS: Final = 4.0

# Numbers of calls that are told apart, and how many programs' word about one of them what all of them do counts as.
_MOST_CALLS: Final = 64
_ALL_CALLS: Final = 8.0

_MEMORY: Final = 1000.0  # thoughts, and ends of calls, after which one counts 1/e of a new one


class Quantiles:
    """Of positive numbers, those of late counting most, to within 5 %: a histogram of their logarithms."""

    _PER_OCTAVE: Final = 8
    _LOWEST, _HIGHEST = -10 * _PER_OCTAVE, 20 * _PER_OCTAVE  # 1 ms to 12 days, of seconds

    def __init__(self) -> None:
        self._counts = [0.0] * (self._HIGHEST - self._LOWEST + 1)
        self._scale = 1.0
        self.count = 0
        self.mean_log = 0.0  # of the logarithms to base 2

    def add(self, value: float) -> float:
        """Returns the logarithm, cut to what is told apart."""
        log = math.log2(max(value, 1e-9))
        log = min(max(log, self._LOWEST / self._PER_OCTAVE), self._HIGHEST / self._PER_OCTAVE)
        self._counts[round(log * self._PER_OCTAVE) - self._LOWEST] += self._scale
        self._scale /= 1 - 1 / _MEMORY
        if self._scale > 1e100:
            self._counts = [count / self._scale for count in self._counts]
            self._scale = 1.0
        self.count += 1
        self.mean_log += (log - self.mean_log) / min(self.count, _MEMORY)
        return log

    def at(self, share: float) -> float:
        """The number that this share of them does not exceed. One at least must have been added."""
        sums = list(accumulate(self._counts))
        return 2 ** ((bisect_left(sums, share * sums[-1]) + self._LOWEST) / self._PER_OCTAVE)


@dataclass(slots=True)
class _Program:
    live: dict[Job, None] = field(default_factory=dict)
    calls: int = 0  # those that began while another was live count as one: several answers, or parts of one step
    group: int | None = None  # of its first prompt
    served: float = 0.0  # seconds charged, of all calls, as far as it was told
    idle_since: float = 0.0
    thoughts: int = 0
    mean_log: float = 0.0  # of its thoughts


class _Ends:
    """By number of calls: how many programs came to it and are known to have gone on or not, and which have not.

    And what a call of them is charged.
    """

    __slots__ = ("calls", "ended", "reached", "seconds")

    def __init__(self) -> None:
        self.calls = 0
        self.seconds = 0.0  # of a call, on average
        self.reached = [0.0] * (_MOST_CALLS + 1)
        self.ended = [0.0] * (_MOST_CALLS + 1)

    def add(self, calls: int, ended: float) -> None:
        keep = 1 - 1 / _MEMORY
        self.reached[calls] = self.reached[calls] * keep + 1
        self.ended[calls] = self.ended[calls] * keep + ended

    def saw(self, seconds: float) -> None:
        """A call is complete."""
        self.calls += 1
        self.seconds += (seconds - self.seconds) / min(self.calls, _MEMORY)

    def take_back(self, calls: int) -> None:
        """One that was taken to have ended has not."""
        self.ended[calls] = max(0.0, self.ended[calls] - 1)

    def chance(self, calls: int, others: float) -> float:
        """That it ends there, going by the others' while few have come to it."""
        return (self.ended[calls] + _ALL_CALLS * others) / (self.reached[calls] + _ALL_CALLS)


class Programs:
    """Of one engine. Programs are told apart within a tenant. O(1) an event; the memory is bounded."""

    def __init__(self) -> None:
        self._live: dict[tuple[str, str], _Program] = {}
        # The others, in the order in which they fell idle: those that are thinking, and those taken to have ended.
        self._thinking: OrderedDict[tuple[str, str], _Program] = OrderedDict()
        self._over: OrderedDict[tuple[str, str], _Program] = OrderedDict()
        self._thoughts = Quantiles()
        self._patience = _GIVEN_UP * _GUESS
        self._all = _Ends()
        # By tenant, and by what programs begin with; last those of which something was learned last.
        self._own: OrderedDict[str, _Ends] = OrderedDict()
        self._kinds: OrderedDict[int, _Ends] = OrderedDict()

    def served(self, job: Job) -> float:
        """Modelled seconds of service that the program has had in its other calls, for a job that comes now.

        Of live ones, what policies have been told of. A job that a lost engine left brings its own service with it.
        """
        program = self._find(job)
        return 0.0 if program is None else program.served

    def number(self, job: Job) -> int:
        """Which of the program's calls a job is that comes now, from 1 on; 0 for one that is no program's."""
        if job.program is None:
            return 0
        program = self._find(job)
        return 1 if program is None else max(1, program.calls + (not program.live))

    def arrived(self, job: Job, now: float) -> None:
        """A job came."""
        if job.program is None:
            return
        self._give_up(now)
        key = job.tenant, job.program
        program = self._live.get(key)
        if program is None:
            program = self._live[key] = self._wake(key, job.group, now)
            program.calls += 1
        program.live[job] = None
        program.served += job.charged

    def on_service(self, job: Job, seconds: float) -> None:
        """A live job's `charged` has grown by so much."""
        if job.program is not None:
            self._live[job.tenant, job.program].served += seconds

    def ended(self, job: Job, now: float) -> None:
        """A job that came has ended, however, and all of its service has been told."""
        if job.program is None:
            return
        key = job.tenant, job.program
        program = self._live[key]
        if job.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._all.saw(job.charged)
            if (kind := self._kinds.get(program.group or 0)) is not None:
                kind.saw(job.charged)
        del program.live[job]
        if not program.live:
            del self._live[key]
            program.idle_since = now
            self._thinking[key] = program
            if len(self._thinking) + len(self._over) > _MOST_IDLE:
                if self._over:
                    self._over.popitem(last=False)
                else:
                    (tenant, _), program = self._thinking.popitem(last=False)
                    self._resolve(tenant, program, ended=1.0)
        self._give_up(now)

    def kind(self, job: Job) -> int:
        """What sort of program a job is a call of that comes now: one number for all that begin alike; 0: unknown."""
        program = self._find(job)
        group = job.group if program is None else program.group
        kind = self._kinds.get(group or 0)
        return group or 0 if kind is not None and sum(kind.ended) >= _FEW_ENDED else 0

    def call_seconds(self, kind: int = 0) -> float:
        """What a call is charged on average, of all programs or of those of a kind."""
        ends = self._kinds.get(kind)
        return self._all.seconds if ends is None or not ends.calls else ends.seconds

    def ends(self, calls: int, tenant: str | None = None, kind: int = 0) -> float:
        """The chance that a program which has come to its call of this number, from 1 on, makes no other.

        Of all programs; of a kind's, or of a tenant's, going by all while its own are few.
        """
        calls = min(calls, _MOST_CALLS)
        overall = (sum(self._all.ended) + 1) / (sum(self._all.reached) + 2)
        chance = self._all.chance(calls, overall)
        own = self._kinds.get(kind) if tenant is None else self._own.get(tenant)
        return chance if own is None else own.chance(calls, chance)

    def keep_until(self, job: Job, now: float) -> float:
        """Until when the KV of a job that has ended is likely to be come back for: `now` where it is not.

        As long as 9 in 10 of the program's thoughts take, going by its own and, while these are few, by those of all.
        A name alone keeps nothing: of a program that has called once, KV is kept if most of its tenant's call again.
        """
        if job.program is None or job.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            return now
        program = self._find(job)
        if program is None:
            return now
        ends = self.ends(program.calls, job.tenant)
        if ends > 1 - _RARE or (program.calls == 1 and ends >= 0.5):
            return now
        if self._thoughts.count < _FEW_THOUGHTS:
            return now + _GUESS
        own = program.thoughts / (program.thoughts + _OTHERS_THOUGHTS)
        longer = 2 ** (own * (program.mean_log - self._thoughts.mean_log))
        return now + min(self._thoughts.at(_KEPT_FOR) * longer, _KEPT_AT_MOST)

    @property
    def alive(self) -> int:
        """Programs with live calls, and those that are thinking."""
        return len(self._live) + len(self._thinking)

    def __len__(self) -> int:
        """Programs that are remembered."""
        return len(self._live) + len(self._thinking) + len(self._over)

    def _find(self, job: Job) -> _Program | None:
        if job.program is None:
            return None
        key = job.tenant, job.program
        return self._live.get(key) or self._thinking.get(key) or self._over.get(key)

    def _wake(self, key: tuple[str, str], group: int | None, now: float) -> _Program:
        """The program, new or idle until now, whose thought has taken until now."""
        program = self._thinking.pop(key, None)
        if program is None:
            program = self._over.pop(key, None)
            if program is None:
                return _Program(group=group)
            calls = min(program.calls, _MOST_CALLS)  # it has not ended after all
            self._all.take_back(calls)
            for own in (self._own.get(key[0]), self._kinds.get(program.group or 0)):
                if own is not None:
                    own.take_back(calls)
        else:
            self._resolve(key[0], program, ended=0.0)
        log = self._thoughts.add(now - program.idle_since)
        program.thoughts += 1
        program.mean_log += (log - program.mean_log) / program.thoughts
        if self._thoughts.count >= _FEW_THOUGHTS:
            self._patience = _GIVEN_UP * self._thoughts.at(0.99)
        return program

    def _give_up(self, now: float) -> None:
        """Programs that have been thinking for too long have ended."""
        while self._thinking:
            key = next(iter(self._thinking))
            if self._thinking[key].idle_since + self._patience >= now:
                return
            program = self._thinking.pop(key)
            self._resolve(key[0], program, ended=1.0)
            self._over[key] = program

    def _resolve(self, tenant: str, program: _Program, *, ended: float) -> None:
        """It is known whether the program goes on after its latest call."""
        calls = min(program.calls, _MOST_CALLS)
        self._all.add(calls, ended)
        _of(self._own, tenant, _MOST_TENANTS).add(calls, ended)
        if program.group:
            _of(self._kinds, program.group, _MOST_KINDS).add(calls, ended)


def _of(groups: OrderedDict[Name, _Ends], name: Name, most: int) -> _Ends:
    """What is known of those of a name, which something is learned of now; the one not heard of longest goes."""
    ends = groups.get(name)
    if ends is None:
        ends = groups[name] = _Ends()
        if len(groups) > most:
            groups.popitem(last=False)
    groups.move_to_end(name)
    return ends
