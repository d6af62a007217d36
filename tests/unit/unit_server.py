"""A server of a few lines for policies alone: every token, of a prompt or of an output, takes one second.

A job of p prompt tokens and k output tokens runs for p + k - 1 iterations, since the first output comes with the end of
the prompt. An iteration runs the first `batch` jobs of the policy's order, and lasts a second. What a policy is told
depends on `lumped`: after every iteration, or as seldom as its horizon allows.
"""

from __future__ import annotations

from fastserve.cost import CostModel
from fastserve.policies import Policy
from fastserve.types import FinishReason, Job, SamplingParams

COST = CostModel(per_iteration=0, per_token=1)


def unit_job(index: int, arrival: float, prompt: int, output: int, *, max_output: int = 4096, priority: int = 0) -> Job:
    """A job that will emit `output` tokens."""
    job = Job(str(index), [0] * prompt, SamplingParams(), 0, arrival, max_output, frozenset(), index, priority)
    job.known_output = output
    job.next_seconds = float(prompt)
    job.waiting_since = arrival
    return job


class UnitServer:
    def __init__(self, policy: Policy, batch: int = 1, *, lumped: bool = False) -> None:
        self.policy = policy
        self.now = 0.0
        self.schedule: list[tuple[int, ...]] = []  # indices of the jobs of each iteration
        self.finish: dict[int, float] = {}
        self._batch = batch
        self._lumped = lumped
        self._unreported: dict[Job, float] = {}  # of the running jobs
        self._live = 0

    def add(self, job: Job) -> None:
        self.policy.add(job, self.now)
        self._live += 1
        if self.policy.settles():
            for running in self._unreported:
                self._report(running)

    def run(self, jobs: list[Job]) -> None:
        """Serve all, in their order of arrival, to the end."""
        waiting = sorted(jobs, key=lambda job: (job.arrival, job.index), reverse=True)
        while waiting or self._live:
            if not self._live:
                self.now = max(self.now, waiting[-1].arrival)
            while waiting and waiting[-1].arrival <= self.now:
                self.add(waiting.pop())
            self.step()

    def abort(self, job: Job) -> None:
        """End a job that was not in the last iteration."""
        self.policy.remove(job)
        self._unreported.pop(job, None)
        self._live -= 1

    def step(self) -> list[Job]:
        """One iteration; returns who ran."""
        best = self.policy.iter_best(self.now)
        chosen = [job for job, _ in zip(best, range(self._batch), strict=False)]
        for job in [job for job in self._unreported if job not in chosen]:
            job.waiting_since = self.now
            self._report(job)
            del self._unreported[job]
        for job in chosen:
            if job.waiting_since is not None:
                job.waited += self.now - job.waiting_since
                job.waiting_since = None
                self._unreported[job] = 0.0
        self.schedule.append(tuple(job.index for job in chosen))
        self.now += 1.0
        for job in chosen:
            self._serve(job)
        return chosen

    def _serve(self, job: Job) -> None:
        job.served += 1
        job.next_seconds = float(max(1, len(job.prompt) - job.served))
        self._unreported[job] += 1.0
        if not self._lumped or self._unreported[job] >= self.policy.horizon(job):
            self._report(job)
        if job.served < len(job.prompt):
            return
        job.output.append(0)
        if len(job.output) == job.known_output or len(job.output) == job.max_output:
            self._report(job)
            reached = len(job.output) == job.known_output
            job.finish_reason = FinishReason.STOP if reached else FinishReason.LENGTH
            self.policy.on_finish(job, len(job.output), self.now)
            self.policy.remove(job)
            self.finish[job.index] = self.now
            self._live -= 1
            del self._unreported[job]

    def _report(self, job: Job) -> None:
        seconds, self._unreported[job] = self._unreported[job], 0.0
        if seconds:
            job.attained += seconds
            self.policy.on_service(job, seconds, self.now)
