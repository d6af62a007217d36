"""Who is in the next batch: the policy's order, cut to rows, tokens and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from .config import SchedulerConfig
from .decode_rows import DecodeRows
from .policies import Policy
from .room import Room
from .shelter import Shelter
from .types import DEVICE, Job

# How many batches of jobs are looked at for rows that nobody may start in.
_LOOKAHEAD: Final = 4


@dataclass(slots=True)
class Selection:
    """The next batch, but for those of its decodes that are in it already. All its jobs carry the decision's mark."""

    joins: list[Job] = field(default_factory=list)  # decodes that were not in the batch
    prefills: list[Job] = field(default_factory=list)
    last: Job | None = None  # the last of its jobs, if the batch is full


def select(
    batch: DecodeRows,
    growers: set[Job],
    mark: int,
    now: float,
    *,
    limit: int,
    config: SchedulerConfig,
    policy: Policy,
    room: Room,
    shelter: Shelter | None,
    available: Callable[[Job], bool],
) -> Selection:
    """Choose up to `limit` jobs, best first.

    `growers` decode in the batch and need another block; `available`: may a job be in it?

    Every decode chosen has its token set aside, so a prefill, however long and however important, never stalls the jobs
    it shares the iteration with; one for which nothing is left gives up its row. A job whose KV is not on the device,
    or that finds no room there, is passed over, and room is made for it. While a job waits for room to start, nobody
    behind it starts, so small jobs do not keep a large one out; only jobs whose KV is there follow. Beside jobs within
    their tenants' shares, those beyond have rows as far as `shelter` has time for them; None: there is one tenant.
    """
    room.begin(len(batch.jobs), now)
    budget = config.max_num_batched_tokens
    chosen = Selection()
    prefills = chosen.prefills
    rows = wanted = 0  # rows taken, and the tokens that the prefills among them have to compute ...
    before: list[int] = []  # ... those ahead of each of them
    latest: Job | None = None
    candidates = policy.iter_best(now)

    def taken() -> list[Job]:
        return [*(job for job in batch.jobs if job.mark == mark), *chosen.joins, *prefills]

    if shelter is not None:
        candidates = shelter.best(candidates, taken, limit)
    for nobody_starts in (False, True):
        for job in candidates:
            if job.mark == mark:
                continue
            if job.batch is batch:
                if growers and job in growers and not room.grows(job, rows):
                    continue
            elif not available(job):
                continue
            elif not job.primed:
                if wanted >= budget - rows + len(prefills):
                    room.closed = True
                elif room.admits(job, rows):
                    latest = job
                    job.mark = mark
                    prefills.append(job)
                    before.append(wanted)
                    wanted += _to_compute(job)
                    rows += 1
                    if rows == limit:
                        chosen.last = job
                        return chosen
                if room.closed and not nobody_starts:
                    break
                continue
            elif room.admits(job, rows):
                chosen.joins.append(job)
            else:
                continue
            latest = job
            job.mark = mark
            rows += 1
            while before and before[-1] >= budget - rows + len(before):
                rows -= 1
                prefills.pop().mark = 0
                wanted = before.pop()
            if rows == limit:
                chosen.last = job
                return chosen
        else:
            break  # there is nobody else
        candidates = islice(policy.iter_tier(DEVICE), _LOOKAHEAD * limit)
        if shelter is not None:
            candidates = shelter.here(candidates, taken, limit)
    if shelter is not None and shelter.full:
        chosen.last = latest
    return chosen


def _to_compute(job: Job) -> int:
    """Known tokens whose KV is not computed."""
    return job.known - job.computed
