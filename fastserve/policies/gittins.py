"""Gittins-index scheduling from attained service and a length distribution learned online."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from ..cost import Cost
from ..types import FinishReason, Job
from .base import Policy
from .deadlines import Deadlines
from .lengths import LengthDistribution, bucket, edge
from .mlfq import PROMOTED_QUANTA, SPENT, MultiLevelFeedbackQueue
from .queue import JobQueue

# Indices within this factor of each other are as good as equal: the table is not known better, and what an order among
# them could gain is less than what preempting for it costs.
_RESOLUTION: Final = 1.2

# Remaining prefills, in decodes of a full batch, are told apart two to an octave, down to 2^-4 decodes.
_PREFILLS_PER_OCTAVE: Final = 2
_LOWEST_PREFILL: Final = -4 * _PREFILLS_PER_OCTAVE

# What jobs that waited too long may take of the device's time. In an overload all wait too long: then this share goes
# to them, first come, first served, and the index decides about the rest. At a load of 1.2, an eighth costs a sixth of
# the mean JCT where the index matters most (Zipf 0.99, Alpaca), and a quarter a third.
PROMOTED_SHARE: Final = 1 / 8

_NEGLIGIBLE: Final = 1e-6  # share of jobs that get this old

# What a cohort's jobs have in common: the level of their remaining prefill (0: none), the bucket of their age, and that
# of the age at which max_output ends them.
Kind = tuple[int, int, int]
# Sorts cohorts: index level; then the oldest first; then the kind.
Key = tuple[int, int, int, int]


def gittins(
    prefill: float, age: int, last: int, hazard: Callable[[int], float], decode: Callable[[int], float]
) -> tuple[float, float, float]:
    """The Gittins index of a job in bucket `age` with `prefill` seconds left; its expected seconds and decodes left.

    The index is the least, over all stretches ahead, of the expected seconds spent within the stretch by the chance to
    be done within it; a small one is good. `hazard(b)` is the chance to end in bucket b for a job that reaches it, and
    `decode(b)` the seconds of a token in it. All end in bucket `last`. Ends are evenly spread over their bucket; the
    first token of all comes with the prefill.
    """
    spent, decodes, alive, best = prefill, 0.0, 1.0, math.inf
    for index in range(age, last + 1):
        ends = hazard(index) if index < last else 1.0
        if index > 0:
            tokens = edge(index + 1) - edge(index)
            expected = alive * ((1 - ends) * tokens + ends * (tokens + 1) / 2)
            decodes += expected
            spent += expected * decode(index)
        alive *= 1 - ends
        if alive < 1.0:
            best = min(best, spent / (1 - alive))
        if alive < _NEGLIGIBLE:
            break
    return best, spent, decodes


@dataclass(slots=True, eq=False)
class _Cohort:
    kind: Kind
    key: Key
    remaining: float  # expected own seconds until one of its jobs is done
    jobs: JobQueue  # each counts 1


@dataclass(slots=True)
class _Place:
    cohort: _Cohort | None  # None: promoted
    reported: int  # buckets before this one the distribution knows the job to have survived
    next_age: int  # at which the job leaves its bucket; at which a promoted one is charged for more


class Gittins(Policy):
    """Smallest Gittins index first, once the distribution of output lengths is learned; until then, and again after it
    has drifted, exactly skip-join-mlfq.

    Jobs that look alike (age, remaining prefill, max_output; see Kind) form a cohort: a queue with one index. A job
    changes cohorts only at the edges of age buckets, so a decision costs the same however many jobs wait. Cohorts are
    sorted by their index, in steps of 20 %; on a tie the older goes first, so that lengths without a surprise in them
    (constant, exponential) are served first come, first served, to completion.

    For the index, seconds are what a job takes from the others in a full batch: its share of what an iteration costs
    whatever is in it, and all of what it adds. By its solo time, a long prompt would look cheap beside the decodes.

    Jobs that waited too long (see Deadlines) go to the very front, and stay there until they are done: given turns,
    they would only become more jobs half done. They are promoted one by one, in a share of the device's time.
    """

    def __init__(
        self,
        *,
        cost: Cost,
        lengths: LengthDistribution,
        num_levels: int,
        batch: int = 1,
        starvation_limit: float | None,
        slowdown_limit: float | None = None,
    ) -> None:
        """`lengths` may be shared; `batch` is the largest number of jobs in an iteration."""
        self._cost = cost
        self._lengths = lengths
        self._num_levels = num_levels
        self._starvation_limit, self._slowdown_limit = starvation_limit, slowdown_limit
        self._quantum = cost.decode_seconds(1)
        self._shared = max(0.0, self._quantum - cost.prefill_charge(1, 2)) * (1 - 1 / batch)  # paid by the others
        self._unit = self._quantum - self._shared
        self._places: dict[Job, _Place] = {}
        # What decides until enough is learned.
        self._unlearned: MultiLevelFeedbackQueue | None = None if lengths.learned else self._skip_join()
        self._clear()

    def _clear(self) -> None:
        self._version = -1
        self._deadlines = Deadlines(
            starvation_limit=self._starvation_limit,
            slowdown_limit=self._slowdown_limit,
            quantum=self._quantum,
            share=PROMOTED_SHARE,
        )
        self._front = JobQueue()  # promoted jobs, with their expected own seconds until they are done
        self._cohorts: dict[Kind, _Cohort] = {}  # none is empty
        self._order: list[Key] = []
        self._sorted: dict[Key, JobQueue] = {}
        self._indices: dict[Kind, tuple[float, float]] = {}
        self._decodes: list[float] = []  # seconds of a token, by bucket
        self._ahead: dict[Key, float] = {}  # work of the cohorts before each; empty: to be computed

    def _skip_join(self) -> MultiLevelFeedbackQueue:
        return MultiLevelFeedbackQueue(
            quantum=self._quantum,
            num_levels=self._num_levels,
            starvation_limit=self._starvation_limit,
            slowdown_limit=self._slowdown_limit,
            skip_join=True,
        )

    # --- events ------------------------------------------------------------------------------------------------------

    def add(self, job: Job, now: float) -> None:
        self._lengths.saw_prompt(len(job.prompt))
        self._places[job] = _Place(None, bucket(_age(job)), 0)
        if self._unlearned is not None:
            self._unlearned.add(job, now)
        else:
            self._join(job)
            self._deadlines.watch(job, now)

    def remove(self, job: Job) -> None:
        place = self._places[job]
        if place.reported >= 0:  # on_finish was not called
            self._lengths.censored(place.reported, len(job.output), complete=False)
        if self._unlearned is not None:
            self._unlearned.remove(job)
        else:
            self._leave(job)
            self._deadlines.forget(job)
        del self._places[job]

    def on_service(self, job: Job, own_seconds: float, now: float) -> None:
        place = self._places[job]
        age = _age(job)
        # At once, or those that wait at an edge would be missing; on_finish takes it back if this token was the last.
        if age > 0 and (reached := bucket(age)) > place.reported:
            self._lengths.survived(place.reported, reached)
            place.reported = reached
        if self._unlearned is not None:
            self._unlearned.on_service(job, own_seconds, now)
        elif place.cohort is not None:
            if age >= place.next_age or place.cohort.kind[0]:
                self._join(job)
        elif age >= place.next_age:
            self._charge(job)

    def on_finish(self, job: Job, output_tokens: int, now: float) -> None:
        place = self._places[job]
        if job.finish_reason is FinishReason.LENGTH:
            self._lengths.censored(place.reported, output_tokens, complete=True)
        else:
            self._lengths.ended(place.reported, output_tokens)
        place.reported = -1

    # --- answers -----------------------------------------------------------------------------------------------------

    def horizon(self, job: Job) -> float:
        if self._unlearned is not None:
            return self._unlearned.horizon(job)
        place = self._places[job]
        if place.cohort.kind[0] if place.cohort is not None else job.served < len(job.prompt):
            return job.next_seconds * (1 - SPENT)
        # No later token costs less, so this is not past the edge.
        return (place.next_age - _age(job)) * job.next_seconds * (1 - SPENT)

    def next_deadline(self) -> float | None:
        return self._deadlines.next() if self._unlearned is None else self._unlearned.next_deadline()

    def deadline(self, job: Job) -> float:
        return self._deadlines.of(job) if self._unlearned is None else self._unlearned.deadline(job)

    def move(self, job: Job, tier: int | None) -> None:
        if self._unlearned is not None:
            self._unlearned.move(job, tier)
        else:
            cohort = self._places[job].cohort
            (cohort.jobs if cohort is not None else self._front).move(job, tier)

    def iter_best(self, now: float) -> Iterator[Job]:
        if (self._unlearned is None) is not self._lengths.learned:
            self._switch(now)
        if self._unlearned is not None:
            return self._unlearned.iter_best(now)
        if self._version != self._lengths.version:
            self._sort()
        for job in self._deadlines.pop_due(now):
            self._leave(job)
            self._places[job].cohort = None
            self._front.append(job, 0.0)
            self._charge(job)
            self._places[job].next_age += 1  # if it ends with what it is charged for, there is no more to charge
        return chain(self._front, chain.from_iterable(map(self._sorted.__getitem__, self._order)))

    def iter_tier(self, tier: int, worst_first: bool = False) -> Iterator[Job]:
        if self._unlearned is not None:
            return self._unlearned.iter_tier(tier, worst_first)
        cohorts = map(self._sorted.__getitem__, reversed(self._order) if worst_first else self._order)
        queues = chain(cohorts, (self._front,)) if worst_first else chain((self._front,), cohorts)
        return chain.from_iterable(queue.tier(tier, worst_first) for queue in queues)

    def rank(self, job: Job) -> tuple[float, ...]:
        if self._unlearned is not None:
            return self._unlearned.rank(job)
        cohort = self._places[job].cohort
        if cohort is None:
            return 0, self._front.ticket(job)
        return 1, *cohort.key, cohort.jobs.ticket(job)

    def work_ahead(self, job: Job, now: float) -> float:
        """Expected remaining seconds of all jobs in better cohorts and of those before it in its own."""
        if self._unlearned is not None:
            return self._unlearned.work_ahead(job, now)
        cohort = self._places[job].cohort
        if cohort is None:
            return self._front.ahead(job)
        if not self._ahead:
            total = self._front.total()
            for key in self._order:
                self._ahead[key] = total
                total += self._work(key)
        return self._ahead[cohort.key] + cohort.jobs.ahead(job) * cohort.remaining

    def backlog(self, now: float) -> float:
        if self._unlearned is not None:
            return self._unlearned.backlog(now)
        return self._front.total() + sum(map(self._work, self._order))

    def quanta(self) -> Sequence[float]:
        return () if self._unlearned is None else self._unlearned.quanta()

    def level(self, job: Job) -> int:
        return 0 if self._unlearned is None else self._unlearned.level(job)

    def __len__(self) -> int:
        return len(self._places)

    # --- cohorts -----------------------------------------------------------------------------------------------------

    def _join(self, job: Job) -> None:
        """Move the job to the tail of the cohort that it belongs to now, or leave it where it is if it is there."""
        place = self._places[job]
        kind = self._kind(job)
        place.next_age = edge(kind[1] + 1)
        if place.cohort is not None and place.cohort.kind == kind:
            return
        self._leave(job)
        cohort = self._cohorts.get(kind)
        if cohort is None:
            key, remaining = self._key(kind)
            cohort = self._cohorts[kind] = _Cohort(kind, key, remaining, JobQueue())
            insort(self._order, key)
            self._sorted[key] = cohort.jobs
        cohort.jobs.append(job, 1.0)
        place.cohort = cohort
        self._ahead.clear()

    def _leave(self, job: Job) -> None:
        """Take the job out of its cohort, or from the front."""
        self._ahead.clear()
        cohort = self._places[job].cohort
        if cohort is None:
            if job in self._front:
                self._front.remove(job)
            return
        cohort.jobs.remove(job)
        if not cohort.jobs:
            del self._cohorts[cohort.kind], self._sorted[cohort.key]
            del self._order[bisect_left(self._order, cohort.key)]

    def _charge(self, job: Job) -> None:
        """Charge a promoted job for its next tokens: its prompt, and some decodes."""
        age, seconds, decode = _age(job), 0.0, job.next_seconds
        if job.served < len(job.prompt):
            seconds, decode = self._prefill(job), self._cost.decode_seconds(len(job.prompt) + 1)
            age += 1
        self._places[job].next_age = age + PROMOTED_QUANTA
        self._deadlines.charge(seconds + PROMOTED_QUANTA * (decode - self._shared))
        self._front.set_seconds(job, self._key(self._kind(job))[1])
        self._ahead.clear()

    def _prefill(self, job: Job) -> float:
        """Seconds that the rest of a job's prompt takes from the others."""
        # The first part of a prompt is charged what an iteration costs whatever is in it, the others are not.
        return job.next_seconds - (0.0 if job.served else self._shared)

    def _kind(self, job: Job) -> Kind:
        age = _age(job)
        prefill = 0
        if job.served < len(job.prompt):
            level = round(_PREFILLS_PER_OCTAVE * math.log2(max(self._prefill(job) / self._unit, 1e-9)))
            prefill = 1 + max(0, level - _LOWEST_PREFILL)
        return prefill, bucket(age), bucket(max(job.max_output, age + 1) - 1)

    def _key(self, kind: Kind) -> tuple[Key, float]:
        """Where a cohort of this kind belongs, and the expected remaining seconds of its jobs."""
        known = self._indices.get(kind)
        if known is None:
            prefill, age, last = kind
            seconds = 0.0
            if prefill:
                seconds = self._unit * 2 ** ((prefill - 1 + _LOWEST_PREFILL) / _PREFILLS_PER_OCTAVE)
            index, remaining, decodes = gittins(seconds, age, last, self._lengths.hazard, self._decode)
            known = self._indices[kind] = index, remaining + self._shared * (decodes + bool(prefill))
        index, remaining = known
        level = round(math.log(index / self._unit, _RESOLUTION))
        return (level, -kind[1], kind[0], kind[2]), remaining

    def _decode(self, index: int) -> float:
        """Seconds that a token of a job in a bucket takes from the others, after a prompt of the usual length."""
        for more in range(len(self._decodes), index + 1):
            age = (edge(more) + edge(more + 1)) // 2
            solo = self._cost.decode_seconds(round(self._lengths.mean_prompt) + max(1, age))
            self._decodes.append(solo - self._shared)
        return self._decodes[index]

    def _work(self, key: Key) -> float:
        _, age, prefill, last = key
        cohort = self._cohorts[prefill, -age, last]
        return len(cohort.jobs) * cohort.remaining

    def _sort(self) -> None:
        """Give every cohort the index that the new table makes of it."""
        self._version = self._lengths.version
        self._indices.clear()
        self._decodes.clear()
        self._ahead.clear()
        for cohort in self._cohorts.values():
            cohort.key, cohort.remaining = self._key(cohort.kind)
        self._sorted = {cohort.key: cohort.jobs for cohort in self._cohorts.values()}
        self._order = sorted(self._sorted)

    def _switch(self, now: float) -> None:
        """Hand all jobs over, in their present order, so that those that run go on."""
        if self._unlearned is not None:
            jobs = list(self._unlearned.iter_best(now))
            self._unlearned = None
            self._version = self._lengths.version
            for job in jobs:
                self._join(job)
                self._deadlines.watch(job, now)
        else:
            jobs = [*self._front, *chain.from_iterable(map(self._sorted.__getitem__, self._order))]
            self._clear()
            self._unlearned = self._skip_join()
            for job in jobs:
                self._places[job].cohort = None
                self._unlearned.add(job, now)


def _age(job: Job) -> int:
    """Tokens emitted. The token of an iteration is appended after its service is reported."""
    return max(len(job.output), job.served - len(job.prompt) + 1)
