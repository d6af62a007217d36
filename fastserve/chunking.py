"""How much of a prompt goes into one iteration, so that those who decode beside it are not held up."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Final

import numpy as np

from .cost import Cost
from .types import Int32Array

# Beside few decodes a prompt may make an iteration this many times as long, as far as that is no longer than a full
# batch of decodes: its first token is waited for, and a gap that everybody has once the batch is full disturbs nobody
# before. Twice as long is what a reader notices, and the cost model is not that exact.
SPARE_ROWS_LIMIT: Final = 1.9

# While every job has a row, prompts of an iteration that take no longer than this in all, alone, are computed at once:
# a gap as short as that is hardly seen, and time to the first token is what is waited for. Once jobs queue, what ends
# soonest is those that decode, so prompts do not hold them up. Where tenants share, that is for those whose jobs all
# have rows within their shares: whose jobs queue has nobody else's wait for theirs.
AT_ONCE_SECONDS: Final = 0.2


class Chunks:
    """Cuts the prefills of one iteration, `decodes` [count, 4] (slot, position, tokens, samples) being its other rows.

    With everything cut so far it takes, by the cost model, at most `limit` times what the decodes alone would take. In
    a batch that is not full that may be SPARE_ROWS_LIMIT times, while a full batch of decodes would take longer still.
    But the first prefill gets one token whatever that takes, and without decodes, or with a `limit` of None, nothing is
    cut. Nor are short prompts (AT_ONCE_SECONDS) that may be computed at once; the rest of a long one is no short one.
    Those beyond their tenants' shares have `spare` seconds together, whatever else is allowed.
    """

    def __init__(
        self,
        cost: Cost,
        limit: float | None,
        decodes: Int32Array,
        max_num_seqs: int,
        spare: float = math.inf,
    ) -> None:
        self._cost = cost
        self._starts = decodes[:, 1]
        self._tokens = decodes[:, 2]
        self._limit = limit if limit is not None and len(decodes) else math.inf
        self._max_num_seqs = max_num_seqs
        self._at_once = AT_ONCE_SECONDS  # what is left of it
        self._spare = spare
        self._seconds: float | None = None  # worked out where there is a prefill

    def cut(self, start: int, tokens: int, known: int, *, at_once: bool = False, beyond: bool = False) -> int:
        """How many of `tokens` from position `start` on there is time for; 0: none. They count as taken.

        They belong to a prefill of `known` tokens, from position 0 on, that may be computed `at_once` if it is short,
        or that is `beyond` its tenant's share.
        """
        if self._limit == math.inf == self._spare:
            return tokens
        first = self._seconds is None and not beyond
        if self._seconds is None:
            self._seconds = math.inf if self._limit == math.inf else self._allowed()
        allowed, alone = self._seconds, 0.0
        if beyond:
            alone = self._cost.plan_seconds(self._starts, self._tokens)
            allowed = min(allowed, alone + self._spare)
        elif at_once and (whole := self._cost.prefill_seconds(0, known)) <= self._at_once:
            self._at_once -= whole
            allowed = math.inf
        starts, computed = np.append(self._starts, np.int32(start)), np.append(self._tokens, np.int32(tokens))

        def seconds(count: int) -> float:
            computed[-1] = count
            return self._cost.plan_seconds(starts, computed)

        if seconds(tokens) > allowed:
            tokens = max(int(first), bisect_right(range(1, tokens), allowed, key=seconds))
        if tokens:
            computed[-1] = tokens
            if beyond:
                self._spare -= seconds(tokens) - alone
            self._starts, self._tokens = starts, computed
        return tokens

    def _allowed(self) -> float:
        """Seconds for the whole iteration."""
        alone = self._cost.plan_seconds(self._starts, self._tokens)
        if self._limit >= SPARE_ROWS_LIMIT:
            return self._limit * alone
        of_full = np.resize(self._starts, self._max_num_seqs)  # the same contexts, again and again
        full = self._cost.plan_seconds(of_full, np.ones_like(of_full))
        return max(self._limit * alone, min(SPARE_ROWS_LIMIT * alone, full))
