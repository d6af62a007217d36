"""Whose KV there is, and where: the slots and blocks of jobs that hold some.

begin, fetch ──▶ open ──▶ extend … ──▶ release          a job's life with KV; room.py says who may
                   ▲ │
            upload │ ▼ offload ──▶ acknowledge          swapping.py says who must, and who may come back
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Final, cast

from .config import SchedulerConfig
from .cost import Cost, Link
from .kv import Block, BlockManager, CopyRow, LinkEstimate, check_blocks
from .origin import accounts_of
from .planning import PlanBuilder
from .policies import Policy
from .prefixes import Prefixes
from .slots import Slots
from .types import DEVICE, HOST, OFFLOAD, UPLOAD, Job

# Until the link has been measured: what moving one block takes, in decodes.
_GUESS: Final = 1 / 16


class Residency:
    """The KV of all jobs. A job that holds none has no slot."""

    def __init__(self, config: SchedulerConfig, policy: Policy, cost: Cost, link: Link | None) -> None:
        guess = cost.decode_seconds(1) * _GUESS
        host_blocks = config.num_host_blocks if config.swaps else 0
        self.blocks = BlockManager(config.num_blocks, config.block_size, host_blocks, config.tenant_weights)
        self.link = LinkEstimate(link or Link(offload_block=guess, upload_block=guess))
        self.prefixes = Prefixes(self.blocks, cost, enabled=config.enable_prefix_caching)
        self.cache_counters = self.blocks.cache.counters
        self.holders: dict[Job, float] = {}  # jobs with a slot, and what each had attained when its KV was last brought
        self.by_index: dict[int, Job] = {}  # the holders
        self.begun: dict[Job, None] = {}  # jobs without a slot that have the blocks they would start with
        self.fetched: dict[Job, None] = {}  # jobs that start when the KV of others is back that they begin with
        self.absent: dict[Job, None] = {}  # holders with blocks that are away or moving
        self.fresh: set[Job] = set()  # brought back, and not run since
        self.promised = 0  # blocks set aside for the longest outputs, with admission "reserve"
        self.copied = [0, 0]  # blocks, by direction, and ...
        self.copy_seconds = 0.0  # ... seconds of all copies that were acknowledged
        self._reserves = config.admission == "reserve"
        self._policy = policy
        self._returning: dict[Job, float] = {}  # jobs that are being brought back, and since when
        self._under_way = [0, 0]  # blocks, by direction
        self._slots = Slots()
        self._copies: list[CopyRow] = []  # for the next plan

    # --- how much a job needs ----------------------------------------------------------------------------------------

    def to_start(self, job: Job) -> int:
        """Blocks with which a job without KV can run: all that it will ever need, with admission "reserve"."""
        return self.blocks.blocks_for(len(job.prompt) + job.max_output - 1 if self._reserves else job.known)

    def to_return(self, job: Job) -> int:
        """Blocks with which a job whose KV is away can run."""
        return self.blocks.away(job.index) + self.lacking(job)

    def lacking(self, job: Job) -> int:
        """Blocks that a job has to grow by to go on: one at most, unless it starts behind what others computed."""
        return max(0, self.blocks.blocks_for(job.known) - self.blocks.held(job.index))

    def has_room(self, job: Job) -> bool:
        """Whether a job that was chosen finds the room still that it was given then."""
        return (job.slot is not None or job in self.begun) and self.lacking(job) <= self.blocks.free_blocks

    # --- a job's life with KV ----------------------------------------------------------------------------------------

    def begin(self, job: Job, path: Sequence[Block]) -> None:
        """A job is about to start with the blocks of its path, which are on the device."""
        self.begun[job] = None
        if path:
            self.blocks.attach(job.index, path, accounts_of(job.tenant))
            job.computed = len(path) * self.blocks.block_size

    def give_up_beginning(self, job: Job) -> None:
        """A job that was about to start does not."""
        del self.begun[job]
        self.blocks.release(job.index)
        job.computed = 0

    def fetch(self, job: Job, path: Sequence[Block]) -> None:
        """The job holds what it begins with, which is not on the device, and starts when it is there."""
        self.blocks.attach(job.index, path, accounts_of(job.tenant))
        job.computed = len(path) * self.blocks.block_size
        self._slots.open(job)
        self._holds(job)
        self.fetched[job] = None
        self._settle(job, HOST)
        self.prefixes.started(job, path)

    def catch_up(self, job: Job) -> None:
        """Have a job in the middle of its prefill take over what others have computed beyond that."""
        if self.prefixes.catch_up(job):
            self._slots.change(cast(int, job.slot), self.blocks.table(job.index))

    def open(self, job: Job, plan: PlanBuilder) -> int:
        """Give a job that starts, or starts over, a slot and the blocks for all its tokens; returns how many."""
        self.begun.pop(job, None)
        slot = self._slots.take(job)
        self._holds(job)
        self._settle(job, DEVICE)
        self.prefixes.started(job, self.blocks.path(job.index))
        plan.open(job, slot)
        added = self.blocks.grow(job.index, job.known, accounts_of(job.tenant))
        plan.grow(slot, self.blocks.table(job.index))
        return len(added)

    def extend(self, job: Job) -> int:
        """Give a job that has a slot blocks for all its tokens; returns how many it lacked."""
        if not self.lacking(job):
            return 0
        added = self.blocks.grow(job.index, job.known)
        self._slots.change(cast(int, job.slot), added)
        return len(added)

    def runs(self, job: Job) -> None:
        """The job gets a row, and writes KV from `computed` on."""
        self.fresh.discard(job)
        self.fetched.pop(job, None)
        self.blocks.wrote(job.index, job.computed)

    def release(self, job: Job, now: float, keep: float = 0.0) -> None:
        """Give back the blocks and the slot of a job that no plan in flight works on; it starts over if it lives.

        What they hold is cache from here on, and sure to be wanted until `keep`.
        """
        if job in self.begun:
            self.give_up_beginning(job)
        if job.slot is None:
            return
        self.prefixes.leaves(job, keep)
        if self._reserves:
            self.promised -= self.to_start(job)
        self.blocks.release(job.index)
        self._settle(job, None)
        self._returned(job, now)
        self.fresh.discard(job)
        self.fetched.pop(job, None)
        self._slots.give_back(job)
        del self.holders[job], self.by_index[job.index]
        job.computed = 0
        job.primed = False

    def _holds(self, job: Job) -> None:
        self.holders[job] = job.attained
        self.by_index[job.index] = job
        if self._reserves:
            self.promised += self.to_start(job)

    def _settle(self, job: Job, tier: int | None) -> None:
        """The job's KV is in another tier now, or gone."""
        if job.tier != tier:
            if not job.finished:
                self._policy.move(job, tier)
            job.tier = tier
        if tier == HOST:
            self.absent[job] = None
        else:
            self.absent.pop(job, None)

    # --- between the tiers -------------------------------------------------------------------------------------------

    @property
    def moving(self) -> bool:
        """Whether KV is on its way, or about to be."""
        return self.blocks.transfers > 0

    def backlog(self, direction: int) -> float:
        """Seconds of copies in that direction that are under way, or about to be."""
        return self.link.seconds(direction, self._under_way[direction])

    def offload(self, job: Job, blocks: int) -> None:
        """Have up to `blocks` of the job's blocks leave the device; it is in no batch."""
        copies, _ = self.blocks.offload(job.index, blocks)
        self._start(OFFLOAD, copies)
        self._settle(job, HOST)

    def upload(self, job: Job, now: float) -> None:
        """Bring all of the job's KV back, with room for its next token."""
        copies, table = self.blocks.upload(job.index)
        table += self.blocks.grow(job.index, job.known)
        if job not in self.fetched:
            self._slots.change(cast(int, job.slot), table)
        self._start(UPLOAD, copies)
        self.fresh.add(job)
        self._returning[job] = now
        self.holders[job] = job.attained

    def save(self, blocks: int) -> None:
        """Have up to `blocks` blocks of the cache copied to the host; they stay on the device."""
        self._start(OFFLOAD, self.blocks.save(blocks))

    def _start(self, direction: int, copies: list[CopyRow]) -> None:
        self._copies += copies
        self._under_way[direction] += len(copies)

    def acknowledge(self, copy: int, seconds: float, now: float) -> None:
        """A copy is done. Raises ValueError for one that is not under way."""
        owner, direction, blocks, returned = self.blocks.acknowledge(copy)
        self.link.observe(direction, blocks, seconds)
        self._under_way[direction] -= blocks
        self.copied[direction] += blocks
        self.copy_seconds += seconds
        for job in map(self.by_index.__getitem__, returned):
            self._returned(job, now)
            # Others may have brought back, to another place, what they share.
            if job.index != owner or job in self.fetched or self.blocks.shared(job.index):
                self._slots.change(cast(int, job.slot), self.blocks.table(job.index))
            self._settle(job, DEVICE)

    def _returned(self, job: Job, now: float) -> None:
        if (since := self._returning.pop(job, None)) is not None:
            job.metrics.swap_seconds += now - since

    # --- for the next plan -------------------------------------------------------------------------------------------

    @property
    def untold(self) -> bool:
        """Whether the runtime does not know everything yet."""
        return bool(self._copies) or self._slots.untold

    def tell(self, plan: PlanBuilder) -> tuple[list[int], list[CopyRow]]:
        """Add the tables of what comes back to a plan; returns closed slots and copies."""
        copies, self._copies = self._copies, []
        return self._slots.tell(plan), copies

    def check_integrity(self) -> None:
        """Raise RuntimeError when a slot or a block is lost, doubled or leaked."""
        check_blocks(self.blocks)
        self.prefixes.check_integrity()
        blocks = self.blocks
        for what, fine in {
            "a slot is lost or doubled": self._slots.balance(list(self.holders)),
            "a block belongs to no job": {job.index for job in self.holders} == set(self.by_index)
            and blocks.owners() <= {job.index for job in chain(self.holders, self.begun)},
            "a job that has not started has a slot": all(job.slot is None for job in self.begun),
            "an absent job is not known as such": set(self.absent)
            == {job for job in self.holders if blocks.missing(job.index)}
            == {job for job in self.holders if job.tier == HOST},
            "blocks are promised to nobody": self.promised
            == (sum(map(self.to_start, self.holders)) if self._reserves else 0),
        }.items():
            if not fine:
                raise RuntimeError(what)
