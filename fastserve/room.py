"""The room for KV that one decision has to give, and whom it lacks.

A decision asks for each job, best first, whether it has room or finds some (`admits`, `grows`). Those that do not are
remembered as wants; swapping.py has KV moved for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Final

from .config import SchedulerConfig
from .cost import Cost
from .kv import Block, Want, first_unused
from .origin import accounts_of
from .policies import Policy
from .residency import Residency
from .types import HOST, UPLOAD, Job

# Blocks that each job with KV on the device should find free when it grows, before another job is let in: whoever is
# not served may be unable to leave.
_HEADROOM: Final = 1

# Iterations for which those that decode should find blocks, however important the job that wants to start.
_GROWTH: Final = 4


class Room:
    """What the decision being made has to give. Whoever is given blocks takes them when its plan is made."""

    def __init__(self, config: SchedulerConfig, policy: Policy, cost: Cost, residency: Residency) -> None:
        self.wants: list[Want] = []  # of the jobs that the batch being chosen lacks
        self.closed = False  # nobody else may start: a better job waits for room to, or there is no token left
        self.left = 0  # blocks that the decision has not given away
        self.given = 0  # blocks that it has, to those who will take them when they run
        self._config = config
        self._reserves = config.admission == "reserve"
        self._policy = policy
        self._cost = cost
        self._residency = residency
        self._blocks = residency.blocks
        self._prefixes = residency.prefixes
        self._unpromised = 0  # the same as `left`, with admission "reserve"
        self._starting = 0  # jobs to which it has given some to start with
        self._growth = 0  # blocks that those which decode take before others can be made free

    def begin(self, rows: int, now: float) -> None:
        """Start a decision, `rows` jobs decoding until now."""
        for job in list(self._residency.begun):
            self._residency.give_up_beginning(job)
        self._blocks.cache.expire(now)
        self._prefixes.forget_computing()
        self.wants = []
        self.closed = False
        self.left = self._blocks.free_blocks
        self.given = 0
        self._unpromised = self._blocks.num_blocks - self._residency.promised
        self._starting = 0
        self._growth = rows * _GROWTH // self._blocks.block_size

    def admits(self, job: Job, members: int) -> bool:
        """Whether a job that is not decoding has what it takes to run beside `members` better ones.

        Room that it needs is given to it; when there is none, it is remembered.
        """
        if job.slot is None:
            return not self.closed and self._starts(job)
        if job.tier == HOST:
            self._blocks.recall(job.index)
            return False
        if not job.primed and not job.in_flight:
            self._residency.catch_up(job)
        if not self._gets(job, self._residency.lacking(job), first=members == 0):
            return False
        if not job.primed:
            self._prefixes.computes(job)
        return True

    def grows(self, job: Job, members: int) -> bool:
        """Whether there is another block for a job that needs one to go on. It is given to it, or remembered.

        With no `members` before it, it may have anybody's, so that the best job always goes on.
        """
        return self._gets(job, 1, first=members == 0)

    def headroom(self, starting: int = 0) -> int:
        """Blocks that must be left when a job starts: for those with KV on the device, `starting` more, and itself."""
        others = len(self._residency.holders) - self._blocks.gone + starting
        return _HEADROOM * (others + 1) if others else 0

    def spared(self, job: Job) -> int:
        """Others' cache, in whose place a job of who has more than its share of the memory does not start or come back.

        Nothing is spared where rows might stay empty for it.
        """
        runnable = len(self._residency.holders) - len(self._residency.absent) + self._starting
        if not self._blocks.cached or runnable < self._config.max_num_seqs:
            return 0
        return self._blocks.cache.spared(accounts_of(job.tenant), self._blocks.num_blocks)

    def _starts(self, job: Job) -> bool:
        """Whether a job without a slot finds the room that it needs, beside what is there of it already."""
        if self._prefixes.better_waits(job):
            return False
        path = self._prefixes.path(job)
        here = self._blocks.readable(path)
        if here < len(path) and self._is_worth_fetching(path, here):
            self.left -= _unused(path)
            self._residency.fetch(job, path)
            return False
        unused = here - min(here, first_unused(path))
        blocks = self._residency.to_start(job)
        if self._reserves:
            if blocks > self._unpromised:
                self.closed = True
                return False
            self._unpromised -= blocks
        else:
            blocks += unused - here
            owed = max(self.headroom(self._starting), self._growth)
            if blocks + owed > self.left:
                self.closed = True
                self._want(job, blocks + owed)
                return False
            if blocks + owed + self.spared(job) > self.left:
                return False  # others may start
            self.left -= blocks
            self.given += blocks - unused
        self._starting += 1
        self._residency.begin(job, path[:here])
        self._prefixes.computes(job)
        return True

    def _is_worth_fetching(self, path: Sequence[Block], here: int) -> bool:
        """Whether what is not on the device comes back sooner than it is computed again, and nobody is harmed."""
        if len(self._residency.fetched) == self._config.max_num_seqs or _unused(path) > self.left:
            return False
        away = sum([block.device < 0 for block in path])
        size = self._blocks.block_size
        again = self._cost.prefill_seconds(here * size, (len(path) - here) * size)
        return self._residency.link.seconds(UPLOAD, away) <= again

    def _gets(self, job: Job, blocks: int, *, first: bool) -> bool:
        if blocks > self.left and blocks:
            self._want(job, blocks, first=first)
            return False
        self.left -= blocks
        self.given += blocks
        return True

    def _want(self, job: Job, blocks: int, *, first: bool = False) -> None:
        if len(self.wants) < self._config.max_num_seqs:  # more can hardly be served
            self.wants.append(Want(job, blocks, 0.0, self._policy.rank(job), first=first))


def _unused(path: Sequence[Block]) -> int:
    """Blocks on the device that are free as long as nobody has them."""
    return sum([block.here for block in islice(path, first_unused(path), None)])
