"""What is learned of how long outputs are, as they come: for all jobs, and for groups of jobs that are unlike them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from ..types import Job
from .groups import Group, Groups
from .hazards import Hazards, bucket, drifted, edge

# What little is known of a bucket is mixed with a prior that counts as much as this many jobs: the older a job, the
# longer it still has to go (a Lomax distribution of this shape, whose mean is that of the lengths seen), which makes
# the index order jobs as a multi-level feedback queue does. It keeps chance from making up an order of its own.
_PRIOR_WEIGHT: Final = 50.0
_PRIOR_SHAPE: Final = 2.0


class LengthDistribution:
    """What the policies that learn share: tables of hazards, and whether to trust them.

    They are trusted after `learn_after` completions, made anew every so often, and no longer once the lengths of late
    have drifted from those before; then all is learned again, but for groups that are as they were: it was the mix of
    them that drifted. Table 0 is that of all jobs; see Groups for the others.
    What is told of a job is told with `groups`, those that it belonged to when it came (see `groups_of`).
    """

    # Completions after which one counts 1/e of a new one.
    _SLOW, _FAST = 4000.0, 200.0
    # Completions between two tables: a tenth of those learned from, within these.
    _RENEWALS = (25, 400)

    # Few, for what decides until then may leave many jobs half done; the prior keeps so small a table from being taken
    # at its word.
    _ENOUGH = 64

    def __init__(self, learn_after: int = _ENOUGH) -> None:
        self._learn_after = learn_after
        self.version = 0  # of the table
        self.mean_prompt = 0.0  # tokens, of the last thousand jobs or so
        self._prompts = 0
        self._groups = Groups()
        self._forget()

    def _forget(self) -> None:
        self.learned = False
        self.hazards: list[float] = []  # the table; see hazard() for the buckets beyond it
        self._slow, self._fast = Hazards(self._SLOW), Hazards(self._FAST)
        self._groups.forget()
        self._completions = 0
        self._mean = 1.0  # output tokens of a completed job, lately
        self._next_renewal = self._learn_after

    def hazard(self, index: int, table: int = 0) -> float:
        """A table's hazard of a bucket. A table that is no more is that of all jobs."""
        if table and (hazard := self._groups.hazard(table, index)) is not None:
            return hazard
        return self.hazards[index] if index < len(self.hazards) else self._prior(index)

    def groups_of(self, job: Job) -> Sequence[Group]:
        """The groups that the job belongs to, the most telling first."""
        return self._groups.of(job)

    @property
    def regrouped(self) -> int:
        """Counts the changes of which groups have a table."""
        return self._groups.changes

    def _prior(self, index: int) -> float:
        return 1 - math.pow((edge(index) + self._mean) / (edge(index + 1) + self._mean), _PRIOR_SHAPE)

    def saw_prompt(self, tokens: int) -> None:
        """A job of that many prompt tokens arrived."""
        self._prompts += 1
        self.mean_prompt += (tokens - self.mean_prompt) / min(self._prompts, 1000)

    def survived(self, first: int, last: int, groups: Sequence[Group] = ()) -> None:
        """A live job has passed buckets first … last - 1."""
        for hazards in self._told(groups):
            hazards.survived(first, last)

    def ended(self, first: int, length: int, groups: Sequence[Group] = ()) -> None:
        """A job's output is complete; as far as reported, it had survived the buckets before `first`."""
        index = bucket(length - 1)
        for hazards in self._told(groups):
            hazards.survived(first, index)
            hazards.ended(index)
        self._groups.ended(groups)
        self._complete(length)

    def censored(self, first: int, length: int, groups: Sequence[Group] = (), *, complete: bool) -> None:
        """A job ended for another reason: by max_tokens (`complete`), or aborted."""
        index = bucket(length)
        share = (length - edge(index)) / (edge(index + 1) - edge(index))
        for hazards in self._told(groups):
            hazards.survived(first, index)
            hazards.censored(index, share)
        if complete:
            self._groups.ended(groups)
            self._complete(length)

    def _told(self, groups: Sequence[Group]) -> list[Hazards]:
        told = [self._slow, self._fast]
        for group in groups:
            told += group.told
        return told

    def _complete(self, length: int) -> None:
        self._completions += 1
        self._mean += (length - self._mean) / min(self._completions, self._SLOW)
        if self._completions < self._next_renewal:
            return
        self.version += 1
        if self.learned and drifted(self._fast, self._slow):
            self._forget()
            return
        self.learned = True
        self.hazards = [self._slow.hazard(index, self._prior(index), _PRIOR_WEIGHT) for index in range(len(self._slow))]
        self._groups.renew(self._slow.counts, self.hazard)
        low, high = self._RENEWALS
        self._next_renewal = self._completions + min(max(self._completions // 10, low), high)
