"""What every policy answers: who goes first."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from ..types import Job


def charge_ahead(job: Job, shared: float) -> float:
    """What a job will be charged for its next iteration: for all that is left of its prefill, or for a decode.

    Of either the others of a full batch pay the part `shared`, but once for each prefill.
    """
    return job.next_seconds - (0.0 if job.cached < job.served < len(job.prompt) else shared)


class Policy(ABC):
    """A deterministic index over the live jobs. It knows no clock (it is told `now`), no memory and no device.

    It reads what the scheduler keeps up to date in a job and changes nothing of it: `next_seconds` (modelled solo time
    of its next iteration), `attained` (that of its service so far), `charged` (what `on_service` has reported),
    `inherited` (what earlier calls of its program were charged), `waiting_since` and `waited`, `arrival`, `index`,
    `max_output`, `prompt`, `output`, `cached`, `served`, `tenant`, `program` and `group`. Every call costs O(log n) in
    the number of jobs.
    """

    share = 1.0  # of the device's time: what its jobs may count on; set before iter_best

    @abstractmethod
    def add(self, job: Job, now: float) -> None:
        """A job arrived."""

    @abstractmethod
    def remove(self, job: Job) -> None:
        """A job left, finished or aborted."""

    @abstractmethod
    def on_service(self, job: Job, seconds: float, now: float) -> None:
        """The job got new work done, and is charged for what it took from the others of a full batch (see Charges).

        Not called for recomputation alone.

        The service of several iterations may come in one call, though never later than `horizon` allows.
        """

    def refresh(self, job: Job, now: float) -> None:
        """A job that was never served has less or more to compute than when it came: its `next_seconds` are others."""
        return None

    def horizon(self, job: Job) -> float:
        """Seconds of its own service until the job's place may change; 0: tell me after every iteration.

        At the latest, `on_service` is called after the iteration in which the job's unreported service reaches this,
        or when the job has been left out of a batch.
        """
        return 0.0

    def settles(self) -> bool:
        """Whether the job that just came changes what service is for: then all of it until now is told, and horizons
        are asked for anew, before the next iter_best."""
        return False

    def on_finish(self, job: Job, output_tokens: int, now: float) -> None:
        """The job is complete, and its `finish_reason` says why; `remove` follows. For policies that learn."""
        return None

    def make_way(self) -> None:
        """Others' jobs compete for places too: those that run may not all stay. Called before iter_best."""
        return None

    def close_order(self) -> None:
        """The latest order that iter_best gave is over, and the next may be made without this policy's jobs: ranks and
        iter_tier are to agree with what is now. iter_best does so by itself."""
        return None

    def next_deadline(self) -> float | None:
        """When time alone will next change the order, or, for the sake of running jobs, earlier; None: never."""
        return None

    def deadline(self, job: Job) -> float:
        """When waiting alone will bring this job to the front, if it goes on waiting; infinity: never. O(1)."""
        return math.inf

    @abstractmethod
    def move(self, job: Job, tier: int | None) -> None:
        """The job's KV is now in another tier, or gone; `job.tier` is about to say so."""

    @abstractmethod
    def iter_best(self, now: float) -> Iterator[Job]:
        """The jobs, highest priority first. Lazy: taking k jobs costs O(k), however many there are.

        The policy must not be changed while the iterator is in use.
        """

    @property
    def several(self) -> bool:
        """Whether tenants share the device: only then, may anybody be beyond its share."""
        return False

    @property
    def beyond(self) -> bool:
        """Whether the job that the latest iter_best gave last, and all after it, are beyond their tenants' shares, and
        others' jobs, all of which are within theirs, came before."""
        return False

    def is_small(self, job: Job) -> bool:
        """Whether its tenant has little to ask, and so have those whom it shares as one with. O(1)."""
        return True

    def is_sheltered(self, job: Job) -> bool:
        """Whether its tenant, or those whom it shares as one with, have little to ask beside others: rows beyond these
        others' shares are to leave it in peace. O(1)."""
        return False

    def shares(self, job: Job) -> tuple[float, ...]:
        """Of the device's memory: of those whom its tenant shares as one with, if there are such, and of its tenant. Of
        tenants that have jobs, by weight. O(1)."""
        return ()

    @abstractmethod
    def iter_tier(self, tier: int, worst_first: bool = False) -> Iterator[Job]:
        """Those of them whose KV is in a tier, in the order of the latest iter_best or against it. As lazy.

        For when nobody may start, and for who must give way: however many hold none, this does not look at them.
        """

    @abstractmethod
    def rank(self, job: Job) -> tuple[float, ...]:
        """A key that sorts jobs as iter_best does; good until the policy changes. O(1)."""

    @abstractmethod
    def work_ahead(self, job: Job, now: float) -> float:
        """Modelled seconds of work before this job runs, if jobs ran one at a time; divide by the batch size."""

    @abstractmethod
    def backlog(self, now: float) -> float:
        """Modelled seconds of work of all jobs, as work_ahead counts it for a job that comes after them all."""

    def quanta(self) -> Sequence[float]:
        """Seconds of service that each level gives, for display; nothing for policies without levels."""
        return ()

    def level(self, job: Job) -> int:
        """The job's level, for display; 0 for policies without levels."""
        return 0

    @abstractmethod
    def __len__(self) -> int:
        """How many jobs are in the index."""
