"""Gittins indices of jobs by what they look like, computed once for all that look alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final

from ..cost import Cost, shared_seconds
from ..programs import Programs
from ..types import Job
from .base import charge_ahead
from .hazards import edge
from .lengths import LengthDistribution

# Indices within this factor of each other are as good as equal: the table is not known better, and what an order among
# them could gain is less than what preempting for it costs.
_RESOLUTION: Final = 1.2

# Remaining prefills, in decodes of a full batch, are told apart two to an octave, down to 2^-4 decodes.
_PREFILLS_PER_OCTAVE: Final = 2
_LOWEST_PREFILL: Final = -4 * _PREFILLS_PER_OCTAVE

_NEGLIGIBLE: Final = 1e-6  # share of jobs that get this old

# Calls of a program are told apart up to this number, and an index looks this many calls ahead.
_MOST_CALLS: Final = 32

# What a cohort's jobs have in common: the level of their remaining prefill (0: none), the bucket of their age, that of
# the age at which max_output ends them, the table of lengths that they go by, their number among the calls of their
# program (0: they are no program's), and what kind of program that is (0: unknown).
Kind = tuple[int, int, int, int, int, int]
# Sorts cohorts: index level; then the latest calls and the oldest jobs first; then the kind.
Key = tuple[int, int, int, int, int, int, int]


def kind_of(key: Key) -> Kind:
    """The kind that a key was made of."""
    _, call, age, prefill, last, table, program = key
    return prefill, -age, last, table, -call, program


def gittins(
    prefill: float,
    age: int,
    last: int,
    hazard: Callable[[int], float],
    decode: Callable[[int], float],
    ends: float = 1.0,
    later: Iterable[tuple[float, float]] = (),
) -> tuple[float, float, float]:
    """The Gittins index of a job in bucket `age` with `prefill` seconds left; its expected seconds and decodes left.

    The index is the least, over all stretches ahead, of the expected seconds spent within the stretch by the chance to
    be done within it; a small one is good. `hazard(b)` is the chance to end in bucket b for a job that reaches it, and
    `decode(b)` the seconds of a token in it. All end in bucket `last`. Ends are evenly spread over their bucket; the
    first token of all comes with the prefill.

    Where the job is a call of a program, done is when the program is: with this job it `ends` by that chance, else with
    one of the `later` calls, each so many expected seconds and again a chance. A stretch ends within this job, or with
    a call.
    """
    spent, decodes, alive, best = prefill, 0.0, 1.0, math.inf
    for index in range(age, last + 1):
        ended = hazard(index) if index < last else 1.0
        if index > 0:
            tokens = edge(index + 1) - edge(index)
            expected = alive * ((1 - ended) * tokens + ended * (tokens + 1) / 2)
            decodes += expected
            spent += expected * decode(index)
        alive *= 1 - ended
        if alive < 1.0 and ends > 0:
            best = min(best, spent / ((1 - alive) * ends))
        if alive < _NEGLIGIBLE:
            break
    total, goes_on = spent, 1 - ends
    for seconds, chance in later:
        total += goes_on * seconds
        goes_on *= 1 - chance
        if goes_on < 1.0:
            best = min(best, total / (1 - goes_on))
    return best, spent, decodes


class Indices:
    """Those of one distribution of lengths and its programs, made anew with its tables; policies may share them.

    Seconds are what a job takes from the others in a full batch: its share of what an iteration costs whatever is in
    it, and all of what it adds. By its solo time, a long prompt would look cheap beside the decodes.
    """

    def __init__(
        self, *, cost: Cost, lengths: LengthDistribution, batch: int = 1, programs: Programs | None = None
    ) -> None:
        """`batch` is the largest number of jobs in an iteration."""
        self._cost = cost
        self._lengths = lengths
        self._programs = Programs() if programs is None else programs
        self.shared = shared_seconds(cost, batch)
        self._unit = cost.decode_seconds(1) - self.shared
        self._version = -1
        self._known: dict[Kind, tuple[Key, float]] = {}
        self._decodes: list[float] = []  # seconds of a token, by bucket

    def call(self, job: Job) -> int:
        """The number of a job that comes now among its program's calls, as far as it is told apart."""
        return min(self._programs.number(job), _MOST_CALLS)

    def program(self, job: Job) -> int:
        """The kind of program that a job is a call of that comes now, as far as it is told apart."""
        return self._programs.kind(job) if job.program is not None else 0

    def prefill_level(self, job: Job) -> int:
        """The level of what the rest of a job's prompt is charged, from 1 on."""
        level = round(_PREFILLS_PER_OCTAVE * math.log2(max(charge_ahead(job, self.shared) / self._unit, 1e-9)))
        return 1 + max(0, level - _LOWEST_PREFILL)

    def of(self, kind: Kind) -> tuple[Key, float]:
        """What sorts the cohort of this kind, and the expected remaining seconds of each of its jobs."""
        if self._version != self._lengths.version:
            self._version = self._lengths.version
            self._known.clear()
            self._decodes.clear()
        known = self._known.get(kind)
        if known is None:
            known = self._known[kind] = self._compute(kind)
        return known

    def _compute(self, kind: Kind) -> tuple[Key, float]:
        prefill, age, last, table, call, program = kind
        seconds = self._unit * 2 ** ((prefill - 1 + _LOWEST_PREFILL) / _PREFILLS_PER_OCTAVE) if prefill else 0.0
        ends, later = 1.0, list[tuple[float, float]]()
        if call:
            programs, each = self._programs, self._programs.call_seconds(program)
            ends = programs.ends(call, kind=program)
            later = [(each, programs.ends(call + more, kind=program)) for more in range(1, _MOST_CALLS)]
        lengths = self._lengths
        index, remaining, decodes = gittins(
            seconds, age, last, lambda bucket: lengths.hazard(bucket, table), self._decode, ends, later
        )
        level = round(math.log(index / self._unit, _RESOLUTION))
        return (level, -call, -age, prefill, last, table, program), remaining + self.shared * (decodes + bool(prefill))

    def _decode(self, index: int) -> float:
        """Seconds that a token of a job in a bucket takes from the others, after a prompt of the usual length."""
        for more in range(len(self._decodes), index + 1):
            age = (edge(more) + edge(more + 1)) // 2
            solo = self._cost.decode_seconds(round(self._lengths.mean_prompt) + max(1, age))
            self._decodes.append(solo - self.shared)
        return self._decodes[index]
