"""The batch that a plan is made of, and when it is chosen anew.

A batch stays as it is until something happens: a job arrives, ends, changes its place in the policy's order, finishes a
prefill, or KV has moved. Whoever brings that about says so (`changed`). A pipeline has a batch for each stage, and each
finds out in its turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from typing import Final

from .charges import Charges
from .config import SchedulerConfig
from .cost import Cost
from .decode_rows import DecodeRows
from .policies import Policy
from .residency import Residency
from .room import Room
from .selection import Selection, select
from .shelter import Shelter
from .swapping import Swapping
from .types import Job

# Times that a batch is chosen anew because room was made at once.
_PASSES: Final = 3

_NOBODY: Final[Set[Job]] = frozenset()


class Batches:
    """One batch for each plan that may hold other jobs than the one before."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: Policy,
        cost: Cost,
        residency: Residency,
        charges: Charges,
        jobs: Mapping[str, Job],
    ) -> None:
        """`jobs`: those that live, kept up by the scheduler."""
        room = Room(config, policy, cost, residency)
        self.swapping = Swapping(config, policy, cost, residency, room)
        self.preemptions = 0
        self._room = room
        self._config = config
        self._policy = policy
        self._cost = cost
        self._residency = residency
        self._charges = charges
        self._jobs = jobs
        self._batches = [DecodeRows(config.max_num_seqs, cost) for _ in range(config.pipeline_parallel_size)]
        self._version = 0  # counts what may change a batch
        self._deadline: float | None = None  # when time alone may change one
        self._mark = 0  # of the decision being made: chosen jobs carry it
        self._barred: dict[Job, None] = {}  # jobs that must stay out of the batch being chosen
        self._fetched: dict[Job, None] = {}  # jobs that were taken out of another batch for it

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[DecodeRows]:
        return iter(self._batches)

    def turn(self, number: int) -> DecodeRows:
        """The batch of that plan."""
        return self._batches[number % len(self._batches)]

    def changed(self, times: int = 1) -> None:
        """So many things have happened that may change a batch."""
        self._version += times

    def idle(self, batch: DecodeRows) -> bool:
        """Whether nobody of the batch runs now."""
        return self.swapping.waits or not (batch.jobs or batch.prefills)

    def fill(self, batch: DecodeRows, now: float, *, alone: bool) -> list[int]:
        """Choose a batch anew if anything has happened; returns the places that need another block.

        `alone`: no plan is in flight, so if nobody runs and nothing moves, nothing will ever happen by itself.
        """
        self.changed(self._charges.tell_all(now) + self._charges.tell_decodes(batch, now))
        growing = batch.growing()
        if (
            batch.version != self._version
            or (self._deadline is not None and now >= self._deadline)
            or len(growing) > self._residency.blocks.free_blocks
            or self.swapping.due
        ):
            growing = self._choose(batch, growing, now)
        if alone and self._jobs and self.idle(batch) and not self._residency.moving:
            growing = self._unstick(batch, growing, now)
        return growing

    def leave(self, job: Job) -> None:
        """Take a job out of the decodes, if it is there."""
        if isinstance(job.batch, DecodeRows):
            seconds = job.batch.remove(job)
            if seconds > 0.0:
                self._charges.left(job, seconds)
                self.changed()

    def pause(self, job: Job, now: float) -> None:
        """A job does not run though there is something for it to do."""
        if job.waiting_since is None:  # else it was chosen for a batch that never ran
            job.metrics.preemptions += 1
            self.preemptions += 1
            job.waiting_since = now

    # --- one decision ------------------------------------------------------------------------------------------------

    def _unstick(self, batch: DecodeRows, growing: list[int], now: float) -> list[int]:
        """Nothing runs and nothing moves, though jobs live: choose anew, now that no plan holds anybody's blocks.

        If that is not enough, others give up their KV for the best job that wants room, and it fits alone.
        """
        growing = self._choose(batch, growing, now)
        if not (batch.jobs or batch.prefills or self._residency.moving):
            for other in self._batches:
                for job in list(other.jobs):
                    self._preempt(job, now)
            self.swapping.force(now)
            growing = self._choose(batch, [], now)
        return growing

    def _choose(self, batch: DecodeRows, growing: list[int], now: float) -> list[int]:
        """Fill the batch anew, and have KV moved for it; returns the places that need another block."""
        blocks, size = self._residency.blocks, self._config.block_size
        growers = {batch.jobs[row] for row in growing}
        self._barred.clear()
        self._fetched.clear()
        several = self._policy.several
        for _ in range(_PASSES):
            shelter = Shelter(self._cost, self._policy, batch) if several else None
            chosen = self._select(batch, growers, shelter, now)
            held = batch.blocks(size) + sum([blocks.held(job.index) for job in chosen.prefills])
            moves = self.swapping.plan(self._mark, held, chosen.last, now)
            if moves is None:
                break
            self._barred.update(dict.fromkeys([*moves.pauses, *moves.drops, *(job for job, _ in moves.offloads)]))
            for job in self._barred:
                job.mark = 0
                self._preempt(job, now)
            if not self.swapping.move(moves, now):
                break
            # Blocks became free at once: whom they were made free for may run.
        mark = self._mark
        for job in [job for job in (*batch.jobs, *batch.prefills, *self._fetched) if job.mark != mark]:
            elsewhere = job.in_flight and len(self._batches) > 1
            if (job.batch is None or job.batch is batch) and not (elsewhere or job.finished):
                self._preempt(job, now)
        self.changed(self._charges.tell_all(now))
        batch.prefills = [job for job in chosen.prefills if job.mark == mark]
        if shelter is None:
            batch.beyond, batch.spare, batch.at_once = _NOBODY, math.inf, None
        else:  # the time that there is for prompts is first of all for those who ask for little
            batch.prefills.sort(key=self._policy.is_small, reverse=True)
            batch.beyond, batch.spare = shelter.prefills, shelter.spare
            batch.at_once = self._at_once(batch.prefills, chosen.last)
        for job in chosen.joins:
            if job.mark == mark:
                batch.add(job, blocks.held(job.index) * size, self._policy.horizon(job))
        batch.version = self._version
        self._deadline = self._policy.next_deadline()
        return batch.growing()

    def _at_once(self, prefills: list[Job], last: Job | None) -> set[Job]:
        """Those of tenants that ask for little, while all such jobs have rows: they do not wait for others' gaps."""
        if last is not None and self._policy.is_small(last) and len(self._jobs) > self._rows():
            return set()
        return {job for job in prefills if self._policy.is_small(job)}

    def _select(self, batch: DecodeRows, growers: set[Job], shelter: Shelter | None, now: float) -> Selection:
        self._mark += 1
        return select(
            batch,
            growers,
            self._mark,
            now,
            limit=self._rows(),
            config=self._config,
            policy=self._policy,
            room=self._room,
            shelter=shelter,
            available=self._available,
        )

    def _rows(self) -> int:
        """Jobs of one iteration at most. With a pipeline, each stage has its share of them, or some would have none."""
        return max(1, min(self._config.max_num_seqs, -(-len(self._jobs) // len(self._batches))))

    def _available(self, job: Job) -> bool:
        """Whether a job that is not in the batch could be: not with its last token being sampled, or in another."""
        if job in self._barred or (job.in_flight and len(self._batches) > 1):
            return False
        if job.batch is not None:
            self.leave(job)
            self._fetched[job] = None
        return _wants(job)

    def _preempt(self, job: Job, now: float) -> None:
        """Take a job out of its batch though it has something to do there, if it has."""
        self.leave(job)
        if _wants(job):
            self.pause(job, now)


def _wants(job: Job) -> bool:
    """Whether there is a token that the job has neither got nor is getting."""
    return len(job.output) + job.pending < job.max_output
