"""Gittins-index scheduling from attained service and a length distribution learned online."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Final

from ..cost import Cost
from ..types import FinishReason, Job
from .base import Policy, charge_ahead
from .deadlines import Deadlines
from .groups import Group
from .hazards import bucket, edge
from .indices import Indices, Key, Kind, kind_of
from .lengths import LengthDistribution
from .mlfq import PROMOTED_QUANTA, SPENT, MultiLevelFeedbackQueue
from .queue import JobQueue

# What jobs that waited too long may take of the device's time, or of their tenant's share of it. In an overload all
# wait too long: then this goes to them, first come, first served, and the index decides about the rest. At a load of
# 1.2, an eighth costs a sixth of the mean JCT where the index matters most (Zipf 0.99, Alpaca), and a quarter a third.
PROMOTED_SHARE: Final = 1 / 8

# Jobs that look for their place anew in one decision, when groups have got a table or lost it.
_REGROUPED_PER_DECISION: Final = 256


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
    groups: Sequence[Group]  # that its length will tell about
    call: int  # its number among those of its program; 0: it is no program's
    program: int  # of which kind that is; 0: unknown


class Gittins(Policy):
    """Smallest Gittins index first, once the distribution of output lengths is learned; until then, and again after it
    has drifted, exactly skip-join-mlfq.

    Jobs that look alike (see Kind) form a cohort: a queue with one index. A job changes cohorts only at the edges of
    age buckets, so a decision costs the same however many jobs wait. Cohorts are sorted by their index, in steps of
    20 %; on a tie the older goes first, so that lengths without a surprise in them (constant, exponential) are served
    first come, first served, to completion.

    What is minimized is the completion time of programs, a job that is no program's being one of a single call.

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
        indices: Indices | None = None,
    ) -> None:
        """`lengths` may be shared, and so may `indices`, made of it; `batch`: the most jobs in an iteration."""
        self._cost = cost
        self._lengths = lengths
        self._indices = indices or Indices(cost=cost, lengths=lengths, batch=batch)
        self._num_levels = num_levels
        self._starvation_limit, self._slowdown_limit = starvation_limit, slowdown_limit
        self._quantum = cost.decode_seconds(1)
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
        self._regrouped = self._lengths.regrouped
        self._to_regroup: deque[Job] = deque()  # jobs that were placed before groups changed
        self._ahead: dict[Key, float] = {}  # work of the cohorts before each; empty: to be computed

    def _skip_join(self) -> MultiLevelFeedbackQueue:
        return MultiLevelFeedbackQueue(
            quantum=self._quantum - self._indices.shared,
            shared=self._indices.shared,
            num_levels=self._num_levels,
            starvation_limit=self._starvation_limit,
            slowdown_limit=self._slowdown_limit,
            skip_join=True,
            prefill=partial(self._cost.prefill_charge, 0),
        )

    # --- events ------------------------------------------------------------------------------------------------------

    def add(self, job: Job, now: float) -> None:
        self._lengths.saw_prompt(len(job.prompt))
        groups, call, program = self._lengths.groups_of(job), self._indices.call(job), self._indices.program(job)
        self._places[job] = _Place(None, bucket(_age(job)), 0, groups, call, program)
        if self._unlearned is not None:
            self._unlearned.add(job, now)
        else:
            self._join(job)
            self._deadlines.watch(job, now)

    def refresh(self, job: Job, now: float) -> None:
        if self._unlearned is not None:
            self._unlearned.refresh(job, now)
            return
        if self._places[job].cohort is not None:
            self._join(job)
            self._deadlines.sooner(job)
        else:
            self._expect(job)

    def remove(self, job: Job) -> None:
        place = self._places[job]
        if place.reported >= 0:  # on_finish was not called
            self._lengths.censored(place.reported, len(job.output), place.groups, complete=False)
        if self._unlearned is not None:
            self._unlearned.remove(job)
        else:
            self._leave(job)
            self._deadlines.forget(job)
        del self._places[job]

    def on_service(self, job: Job, seconds: float, now: float) -> None:
        place = self._places[job]
        age = _age(job)
        # At once, or those that wait at an edge would be missing; on_finish takes it back if this token was the last.
        if age > 0 and (reached := bucket(age)) > place.reported:
            self._lengths.survived(place.reported, reached, place.groups)
            place.reported = reached
        if self._unlearned is not None:
            self._unlearned.on_service(job, seconds, now)
        elif place.cohort is not None:
            if age >= place.next_age or place.cohort.kind[0]:
                self._join(job)
        elif age >= place.next_age:
            self._charge(job)

    def on_finish(self, job: Job, output_tokens: int, now: float) -> None:
        place = self._places[job]
        if job.finish_reason is FinishReason.LENGTH:
            self._lengths.censored(place.reported, output_tokens, place.groups, complete=True)
        else:
            self._lengths.ended(place.reported, output_tokens, place.groups)
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
        if self._to_regroup:
            self._regroup()
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
            key, remaining = self._indices.of(kind)
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
            seconds, decode = charge_ahead(job, self._indices.shared), self._cost.decode_seconds(len(job.prompt) + 1)
            age += 1
        self._places[job].next_age = age + PROMOTED_QUANTA
        self._deadlines.charge((seconds + PROMOTED_QUANTA * (decode - self._indices.shared)) / self.share)
        self._expect(job)

    def _expect(self, job: Job) -> None:
        """Put right what a promoted job is expected to take yet."""
        self._front.set_seconds(job, self._indices.of(self._kind(job))[1])
        self._ahead.clear()

    def _kind(self, job: Job) -> Kind:
        age, place = _age(job), self._places[job]
        prefill = self._indices.prefill_level(job) if job.served < len(job.prompt) else 0
        table = next((group.table for group in place.groups if group.table), 0)
        return prefill, bucket(age), bucket(max(job.max_output, age + 1) - 1), table, place.call, place.program

    def _work(self, key: Key) -> float:
        cohort = self._cohorts[kind_of(key)]
        return len(cohort.jobs) * cohort.remaining

    def _sort(self) -> None:
        """Give every cohort the index that the new table makes of it."""
        self._version = self._lengths.version
        self._ahead.clear()
        for cohort in self._cohorts.values():
            cohort.key, cohort.remaining = self._indices.of(cohort.kind)
        self._sorted = {cohort.key: cohort.jobs for cohort in self._cohorts.values()}
        self._order = sorted(self._sorted)
        if self._regrouped != self._lengths.regrouped:
            self._regrouped = self._lengths.regrouped
            self._to_regroup = deque(chain.from_iterable(map(self._sorted.__getitem__, self._order)))

    def _regroup(self) -> None:
        """Some jobs look for their cohorts again, in their present order; it takes several decisions for all to."""
        for _ in range(min(len(self._to_regroup), _REGROUPED_PER_DECISION)):
            place = self._places.get(job := self._to_regroup.popleft())
            if place is not None and place.cohort is not None:
                self._join(job)

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
