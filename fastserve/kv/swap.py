"""Which KV blocks should move between device and host, and when (Wu et al., arXiv 2305.05920, section 4.2). Pure.

Jobs that want blocks come smallest ENST (estimated next scheduled time) first, jobs that can give some up largest ENST
first, and the two never cross: nothing is taken for a job that will run later than its victim. And nothing is taken
from a job that has not been served several times what bringing its KV back will cost: else, when all jobs take turns,
as they do in an overload, the link and the device do nothing but bring KV back for a token each.

    wants ──▶ enough free? ──yes──▶ upload, or set aside
                   │ no
                   ▼
    victims ──▶ the cheapest of keep, swap and recompute ──▶ offload, drop or pause
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from ..cost import Link
from ..types import OFFLOAD, UPLOAD, Job

_SMOOTHING: Final = 0.2  # weight of the newest copy in the measured speed of the link
_FEWEST: Final = 8  # blocks that leave together, where the victim has as many: few large copies
_REFUSALS: Final = 16  # victims that may turn out not to be, one after the other, before the search is given up
_WINDOW: Final = 4.0  # iterations over which the demand for blocks is summed
_FADING: Final = 1.0 / 256  # of the largest demand seen, an iteration


@dataclass(slots=True)
class Want:
    """A job that needs blocks on the device: to come back, to start or to grow."""

    job: Job
    blocks: int
    enst: float  # seconds; 0: it belongs in the batch that is being planned
    rank: tuple[float, ...]
    upload: bool = False  # its KV is on the host; else the blocks are only set aside
    first: bool = False  # the best of all that hold KV: others give up theirs, whatever they were served

    @property
    def urgent(self) -> bool:
        return self.enst <= 0.0


@dataclass(slots=True)
class Holder:
    """A job that could give up blocks."""

    job: Job
    here: int  # blocks on the device
    unsaved: int  # of those, blocks without a copy on the host
    away: int  # blocks on the host only
    enst: float  # seconds
    rank: tuple[float, ...]
    recompute: float  # seconds of computing its KV again
    service: float  # seconds of service since its KV was last computed or brought back
    busy: bool  # a plan in flight works on it: it must be left out of a batch first


@dataclass(slots=True)
class Moves:
    """What to do. An offload names the most blocks that shall leave."""

    offloads: list[tuple[Job, int]] = field(default_factory=list)
    drops: list[Job] = field(default_factory=list)
    uploads: list[Job] = field(default_factory=list)
    pauses: list[Job] = field(default_factory=list)


class LinkEstimate:
    """The speed of the link as measured, from a first guess on."""

    def __init__(self, guess: Link) -> None:
        self._latency = guess.latency
        self._block = [guess.offload_block, guess.upload_block]

    def observe(self, direction: int, blocks: int, seconds: float) -> None:
        """A copy of that many blocks took `seconds`."""
        each = max(0.0, seconds - self._latency) / blocks
        self._block[direction] += _SMOOTHING * (each - self._block[direction])

    def seconds(self, direction: int, blocks: int) -> float:
        return self._latency + self._block[direction] * blocks if blocks else 0.0


class BurstReserve:
    """How many device blocks to keep free: as many as a burst took lately, in the time that making room takes.

    The demand over a window fades with the window; the largest seen fades slowly.
    """

    def __init__(self) -> None:
        self._recent = 0.0
        self._peak = 0.0

    def took(self, blocks: int) -> None:
        """One iteration took that many blocks."""
        self._recent += blocks - self._recent / _WINDOW
        self._peak = max(self._recent, self._peak * (1.0 - _FADING))

    def blocks(self, limit: int) -> int:
        return max(0, min(limit, round(self._peak)))


def plan_moves(
    wants: Iterable[Want],
    victims: Iterator[Holder],
    *,
    free: int,
    leaving: int,
    host_places: int,
    reserve: int,
    whole: bool,
    repayment: float,
    link: LinkEstimate,
    backlog: tuple[float, float],
    patience: float,
    gives_way: Callable[[Job, Job], bool] | None = None,
) -> Moves:
    """Decide the moves of one iteration.

    wants        in the order in which the jobs will run
    victims      against the order in which they will run, those with blocks away before the others; looked at no
                 further than needed
    free         device blocks that are nobody's and not needed by this iteration
    leaving      device blocks that copies under way will free
    host_places  blocks the host has room for
    reserve      device blocks to keep free for bursts; only wants of ENST 0 may use them
    whole        whether all of a victim leaves, or only what is short
    repayment    a job keeps its KV until it was served this many times what bringing it back costs, and at all
    backlog      seconds of offloads and of uploads under way
    patience     seconds of each that may be: blocks on their way are of no use to anybody
    gives_way    whether a job has to give up its KV for one that runs before it and is owed the memory, whatever it
                 was served
    """
    moves = Moves()
    room = _Room(
        victims, free, leaving, host_places, whole, repayment, backlog[OFFLOAD], patience, link, moves, gives_way
    )
    coming = backlog[UPLOAD]  # seconds of uploads
    owed = 0  # blocks that better jobs wait for: what becomes free is theirs
    for want in wants:
        if owed and not want.urgent:
            break
        if want.upload and coming > patience:
            continue
        needed = owed + want.blocks + (0 if want.urgent else reserve)
        if not room.make(needed, want):
            break
        if owed or needed > room.free or want.job in room.losers:
            owed += want.blocks
        else:
            room.free -= want.blocks
            if want.upload:
                moves.uploads.append(want.job)
                coming += link.seconds(UPLOAD, want.blocks)
    else:
        room.make(owed + reserve, None)
    return moves


@dataclass(slots=True)
class _Room:
    """The blocks there are while moves are chosen."""

    victims: Iterator[Holder]
    free: int
    coming: int
    host_places: int
    whole: bool
    repayment: float
    backlog: float
    patience: float
    link: LinkEstimate
    moves: Moves
    gives_way: Callable[[Job, Job], bool] | None
    next: Holder | None = None  # the victim looked at, when it was not taken
    losers: set[Job] = field(default_factory=set)  # taken from: what they want comes in another iteration

    def make(self, needed: int, want: Want | None) -> bool:
        """Take from victims, the last to run first, until that many blocks are free or coming; whether they are."""
        refusals = 0
        while self.free + self.coming < needed:
            if refusals == _REFUSALS or self.backlog > self.patience:
                return False
            victim = self.next or next(self.victims, None)
            self.next = None
            runs_before = victim is not None and want is not None and want.urgent and victim.rank <= want.rank
            if victim is None or (runs_before and not victim.away):
                self.next = victim
                return False  # nobody is left who will run later
            refusals += runs_before or not self._take(victim, needed - self.free - self.coming, want)
        return True

    def _take(self, victim: Holder, short: int, want: Want | None) -> bool:
        """Have the victim give up to `short` blocks, the cheapest way; False: keeping them is cheaper."""
        if victim.away and victim.job in self.moves.uploads:
            return False  # it is coming back for the batch, and is no reserve
        urgent = want is not None and want.urgent
        short = victim.here if self.whole else min(victim.here, max(short, _FEWEST))
        copied = min(max(0, short - (victim.here - victim.unsaved)), victim.unsaved, self.host_places)
        out = self.link.seconds(OFFLOAD, copied)
        there_and_back = self.backlog + out + self.link.seconds(UPLOAD, victim.away + short)
        if not urgent and victim.enst <= there_and_back + (want.enst if want else 0.0):
            return False  # it would not be back in time
        owed = urgent and self.gives_way is not None and want is not None and self.gives_way(victim.job, want.job)
        earned = math.inf  # seconds of cost
        if not (owed or (want is not None and want.first)):
            if self.repayment:
                earned = victim.service / self.repayment
            elif victim.service <= 0.0:  # or jobs that take turns might go round for ever and get nothing new
                earned = 0.0
        swaps = bool(copied or victim.here > victim.unsaved)
        swaps = swaps and max(0.0, there_and_back - victim.enst) <= victim.recompute
        swaps = swaps and (victim.away > 0 or earned >= self.link.seconds(UPLOAD, victim.here))
        if not swaps and not (urgent and earned >= victim.recompute):
            return False
        if victim.busy:
            if urgent:
                self.losers.add(victim.job)
                self.moves.pauses.append(victim.job)
                self.coming += victim.here
            return urgent
        self.losers.add(victim.job)
        if swaps:
            leave = min(short, victim.here - victim.unsaved + copied)
            self.moves.offloads.append((victim.job, leave))
            self.free += leave - copied
            self.coming += copied
            self.host_places -= copied
            self.backlog += out
        else:
            self.moves.drops.append(victim.job)
            self.free += victim.here
        return True
