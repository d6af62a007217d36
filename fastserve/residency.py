"""Whose KV is on the device: the slots and blocks of jobs that hold some, and what moves between the tiers.

A decision asks for each job, best first, whether it has room or finds some (`admits`, `grows`). Those that do not are
remembered as wants, and the swap planner (kv/swap.py) decides what leaves for them, what comes back and what is kept
free. The config's swap_mode says how:

    proactive   KV moves ahead of need, under compute, and some blocks are kept free for bursts
    reactive    KV moves when the batch needs it, and the batch waits
    recompute   KV is thrown away when others need the room, and computed again
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge
from itertools import chain
from operator import attrgetter
from typing import Final, cast

from .config import SchedulerConfig
from .cost import Cost, Link
from .decode_rows import DecodeRows
from .kv import (
    Block,
    BlockManager,
    BurstReserve,
    CopyRow,
    Holder,
    LinkEstimate,
    Moves,
    Want,
    check_blocks,
    plan_moves,
)
from .planning import PlanBuilder
from .policies import Policy
from .prefixes import Prefixes
from .slots import Slots
from .types import DEVICE, HOST, OFFLOAD, UPLOAD, Job

# Until the link has been measured: what moving one block takes, in decodes.
_GUESS: Final = 1 / 16

# Blocks that each job with KV on the device should find free when it grows, before another job is let in: whoever is
# not served may be unable to leave.
_HEADROOM: Final = 1

# Iterations for which those that decode should find blocks, however important the job that wants to start.
_GROWTH: Final = 4

# Iterations of offloads, and of uploads, that may be under way.
_BACKLOG: Final = 2

# One block of so many may be on its way to the host at once for the cache's sake: it is nobody's to have meanwhile.
_SAVED: Final = 64

# Iterations between two looks at a pool in which something is wanting.
_PATIENCE: Final = 4


class Residency:
    """The KV of all jobs. A job that holds none has no slot."""

    def __init__(self, config: SchedulerConfig, policy: Policy, cost: Cost, link: Link | None) -> None:
        host_blocks = config.num_host_blocks if config.swaps else 0
        guess = cost.decode_seconds(1) * _GUESS
        self.blocks = BlockManager(config.num_blocks, config.block_size, host_blocks)
        self.link = LinkEstimate(link or Link(offload_block=guess, upload_block=guess))
        self.holders: dict[Job, float] = {}  # jobs with a slot, and what each had attained when its KV was last brought
        self.iteration_seconds = cost.decode_seconds(1)  # of the latest iteration
        self.wants: list[Want] = []  # of the jobs that the batch being chosen lacks
        self.closed = False  # nobody else may start: a better job waits for room to, or there is no token left
        self.prefixes = Prefixes(self.blocks, cost, enabled=config.enable_prefix_caching)
        self.cache_counters = self.blocks.cache.counters
        self.copied = [0, 0]  # blocks, by direction, and ...
        self.copy_seconds = 0.0  # ... seconds of all copies that were acknowledged
        self._config = config
        self._policy = policy
        self._cost = cost
        self._proactive = config.swap_mode == "proactive" and host_blocks > 0
        self._reactive = config.swap_mode == "reactive" and host_blocks > 0
        self._reserve = BurstReserve()
        self._promised = 0  # blocks set aside for the longest outputs, with admission "reserve"
        self._room = self._unpromised = 0  # blocks that the decision being made has not given away
        self._given = 0  # blocks that it has, to those who will take them when they run
        self._starting = 0  # jobs to which it has given some to start with
        self._growth = 0  # blocks that those which decode take before others can be made free
        self._looked = 0  # iterations since the last decision
        self._by_index: dict[int, Job] = {}  # the holders
        self._begun: dict[Job, None] = {}  # jobs without a slot that have the blocks they would start with
        self._fetched: dict[Job, None] = {}  # jobs that start when the KV of others is back that they begin with
        self._absent: dict[Job, None] = {}  # holders with blocks that are away or moving
        self._fresh: set[Job] = set()  # brought back, and not run since
        self._returning: dict[Job, float] = {}  # jobs that are being brought back, and since when
        self._under_way = [0, 0]  # blocks, by direction
        self._slots = Slots()
        self._copies: list[CopyRow] = []  # for the next plan

    # --- one decision ------------------------------------------------------------------------------------------------

    def begin(self, rows: int, now: float) -> None:
        """Start a decision, `rows` jobs decoding until now."""
        for job in list(self._begun):
            self._give_up_beginning(job)
        self.blocks.cache.expire(now)
        self.prefixes.forget_computing()
        self.wants = []
        self.closed = False
        self._room = self.blocks.free_blocks
        self._given = 0
        self._unpromised = self.blocks.num_blocks - self._promised
        self._starting = 0
        self._growth = rows * _GROWTH // self.blocks.block_size
        self._looked = 0

    def admits(self, job: Job, members: int) -> bool:
        """Whether a job that is not decoding has what it takes to run beside `members` better ones.

        Room that it needs is given to it; when there is none, it is remembered.
        """
        if job.slot is None:
            return not self.closed and self._starts(job)
        if job.tier == HOST:
            self.blocks.recall(job.index)
            return False
        if not job.primed and not job.in_flight and self.prefixes.catch_up(job):
            self._slots.change(job.slot, self.blocks.table(job.index))
        if not self._gets(job, self._lacking(job), first=members == 0):
            return False
        if not job.primed:
            self.prefixes.computes(job)
        return True

    def _starts(self, job: Job) -> bool:
        """Whether a job without a slot finds the room that it needs, beside what is there of it already."""
        if self.prefixes.better_waits(job):
            return False
        path = self.prefixes.path(job)
        here = next((i for i, block in enumerate(path) if not block.here), len(path))
        if here < len(path) and self._is_worth_fetching(path, here):
            self._fetch(job, path)
            return False
        del path[here:]
        blocks = self._to_start(job)
        if self._config.admission == "reserve":
            if blocks > self._unpromised:
                self.closed = True
                return False
            self._unpromised -= blocks
        else:
            blocks += _unused(path) - len(path)
            owed = max(self._headroom(self._starting), self._growth)
            if blocks + owed > self._room:
                self.closed = True
                self._want(job, blocks + owed)
                return False
            self._room -= blocks
            self._given += blocks - _unused(path)
        self._starting += 1
        self._begun[job] = None
        if path:
            self.blocks.attach(job.index, path)
            job.computed = len(path) * self.blocks.block_size
        self.prefixes.computes(job)
        return True

    def grows(self, job: Job, members: int) -> bool:
        """Whether there is another block for a job that needs one to go on. It is given to it, or remembered.

        With no `members` before it, it may have anybody's, so that the best job always goes on.
        """
        return self._gets(job, 1, first=members == 0)

    def _gets(self, job: Job, blocks: int, *, first: bool) -> bool:
        if blocks > self._room and blocks:
            self._want(job, blocks, first=first)
            return False
        self._room -= blocks
        self._given += blocks
        return True

    def _want(self, job: Job, blocks: int, *, first: bool = False) -> None:
        if len(self.wants) < self._config.max_num_seqs:  # more can hardly be served
            self.wants.append(Want(job, blocks, 0.0, self._policy.rank(job), first=first))

    def plan(self, mark: int, batch_blocks: int, last: Job | None, now: float) -> Moves | None:
        """What should move now; None: nothing.

        The jobs of the batch being chosen carry `mark`, and hold that many blocks; `last` is the last of them when the
        batch is full: jobs before it belong in the batch, and lack their KV.
        """
        if self._config.admission == "reserve":
            return None  # everybody has what they will need
        # Never so many that the batch would be the one to lose them.
        reserve = self._reserve.blocks((self.blocks.num_blocks - batch_blocks) // 2) if self._proactive else 0
        short = self._proactive and self._room + self.blocks.leaving < reserve
        if not (self.wants or self._absent or short):
            return None
        return plan_moves(
            merge(self.wants, self._returns(last, now), key=attrgetter("rank")),
            self._victims(mark, now),
            free=self._room,
            leaving=self.blocks.leaving,
            host_places=self.blocks.free_host_blocks,
            reserve=reserve,
            whole=self._reactive,
            link=self.link,
            repayment=self._config.repayment,
            backlog=(self._backlog(OFFLOAD), self._backlog(UPLOAD)),
            patience=_BACKLOG * self.iteration_seconds,
        )

    def move(self, moves: Moves, now: float) -> bool:
        """Carry it out; whether blocks became free at once. None of the jobs that lose blocks is in a batch.

        A move that another has made impossible, by using the place of a host copy, waits for the next decision.
        """
        free = self.blocks.free_blocks
        for job, count in moves.offloads:
            if not self.blocks.can_offload(job.index):
                continue
            copies, _ = self.blocks.offload(job.index, count)
            self._copies += copies
            self._under_way[OFFLOAD] += len(copies)
            self._settle(job, HOST)
        for job in moves.drops:
            self.release(job, now)
        freed = self.blocks.free_blocks > free
        for job in moves.uploads:
            room = self.blocks.free_blocks - self._given
            if not self.blocks.can_upload(job.index) or self._to_return(job) > room:
                continue
            copies, table = self.blocks.upload(job.index)
            table += self.blocks.grow(job.index, job.known)
            if job not in self._fetched:
                self._slots.change(cast(int, job.slot), table)
            self._copies += copies
            self._under_way[UPLOAD] += len(copies)
            self._fresh.add(job)
            self._returning[job] = now
            self.holders[job] = job.attained
        return freed

    def force(self, now: float) -> None:
        """Have the best job that wants room find it: nothing runs and nothing moves, so nothing else will help it."""
        want = min(chain(self.wants, self._returns(None, now)), key=attrgetter("rank"), default=None)
        if want is None:
            return
        starts = want.job.slot is None
        for job in sorted(self.holders, key=self._policy.rank, reverse=True):
            needed = self._to_start(want.job) + self._headroom() if starts else want.blocks
            if self.blocks.free_blocks >= needed:
                break
            if job is not want.job and self.blocks.held(job.index) > self.blocks.missing(job.index):
                self.release(job, now)
        if want.upload:  # now, or those who gave their KV for it would start over in its room
            self.move(Moves(uploads=[want.job]), now)

    @property
    def waits(self) -> bool:
        """Whether the batch must wait for KV to move."""
        return self._reactive and self.moving

    @property
    def moving(self) -> bool:
        """Whether KV is on its way, or about to be."""
        return self.blocks.transfers > 0

    @property
    def short(self) -> bool:
        """Whether it is time to look again for room that was wanted, or at the reserve. Asked once an iteration."""
        self._looked += 1
        if self._looked < _PATIENCE:
            return False
        return bool(self.wants) or (self._proactive and self.blocks.free_blocks < self._reserve.blocks(2**31))

    def _headroom(self, starting: int = 0) -> int:
        """Blocks that must be left when a job starts: for those with KV on the device, `starting` more, and itself."""
        others = len(self.holders) - self.blocks.gone + starting
        return _HEADROOM * (others + 1) if others else 0

    def _backlog(self, direction: int) -> float:
        return self.link.seconds(direction, self._under_way[direction])

    def _to_start(self, job: Job) -> int:
        if self._config.admission == "reserve":
            return self.blocks.blocks_for(len(job.prompt) + job.max_output - 1)
        return self.blocks.blocks_for(job.known)

    def _to_return(self, job: Job) -> int:
        """Blocks with which a job whose KV is away can run."""
        return self.blocks.away(job.index) + self._lacking(job)

    def _lacking(self, job: Job) -> int:
        """Blocks that a job has to grow by to go on: one at most, unless it starts behind what others computed."""
        return max(0, self.blocks.blocks_for(job.known) - self.blocks.held(job.index))

    def _enst(self, job: Job, now: float) -> float:
        """Estimated time until the job is scheduled, in seconds: min(T_promote, T_execute) of the paper."""
        execute = self._policy.work_ahead(job, now) / self._config.max_num_seqs
        return max(0.0, min(execute, self._policy.deadline(job) - now))

    def _returns(self, last: Job | None, now: float) -> Iterator[Want]:
        """Jobs whose KV is away: those that the batch lacks, and those that it will take soon."""
        rank_of, end = self._policy.rank, None if last is None else self._policy.rank(last)
        for job in self._policy.iter_tier(HOST):
            if self.blocks.away(job.index):
                rank = rank_of(job)
                lacking = end is None or rank < end
                if not lacking and not self._proactive:
                    return
                yield Want(
                    job, self._to_return(job), 0.0 if lacking else max(1e-9, self._enst(job, now)), rank, upload=True
                )

    def _victims(self, mark: int, now: float) -> Iterator[Holder]:
        """Who could give up blocks, the last to run first: not those whose blocks came back and have not been used.

        Those that have given up some already go first: what is left of them is of no use.
        """
        blocks = self.blocks
        partial = [self._by_index[owner] for owner in blocks.partial if not blocks.moving(owner)]
        partial.sort(key=self._policy.rank, reverse=True)
        for job in chain(partial, self._policy.iter_tier(DEVICE, worst_first=True)):
            here, unsaved = (0, 0) if job in self._fresh else blocks.leavable(job.index)
            if not here:
                continue
            batch = cast(DecodeRows | None, job.batch)
            common = blocks.common(job.index) * blocks.block_size
            position = batch.position(job.row) if batch else job.computed
            yield Holder(
                job=job,
                here=here,
                unsaved=unsaved,
                away=blocks.missing(job.index),
                enst=0.0 if job.mark == mark else self._enst(job, now),
                rank=self._policy.rank(job),
                recompute=self._cost.prefill_seconds(common, max(0, position - common)),
                service=job.attained - self.holders[job] + (batch.unreported(job) if batch else 0.0),
                busy=job.in_flight > 0,
            )

    def _settle(self, job: Job, tier: int | None) -> None:
        """The job's KV is in another tier now, or gone."""
        if job.tier != tier:
            if not job.finished:
                self._policy.move(job, tier)
            job.tier = tier
        if tier == HOST:
            self._absent[job] = None
        else:
            self._absent.pop(job, None)

    # --- what is there already -------------------------------------------------------------------------------------

    def _is_worth_fetching(self, path: list[Block], here: int) -> bool:
        """Whether what is not on the device comes back sooner than it is computed again, and nobody is harmed."""
        if len(self._fetched) == self._config.max_num_seqs or _unused(path) > self._room:
            return False
        away = sum([block.device < 0 for block in path])
        size = self.blocks.block_size
        return self.link.seconds(UPLOAD, away) <= self._cost.prefill_seconds(here * size, (len(path) - here) * size)

    def _fetch(self, job: Job, path: list[Block]) -> None:
        """The job holds what it begins with, which is not on the device, and starts when it is there."""
        self._room -= _unused(path)
        self.blocks.attach(job.index, path)
        job.computed = len(path) * self.blocks.block_size
        self._slots.open(job)
        self._holds(job)
        self._fetched[job] = None
        self._settle(job, HOST)
        self.prefixes.started(job, path)

    def _give_up_beginning(self, job: Job) -> None:
        """A job that was about to start does not."""
        del self._begun[job]
        self.blocks.release(job.index)
        job.computed = 0

    def _save(self) -> None:
        """Have cache copied to the host ahead of need, so that what comes next finds room without a loss."""
        if self._proactive and self.blocks.cached and self.blocks.idle_blocks < self.blocks.num_blocks // 2:
            spare = self.iteration_seconds - self._backlog(OFFLOAD)
            if spare > 0:
                most = max(1, self.blocks.num_blocks // _SAVED)
                copies = self.blocks.save(max(1, min(most, int(spare / max(self.link.seconds(OFFLOAD, 1), 1e-9)))))
                self._copies += copies
                self._under_way[OFFLOAD] += len(copies)

    # --- slots and blocks --------------------------------------------------------------------------------------------

    def open(self, job: Job, plan: PlanBuilder) -> int:
        """Give a job that starts, or starts over, a slot and the blocks for all its tokens; returns how many."""
        self._begun.pop(job, None)
        slot = self._slots.take(job)
        self._holds(job)
        self._settle(job, DEVICE)
        self.prefixes.started(job, self.blocks.path(job.index))
        plan.open(job, slot)
        added = self.blocks.grow(job.index, job.known)
        plan.grow(slot, self.blocks.table(job.index))
        return len(added)

    def has_room(self, job: Job) -> bool:
        """Whether a job that was chosen finds the room still that it was given then."""
        return (job.slot is not None or job in self._begun) and self._lacking(job) <= self.blocks.free_blocks

    def extend(self, job: Job) -> int:
        """Give a job that has a slot blocks for all its tokens; returns how many it lacked."""
        if not self._lacking(job):
            return 0
        added = self.blocks.grow(job.index, job.known)
        self._slots.change(cast(int, job.slot), added)
        return len(added)

    def _holds(self, job: Job) -> None:
        self.holders[job] = job.attained
        self._by_index[job.index] = job
        if self._config.admission == "reserve":
            self._promised += self._to_start(job)

    def runs(self, job: Job) -> None:
        """The job gets a row, and writes KV from `computed` on."""
        self._fresh.discard(job)
        self._fetched.pop(job, None)
        self.blocks.wrote(job.index, job.computed)

    def release(self, job: Job, now: float, keep: float = 0.0) -> None:
        """Give back the blocks and the slot of a job that no plan in flight works on; it starts over if it lives.

        What they hold is cache from here on, and sure to be wanted until `keep`.
        """
        if job in self._begun:
            self._give_up_beginning(job)
        if job.slot is None:
            return
        self.prefixes.leaves(job, keep)
        if self._config.admission == "reserve":
            self._promised -= self._to_start(job)
        self.blocks.release(job.index)
        self._settle(job, None)
        self._returned(job, now)
        self._fresh.discard(job)
        self._fetched.pop(job, None)
        self._slots.give_back(job)
        del self.holders[job], self._by_index[job.index]
        job.computed = 0
        job.primed = False

    def acknowledge(self, copy: int, seconds: float, now: float) -> None:
        """A copy is done. Raises ValueError for one that is not under way."""
        owner, direction, blocks, returned = self.blocks.acknowledge(copy)
        self.link.observe(direction, blocks, seconds)
        self._under_way[direction] -= blocks
        self.copied[direction] += blocks
        self.copy_seconds += seconds
        for job in map(self._by_index.__getitem__, returned):
            self._returned(job, now)
            # Others may have brought back, to another place, what they share.
            if job.index != owner or job in self._fetched or self.blocks.shared(job.index):
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

    def tell(self, plan: PlanBuilder, taken: int) -> tuple[list[int], list[CopyRow]]:
        """Add the tables of what comes back to a plan that took `taken` blocks; returns closed slots and copies."""
        self._reserve.took(taken)
        self._save()
        copies, self._copies = self._copies, []
        return self._slots.tell(plan), copies

    def check_integrity(self) -> None:
        """Raise RuntimeError when a slot or a block is lost, doubled or leaked."""
        check_blocks(self.blocks)
        self.prefixes.check_integrity()
        blocks = self.blocks
        for what, fine in {
            "a slot is lost or doubled": self._slots.balance(list(self.holders)),
            "a block belongs to no job": {job.index for job in self.holders} == set(self._by_index)
            and blocks.owners() <= {job.index for job in chain(self.holders, self._begun)},
            "a job that has not started has a slot": all(job.slot is None for job in self._begun),
            "an absent job is not known as such": set(self._absent)
            == {job for job in self.holders if blocks.missing(job.index)}
            == {job for job in self.holders if job.tier == HOST},
            "blocks are promised to nobody": self._promised
            == (sum(map(self._to_start, self.holders)) if self._config.admission == "reserve" else 0),
        }.items():
            if not fine:
                raise RuntimeError(what)


def _unused(path: list[Block]) -> int:
    """Blocks on the device that are free as long as nobody has them."""
    return sum([block.here and not block.tables for block in path])
