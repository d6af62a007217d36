"""Jobs drawn at random, lazily and repeatably."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from .arrivals import Arrivals
from .checks import check_count, check_real
from .job import SimJob
from .lengths import Lengths

# Jobs are drawn this many at a time, always all of them, so that a longer workload begins with the shorter one.
_CHUNK = 1024

MIN_RATE, MAX_RATE = 1e-9, 1e9  # jobs a second


@dataclass(frozen=True)
class Synthetic:
    """An endless workload: lengths, and an arrival process.

    Gaps, prompts and outputs come from generators of their own. So equal seeds give equal lengths whatever the rate and
    the arrival process, and what is compared on them is paired.
    """

    lengths: Lengths
    arrivals: Arrivals

    @property
    def name(self) -> str:
        return self.lengths.name

    @property
    def longest(self) -> int:
        """No job has more tokens than this, prompt and output together."""
        return self.lengths.longest

    def jobs(self, seed: int, count: int, rate: float) -> Iterator[SimJob]:
        """The first `count` jobs at `rate` jobs a second on average; the first arrives at 0.

        Raises InvalidRequest for a seed below 0, or a rate that is not a number above 0.
        """
        check_real("rate", "jobs a second", rate, MIN_RATE, MAX_RATE)
        check_count("seed", "a seed", seed, 0, 2**64 - 1)
        return islice(self._endless(seed, rate), count)

    def _endless(self, seed: int, rate: float) -> Iterator[SimJob]:
        gaps, prompts, outputs = (np.random.default_rng(each) for each in np.random.SeedSequence(seed).spawn(3))
        now, first = 0.0, 0  # on the clock of one job a second
        while True:
            uniform = prompts.random(_CHUNK), outputs.random(_CHUNK)
            prompt_tokens, output_tokens = (tokens.tolist() for tokens in self.lengths.draw(uniform))
            ends = now + np.cumsum(self.arrivals.gaps(gaps, first, _CHUNK))
            arrivals = (np.concatenate(((now,), ends[:-1])) / rate).tolist()
            yield from map(SimJob, arrivals, prompt_tokens, output_tokens)
            now, first = float(ends[-1]), first + _CHUNK
