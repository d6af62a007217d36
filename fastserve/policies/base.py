"""What every policy answers: who goes first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from ..types import Job


class Policy(ABC):
    """A deterministic index over the live jobs. It knows no clock (it is told `now`), no memory and no device.

    It reads a job's `next_seconds` (modelled solo time of its next iteration, kept up to date by the scheduler), its
    `arrival` and its `index`, and changes nothing of it. Every call costs O(log n) in the number of jobs.
    """

    @abstractmethod
    def add(self, job: Job, now: float) -> None:
        """A job arrived."""

    @abstractmethod
    def remove(self, job: Job) -> None:
        """A job left, finished or aborted."""

    @abstractmethod
    def on_service(self, job: Job, own_seconds: float, now: float) -> None:
        """The job got new work done; `own_seconds` is its modelled solo time. Not called for recomputation alone."""

    def on_finish(self, job: Job, output_tokens: int, now: float) -> None:
        """The job is complete; `remove` follows. For policies that learn from output lengths."""
        return None

    def next_deadline(self) -> float | None:
        """When time alone will next change the order; None: never."""
        return None

    @abstractmethod
    def iter_best(self, now: float) -> Iterator[Job]:
        """The jobs, highest priority first. Lazy: taking k jobs costs O(k), however many there are.

        The policy must not be changed while the iterator is in use.
        """

    @abstractmethod
    def rank(self, job: Job) -> tuple[int, int]:
        """A key that sorts jobs as iter_best does; good until the policy changes. O(1)."""

    @abstractmethod
    def work_ahead(self, job: Job, now: float) -> float:
        """Modelled seconds of work before this job runs, if jobs ran one at a time; divide by the batch size."""

    def level(self, job: Job) -> int:
        """The job's level, for display; 0 for policies without levels."""
        return 0

    @abstractmethod
    def __len__(self) -> int:
        """How many jobs are in the index."""
