"""Whether a scheduler's books balance: for tests, and for whoever suspects they do not. O(everything)."""

from __future__ import annotations

import math

from .scheduler import Scheduler
from .types import Job


def check_integrity(scheduler: Scheduler) -> None:
    """Raise RuntimeError when the books do not balance: a block, slot or job lost, doubled or leaked."""
    residency, blocks, jobs = scheduler.residency, scheduler.blocks, scheduler.jobs
    residency.check_integrity()
    holders = residency.holders
    in_flight: dict[Job, list[bool]] = {}  # a job's rows: whether each samples
    for iteration in scheduler.in_flight:
        for job in iteration.decodes:
            in_flight.setdefault(job, []).append(True)
        for row in iteration.prefills:
            in_flight.setdefault(row.job, []).append(row.samples)
    for what, fine in {
        "the policy holds other jobs": len(scheduler.policy) == len(jobs),
        "a finished job is kept": all(not job.finished or job in in_flight for job in holders),
        "a job in flight holds no slot": in_flight.keys() <= holders.keys(),
    }.items():
        if not fine:
            raise RuntimeError(what)
    for batch in scheduler.batches:
        for place, job in enumerate(batch.jobs):
            if job.batch is not batch or job.row != place or job.finished:
                raise RuntimeError(f"job {job.job_id!r} is not where its batch has it")
            batch.sync(job)
    for job in {**holders, **dict.fromkeys(jobs.values())}:
        samples = in_flight.get(job, [])
        if (
            (job.in_flight, job.pending) != (len(samples), sum(samples))
            or not job.computed <= blocks.held(job.index) * blocks.block_size
            or not 0 <= job.computed <= (math.inf if job.finished else job.known)  # dropped tokens are not known
            or (job.slot is None) != (job not in holders)
        ):
            raise RuntimeError(f"job {job.job_id!r} is out of step with its blocks or plans: {job}")
    runs = {job for batch in scheduler.batches for job in (*batch.jobs, *batch.prefills)} | in_flight.keys()
    for job in set(jobs.values()) - runs:  # whoever takes up work again is asked what it will overwrite
        if job.waiting_since is None and len(job.output) < job.max_output:
            raise RuntimeError(f"job {job.job_id!r} waits, and does not know it")
