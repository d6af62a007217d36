"""Which KV leaves the device, which comes back, and when: what the swap planner (kv/swap.py) decides by is told here.

The config's swap_mode says how:

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
from .cost import Cost
from .decode_rows import DecodeRows
from .kv import BurstReserve, Holder, Moves, Want, plan_moves
from .origin import accounts_of
from .policies import Policy
from .residency import Residency
from .room import Room
from .types import DEVICE, HOST, OFFLOAD, UPLOAD, Job

# Iterations of offloads, and of uploads, that may be under way.
_BACKLOG: Final = 2

# One block of so many may be on its way to the host at once for the cache's sake: it is nobody's to have meanwhile.
_SAVED: Final = 64

# Iterations between two looks at a pool in which something is wanting.
_PATIENCE: Final = 4


class Swapping:
    """Plans moves for the decision being made, and has them carried out."""

    def __init__(self, config: SchedulerConfig, policy: Policy, cost: Cost, residency: Residency, room: Room) -> None:
        has_host = residency.blocks.num_host_blocks > 0
        self.iteration_seconds = cost.decode_seconds(1)  # of the latest iteration
        self._config = config
        self._policy = policy
        self._cost = cost
        self._residency = residency
        self._blocks = residency.blocks
        self._room = room
        self._proactive = config.swap_mode == "proactive" and has_host
        self._reactive = config.swap_mode == "reactive" and has_host
        self._reserve = BurstReserve()
        self._looked = 0  # iterations since the last decision

    @property
    def waits(self) -> bool:
        """Whether the batch must wait for KV to move."""
        return self._reactive and self._residency.moving

    @property
    def due(self) -> bool:
        """Whether it is time to look again for room that was wanted, or at the reserve. Asked once an iteration."""
        self._looked += 1
        if self._looked < _PATIENCE:
            return False
        return bool(self._room.wants) or (
            self._proactive and self._blocks.free_blocks < self._reserve.blocks(self._blocks.num_blocks)
        )

    def plan(self, mark: int, batch_blocks: int, last: Job | None, now: float) -> Moves | None:
        """What should move now; None: nothing.

        The jobs of the batch being chosen carry `mark`, and hold that many blocks; `last` is the last of them when the
        batch is full: jobs before it belong in the batch, and lack their KV.
        """
        self._looked = 0
        if self._config.admission == "reserve":
            return None  # everybody has what they will need
        # Never so many that the batch would be the one to lose them.
        reserve = self._reserve.blocks((self._blocks.num_blocks - batch_blocks) // 2) if self._proactive else 0
        short = self._proactive and self._room.left + self._blocks.leaving < reserve
        if not (self._room.wants or self._residency.absent or short):
            return None
        return plan_moves(
            merge(self._room.wants, self._returns(last, now), key=attrgetter("rank")),
            self._victims(mark, now),
            free=self._room.left,
            leaving=self._blocks.leaving,
            host_places=self._blocks.free_host_blocks,
            reserve=reserve,
            whole=self._reactive,
            link=self._residency.link,
            repayment=self._config.repayment,
            backlog=(self._residency.backlog(OFFLOAD), self._residency.backlog(UPLOAD)),
            patience=_BACKLOG * self.iteration_seconds,
            gives_way=self._gives_way if self._policy.several else None,
        )

    def move(self, moves: Moves, now: float) -> bool:
        """Carry it out; whether blocks became free at once. None of the jobs that lose blocks is in a batch.

        A move that another has made impossible, by using the place of a host copy, waits for the next decision.
        """
        free = self._blocks.free_blocks
        for job, count in moves.offloads:
            if self._blocks.can_offload(job.index):
                self._residency.offload(job, count)
        for job in moves.drops:
            self._residency.release(job, now)
        freed = self._blocks.free_blocks > free
        for job in moves.uploads:
            room = self._blocks.free_blocks - self._room.given
            if self._blocks.can_upload(job.index) and self._residency.to_return(job) <= room:
                self._residency.upload(job, now)
        return freed

    def force(self, now: float) -> None:
        """Have the best job that wants room find it: nothing runs and nothing moves, so nothing else will help it."""
        want = min(chain(self._room.wants, self._returns(None, now)), key=attrgetter("rank"), default=None)
        if want is None:
            return
        blocks, residency, starts = self._blocks, self._residency, want.job.slot is None
        for job in sorted(residency.holders, key=self._policy.rank, reverse=True):
            needed = residency.to_start(want.job) + self._room.headroom() if starts else want.blocks
            if blocks.free_blocks >= needed:
                break
            if job is not want.job and blocks.held(job.index) > blocks.missing(job.index):
                residency.release(job, now)
        if want.upload:  # now, or those who gave their KV for it would start over in its room
            self.move(Moves(uploads=[want.job]), now)

    def took(self, blocks: int) -> None:
        """An iteration takes so many blocks. While the link is idle, cache is copied to the host ahead of need, so that
        what comes next finds room without a loss."""
        self._reserve.took(blocks)
        manager = self._blocks
        if self._proactive and manager.cached and manager.idle_blocks < manager.num_blocks // 2:
            spare = self.iteration_seconds - self._residency.backlog(OFFLOAD)
            if spare > 0:
                most = max(1, manager.num_blocks // _SAVED)
                each = max(self._residency.link.seconds(OFFLOAD, 1), 1e-9)
                self._residency.save(max(1, min(most, int(spare / each))))

    def _gives_way(self, holder: Job, wanting: Job) -> bool:
        """Whether the one's tenant holds more than its share of the memory, and the other's no more than its own.

        API keys have shares first, and then each key's users.
        """
        for account, share, other, others_share in zip(
            accounts_of(holder.tenant), self._policy.shares(holder),
            accounts_of(wanting.tenant), self._policy.shares(wanting), strict=False,
        ):  # fmt: skip
            if account != other:
                held = self._blocks.accounts
                blocks = held.get(other, 0) + self._blocks.blocks_for(wanting.known) - self._blocks.held(wanting.index)
                most = self._blocks.num_blocks
                return held.get(account, 0) > share * most and blocks <= others_share * most
        return False

    def _enst(self, job: Job, now: float) -> float:
        """Estimated time until the job is scheduled, in seconds: min(T_promote, T_execute) of the paper."""
        execute = self._policy.work_ahead(job, now) / self._config.max_num_seqs
        return max(0.0, min(execute, self._policy.deadline(job) - now))

    def _returns(self, last: Job | None, now: float) -> Iterator[Want]:
        """Jobs whose KV is away: those that the batch lacks, and those that it will take soon."""
        rank_of, end = self._policy.rank, None if last is None else self._policy.rank(last)
        for job in self._policy.iter_tier(HOST):
            if self._blocks.away(job.index):
                rank = rank_of(job)
                lacking = end is None or rank < end
                if not lacking and not self._proactive:
                    return
                blocks = self._residency.to_return(job)
                if end is not None and blocks + self._room.spared(job) > self._room.left:
                    continue
                enst = 0.0 if lacking else max(1e-9, self._enst(job, now))
                yield Want(job, blocks, enst, rank, upload=True)

    def _victims(self, mark: int, now: float) -> Iterator[Holder]:
        """Who could give up blocks, the last to run first: not those whose blocks came back and have not been used.

        Those that have given up some already go first: what is left of them is of no use.
        """
        blocks, residency = self._blocks, self._residency
        partial = [residency.by_index[owner] for owner in blocks.partial if not blocks.moving(owner)]
        partial.sort(key=self._policy.rank, reverse=True)
        for job in chain(partial, self._policy.iter_tier(DEVICE, worst_first=True)):
            here, unsaved = (0, 0) if job in residency.fresh else blocks.leavable(job.index)
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
                service=job.attained - residency.holders[job] + (batch.unreported(job) if batch else 0.0),
                busy=job.in_flight > 0,
            )
