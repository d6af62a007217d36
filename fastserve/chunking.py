"""How much of a prompt goes into one iteration, so that those who decode beside it are not held up."""

from __future__ import annotations

import math
from bisect import bisect_right

import numpy as np

from .cost import Cost
from .types import Int32Array


class Chunks:
    """Cuts the prefills of one iteration, `decodes` [count, 4] (slot, position, tokens, samples) being its other rows.

    With everything cut so far it takes at most `limit` times what the decodes alone would take, by the cost model; but
    the first prefill gets one token whatever that takes. Without decodes, or with a `limit` of None, nothing is cut.
    """

    def __init__(self, cost: Cost, limit: float | None, decodes: Int32Array) -> None:
        self._cost = cost
        self._starts = decodes[:, 1]
        self._tokens = decodes[:, 2]
        self._limit = limit if limit is not None and len(decodes) else math.inf
        self._seconds: float | None = None  # worked out where there is a prefill

    def cut(self, start: int, tokens: int) -> int:
        """How many of `tokens` from position `start` on there is time for; 0: none. They count as taken."""
        if self._limit == math.inf:
            return tokens
        first = self._seconds is None
        if self._seconds is None:
            self._seconds = self._limit * self._cost.plan_seconds(self._starts, self._tokens)
        starts, computed = np.append(self._starts, np.int32(start)), np.append(self._tokens, np.int32(0))

        def seconds(count: int) -> float:
            computed[-1] = count
            return self._cost.plan_seconds(starts, computed)

        if seconds(tokens) > self._seconds:
            tokens = max(int(first), bisect_right(range(1, tokens), self._seconds, key=seconds))
        if tokens:
            computed[-1] = tokens
            self._starts, self._tokens = starts, computed
        return tokens
