"""How long the jobs that live will keep the device busy: for those who ask when to come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .config import SchedulerConfig
from .cost import Cost, stage_cost
from .types import Job

# Outputs that are remembered: enough to tell how long they are, few enough to follow what users do today.
_MEMORY: Final = 512

# Tokens of an output, until one has ended.
_GUESS: Final = 128.0

_Numbers = npt.NDArray[np.floating[Any]]


class OutputLengths:
    """How long outputs have been lately, and so how long others will be."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=_MEMORY)
        # Sorted, and the sums of those from each on; None: a length has come since they were made.
        self._ordered: tuple[_Numbers, _Numbers] | None = None

    def ended(self, output_tokens: int) -> None:
        """A job is complete; those aborted say nothing about lengths."""
        self._lengths.append(output_tokens)
        self._ordered = None

    def left(self, ages: _Numbers, rooms: _Numbers) -> _Numbers:
        """Tokens that jobs of these ages are expected to put out yet: what those of late did that got so old.

        Beyond the oldest of them, the older a job is, the longer it has to go, as when lengths have a heavy tail.
        """
        if self._ordered is None:
            ordered = np.sort(np.array(self._lengths, np.float64))
            self._ordered = ordered, np.append(ordered[::-1].cumsum()[::-1], 0.0)
        lengths, sums = self._ordered
        mean = float(sums[0]) / len(lengths) if len(lengths) else _GUESS
        first = np.searchsorted(lengths, ages, side="right")  # the first of those that got older
        older = len(lengths) - first
        known = sums[first] / np.maximum(older, 1) - ages
        return np.minimum(np.where(older > 0, known, ages + mean), rooms)


class Backlog:
    """An estimate in seconds, by the cost model and by how long outputs have been lately."""

    def __init__(self, config: SchedulerConfig, cost: Cost) -> None:
        self._rows = config.max_num_seqs
        self._cost = stage_cost(cost, config.pipeline_parallel_size)  # every stage has a batch of its own
        self._lengths = OutputLengths()

    def ended(self, output_tokens: int) -> None:
        """A job is complete; those aborted say nothing about lengths."""
        self._lengths.ended(output_tokens)

    def seconds(self, jobs: Collection[Job]) -> float:
        """Until all of them are done, if no others came. O(jobs)."""
        if not jobs:
            return 0.0
        rows = min(self._rows, len(jobs))
        # Of what an iteration costs whatever is in it, each of its jobs pays a part.
        shared = max(0.0, self._cost.decode_seconds(1) - self._cost.prefill_charge(1, 2)) * (1 - 1 / rows)
        prefill, tokens = 0.0, 0
        ages, rooms = [], []
        for job in jobs:
            age = len(job.output)
            ages.append(age)
            rooms.append(job.max_output - age)
            tokens += len(job.prompt) + age
            if job.slot is None:  # nothing of it is computed, or all has to be once more
                prefill += max(0.0, self._cost.prefill_seconds(job.cached, job.known - job.cached) - shared)
            elif job.served < len(job.prompt):
                prefill += job.next_seconds
        left = float(self._lengths.left(np.array(ages, np.float64), np.array(rooms, np.float64)).sum())
        contexts = np.full(rows, tokens // len(jobs), np.int32)
        return prefill + left * self._cost.plan_seconds(contexts, np.ones(rows, np.int32)) / rows
