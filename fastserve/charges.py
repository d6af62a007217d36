"""What jobs are charged for the service they get, and when the policy hears of it.

A job's service is the modelled solo time of what is new: neighbours, waiting, swapping and recomputation never are, and
of a pipeline one stage (see cost.stage_cost). Charged of it is what the job takes from the others of a full batch: what
it adds to an iteration, and its share of what an iteration costs empty. 60 tokens of an 8B model on an A100 take as
long as a prompt of 7,000 if both are alone, and from 15 others as much as one of 700. Charged for their solo time, a
job would seem to be a long one as soon as it decodes, and give way to prefills that hold up everybody.

The policy hears of it in lumps, when it can change a job's place, so methods return how often they told it.
"""

from __future__ import annotations

import numpy as np

from .cost import Cost, shared_seconds
from .decode_rows import DecodeRows
from .policies import Policy
from .programs import Programs
from .types import Job

_NOTHING = 0.0, 0.0


class Charges:
    """Keeps Job.attained, Job.charged, Job.served and Job.next_seconds."""

    def __init__(self, policy: Policy, programs: Programs, cost: Cost, batch: int) -> None:
        """`batch`: the most jobs in an iteration."""
        self._policy = policy
        self._programs = programs
        self._cost = cost
        self._shared = shared_seconds(cost, batch)
        self._untold: dict[Job, tuple[float, float]] = {}  # service, and charges, that the policy was not told of

    def arrived(self, job: Job) -> None:
        """A job without output. What others have computed of it, it is never charged for."""
        job.served = job.cached
        self._estimate(job)

    def resumed(self, job: Job) -> None:
        """A job that a lost engine left with some output.

        What it had been served counts as served, without what that engine found in its cache, so it is not charged for
        what is computed again, and a policy that goes by service has it where it was; but it joins by all that has to
        be computed.
        """
        prompt, found = len(job.prompt), job.metrics.cached_tokens
        contexts = np.arange(prompt + 1, job.known, dtype=np.int32)  # of the tokens behind the first
        job.attained = self._cost.prefill_seconds(found, prompt - found) + float(self._cost.decode_each(contexts).sum())
        job.charged = max(0.0, job.attained - (1 + len(contexts)) * self._shared)
        job.served = job.known - 1
        job.next_seconds = self._prefill_seconds(job, job.cached, job.known)

    def attained(self, job: Job) -> float:
        """Modelled seconds of its service so far, told or not."""
        rows = job.batch
        if isinstance(rows, DecodeRows):
            return job.attained + rows.unreported(job)
        return job.attained + self._untold.get(job, _NOTHING)[0]

    def prefill(self, job: Job, start: int, end: int) -> int:
        """Charge a job for its tokens start … end - 1; returns how many had been computed before."""
        known = max(0, min(job.served, end) - start)
        start += known
        if start == end:
            return known
        decodes = start >= len(job.prompt)
        seconds = self._cost.decode_seconds(end) if decodes else self._prefill_seconds(job, start, end)
        # The first part of a prefill is charged what an iteration costs empty, the others are not.
        self._untold[job] = seconds, max(0.0, seconds - (self._shared if decodes or start == job.cached else 0.0))
        job.served = end
        return known

    def left(self, job: Job, seconds: float) -> None:
        """A job is not among the decodes any more, and the policy has not heard of so much of what it got there."""
        self._untold[job] = seconds, self._of_decodes(job, seconds)

    def tell(self, job: Job, now: float) -> int:
        """Tell the policy of one job."""
        seconds, charged = self._untold.pop(job, _NOTHING)
        if seconds <= 0.0:
            return 0
        job.attained += seconds
        job.charged += charged
        self._programs.on_service(job, charged)
        self._estimate(job)
        self._policy.on_service(job, charged, now)
        return 1

    def tell_all(self, now: float) -> int:
        """Of all that are not decoding."""
        return sum([self.tell(job, now) for job in list(self._untold)])

    def tell_decodes(self, batch: DecodeRows, now: float, *, everyone: bool = False) -> int:
        """Of decodes whose service may change their places, or of `everyone`."""
        told = 0
        horizons: list[tuple[Job, float]] = []
        for job, own in batch.take_service(everyone=everyone):
            if own > 0.0:
                charged = self._of_decodes(job, own)
                job.next_seconds = self._cost.decode_seconds(job.served + 1)
                job.attained += own
                job.charged += charged
                self._programs.on_service(job, charged)
                self._policy.on_service(job, charged, now)
                told += 1
            horizons.append((job, self._policy.horizon(job)))
        batch.set_horizons(horizons)
        return told

    def _of_decodes(self, job: Job, seconds: float) -> float:
        """What a job's latest decodes, of so many solo seconds, are charged.

        How many they are is not known: they are taken to be as long as the first and the last of them on average, which
        is exact where contexts add to a decode in proportion.
        """
        last = self._cost.decode_seconds(job.served)
        first = job.next_seconds if 0.0 < job.next_seconds <= last else last  # else it is yet that of a prefill
        return seconds * max(0.0, 1 - 2 * self._shared / (first + last))

    def _estimate(self, job: Job) -> None:
        if job.served < len(job.prompt):
            job.next_seconds = self._prefill_seconds(job, job.served, len(job.prompt))
        else:
            job.next_seconds = self._cost.decode_seconds(job.served + 1)

    def _prefill_seconds(self, job: Job, start: int, end: int) -> float:
        """What positions start … end - 1 add to the solo time of a prefill that begins behind what is cached."""
        first, cost = job.cached, self._cost
        return cost.prefill_seconds(first, end - first) - cost.prefill_seconds(first, start - first)
