"""What the engine is doing, in numbers: for metrics, for the dashboard and as its heartbeat."""

from __future__ import annotations

import math
from typing import Final

from .backlog import Backlog
from .config import SchedulerConfig
from .cost import Cost
from .engine import Engine, IterationRecord
from .ipc import Jobs, JobStatus, LevelStatus, Status, TenantStatus
from .types import DEVICE, HOST, OFFLOAD, UPLOAD, BatchPlan, FinishReason, Job

_TIERS: Final = {DEVICE: "device", HOST: "host", None: "none"}


class Monitor:
    """Counts iterations from `on_submit` and `on_iteration`, and reads the rest from the engine when it is asked."""

    def __init__(self, config: SchedulerConfig, cost: Cost, *, block_bytes: int) -> None:
        """`block_bytes`: of one KV block, all layers of it."""
        self.results = 0  # plans that have returned, those without rows included
        self._block_bytes = block_bytes
        self._cost = cost
        self._backlog = Backlog(config, cost)
        self._iterations = 0
        self._prefill_tokens = self._decode_tokens = 0
        self._busy = self._modelled = self._stalled = self._hidden = 0.0
        self._last_completed = -math.inf
        self._told: dict[Job, float] = {}  # service of live jobs that a Status has told of
        self._untold: dict[str, float] = {}  # service that none has told of, by tenant

    def on_submit(self, plan: BatchPlan) -> None:
        """A plan is handed to the runtime."""
        self._modelled += self._cost.plan_seconds(plan.rows[:, 1], plan.rows[:, 2])

    def on_iteration(self, record: IterationRecord) -> None:
        self.results += 1
        if record.job_ids:
            self._iterations += 1
            self._prefill_tokens += record.prefill_tokens
            self._decode_tokens += record.decode_tokens
            self._busy += record.seconds
        elif record.waiting:  # the device stood still until KV had moved
            self._stalled += record.completed - max(record.submitted, self._last_completed)
        self._last_completed = record.completed

    def added(self, job: Job) -> None:
        """A job has come, maybe with what a lost engine has served of it."""
        if job.attained > 0.0:
            self._told[job] = job.attained

    def ended(self, job: Job) -> None:
        """A job has left the engine, in whatever way."""
        self._serve(job, job.attained)
        self._told.pop(job, None)
        if job.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._backlog.ended(len(job.output))

    def status(self, engine: Engine, now: float) -> Status:
        """O(live jobs)."""
        scheduler, residency, blocks = engine.scheduler, engine.scheduler.residency, engine.scheduler.blocks
        jobs = engine.jobs
        levels = self._levels(engine, now)
        # What was moved while the device stood still for it was not hidden. A counter never falls, even where the stall
        # is known before the copy it was for.
        self._hidden = max(self._hidden, residency.copy_seconds - self._stalled)
        return Status(
            time=now,
            live=len(jobs),
            running=sum(level.running for level in levels),
            levels=levels,
            backlog=self._backlog.seconds(jobs),
            device_blocks=blocks.num_blocks,
            device_blocks_used=blocks.num_blocks - blocks.free_blocks,
            host_blocks=blocks.num_host_blocks,
            host_blocks_used=blocks.num_host_blocks - blocks.free_host_blocks,
            iterations=self._iterations,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            preemptions=scheduler.batches.preemptions,
            recomputed_tokens=scheduler.recomputed_tokens,
            offloaded_bytes=residency.copied[OFFLOAD] * self._block_bytes,
            uploaded_bytes=residency.copied[UPLOAD] * self._block_bytes,
            copy_seconds=residency.copy_seconds,
            hidden_copy_seconds=self._hidden,
            busy_seconds=self._busy,
            modelled_seconds=self._modelled,
            prefix_queries=residency.cache_counters.queries,
            prefix_hits=residency.cache_counters.hits,
            evicted_blocks=residency.cache_counters.evicted,
            device_blocks_cached=blocks.cached,
            host_blocks_cached=blocks.cached_host,
            programs=scheduler.programs.alive,
            tenants=self._served(engine),
        )

    def jobs(self, engine: Engine, query: int, now: float) -> Jobs:
        """The live jobs, the next to run first. O(live jobs · log)."""
        scheduler = engine.scheduler
        policy = scheduler.policy
        listed = []
        for job in sorted(engine.jobs, key=policy.rank):
            computed, attained = scheduler.progress(job)
            listed.append(
                JobStatus(
                    key=int(job.job_id),
                    level=policy.level(job),
                    running=_runs(job),
                    tier=_TIERS[job.tier],
                    prompt_tokens=len(job.prompt),
                    computed_tokens=computed,
                    output_tokens=len(job.output),
                    max_output_tokens=job.max_output,
                    attained=attained,
                    waiting=_waiting(job, now),
                    preemptions=job.metrics.preemptions,
                    cached_tokens=job.metrics.cached_tokens,
                    in_cache=job.cached,
                )
            )
        return Jobs(query, listed)

    def _served(self, engine: Engine) -> list[TenantStatus]:
        """Who was served since this was last asked."""
        for job in engine.jobs:
            if job.slot is not None or job.attained > 0.0:
                self._serve(job, engine.scheduler.progress(job)[1])
        served, self._untold = self._untold, {}
        return [TenantStatus(tenant, seconds) for tenant, seconds in served.items()]

    def _serve(self, job: Job, attained: float) -> None:
        """The job has had so much service by now."""
        new = attained - self._told.get(job, 0.0)
        if new > 0.0:
            self._told[job] = attained
            self._untold[job.tenant] = self._untold.get(job.tenant, 0.0) + new

    def _levels(self, engine: Engine, now: float) -> list[LevelStatus]:
        policy = engine.scheduler.policy
        levels = [LevelStatus(quantum, 0, 0, 0.0) for quantum in policy.quanta() or (None,)]
        for job in engine.jobs:
            level = levels[policy.level(job)]
            if _runs(job):
                level.running += 1
            else:
                level.waiting += 1
                level.oldest_wait = max(level.oldest_wait, _waiting(job, now))
        return levels


def _runs(job: Job) -> bool:
    """Whether the job is in the latest iterations, or the one to be planned next."""
    return job.waiting_since is None


def _waiting(job: Job, now: float) -> float:
    """Seconds since the job arrived or last ran; 0 while it runs."""
    return 0.0 if job.waiting_since is None else max(0.0, now - job.waiting_since)
