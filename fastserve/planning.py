"""Writing a BatchPlan: Python lists while it grows, arrays once at the end, because thirty rows a plan are too few to
pay for an array operation each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .types import BatchPlan, Int32Array, Job


class Row(NamedTuple):
    """One job's part in an iteration: positions start … start + tokens - 1."""

    job: Job
    start: int
    tokens: int
    samples: bool  # whether it ends at the job's last token, and so samples the next one


@dataclass(slots=True)
class Iteration:
    """A plan in flight. Its samples are those of `decodes`, then those of the `prefills` that sample."""

    plan_id: int
    scheduled: float
    decodes: list[Job]  # one token each
    prefills: list[Row]
    exhausted: list[Job]  # decodes that may not sample another token
    stop_tokens: frozenset[int]  # tokens that end one decode or another
    logprobs: bool  # whether one of the decodes asked for some
    waiting: int  # live jobs that are not in it
    free_blocks: int
    copied_blocks: int  # blocks in the copies that it starts
    levels: tuple[int, ...] = ()  # of all its jobs, where somebody wants to know

    @property
    def samples(self) -> int:
        return len(self.decodes) + sum(row.samples for row in self.prefills)

    @property
    def jobs(self) -> list[Job]:
        return self.decodes + [row.job for row in self.prefills]


class PlanBuilder:
    """Collects one plan. Calls for a slot come in the order close, open, grow, row."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._tokens: list[Int32Array] = []
        self._opened: list[int] = []
        self._opened_params: list[float] = []
        self._opened_seeds: list[int] = []
        self._history: list[int] = []
        self._bias_tokens: list[int] = []
        self._bias_values: list[float] = []
        self._stop_tokens: list[int] = []
        self._table: list[int] = []

    def open(self, job: Job, slot: int) -> None:
        """Tell the runtime all that sampling needs to know of the job. It has no tokens in flight."""
        params = job.params
        history = [*job.prompt, *job.output] if params.needs_history else []
        stops = sorted(job.stop_tokens) if params.min_tokens else []
        logprobs = -1 if params.logprobs is None else params.logprobs
        self._opened += (
            slot, len(job.prompt), len(history), max(0, params.top_k),
            logprobs, params.min_tokens, len(params.logit_bias), len(stops),
        )  # fmt: skip
        self._opened_params += (
            params.temperature, params.top_p, params.min_p,
            params.repetition_penalty, params.presence_penalty, params.frequency_penalty,
        )  # fmt: skip
        self._opened_seeds.append(job.seed)
        self._history += history
        self._bias_tokens += params.logit_bias.keys()
        self._bias_values += params.logit_bias.values()
        self._stop_tokens += stops

    def grow(self, slot: int, added: list[tuple[int, int]]) -> None:
        """Blocks added to the slot's table, as (index, block)."""
        for index, block in added:
            self._table += (slot, index, block)

    def row(self, job: Job, slot: int, start: int, tokens: int, logits: int) -> None:
        """Compute positions start … start + tokens - 1 of the job."""
        self._rows += (slot, start, tokens, logits)
        self._tokens.append(_token_ids(job, start, start + tokens))

    def build(
        self, plan_id: int, decodes: Int32Array, closed: list[int], copies: list[tuple[int, int, int, int]]
    ) -> BatchPlan:
        """The plan: `decodes`, rows [D, 4] of one token each, which is the slot's last sampled one; then the others."""
        plan = BatchPlan(plan_id=plan_id, rows=decodes, tokens=_last_sampled(len(decodes)))
        if self._rows:
            plan.rows = np.concatenate((decodes, np.array(self._rows, np.int32).reshape(-1, 4)))
            plan.tokens = np.concatenate((plan.tokens, *self._tokens))
        if self._opened:
            plan.opened = np.array(self._opened, np.int32).reshape(-1, 8)
            plan.opened_params = np.array(self._opened_params, np.float32).reshape(-1, 6)
            plan.opened_seeds = np.array(self._opened_seeds, np.uint64)
            plan.history = np.array(self._history, np.int32)
            plan.bias_tokens = np.array(self._bias_tokens, np.int32)
            plan.bias_values = np.array(self._bias_values, np.float32)
            plan.stop_tokens = np.array(self._stop_tokens, np.int32)
        if closed:
            plan.closed = np.array(closed, np.int32)
        if self._table:
            plan.table = np.array(self._table, np.int32).reshape(-1, 3)
        if copies:
            plan.copies = np.array(copies, np.int32)
        return plan


@lru_cache(maxsize=1024)
def _last_sampled(rows: int) -> Int32Array:
    tokens = np.full(rows, -1, np.int32)
    tokens.flags.writeable = False  # it is shared by plans
    return tokens


def _token_ids(job: Job, start: int, end: int) -> Int32Array:
    """Ids of tokens start … end - 1; -1 for one that is still being sampled, which can only be the last."""
    prompt = len(job.prompt)
    ids = job.prompt[start:end]
    if end > prompt:
        ids = [*ids, *job.output[max(0, start - prompt) : end - prompt]]
        ids += [-1] * (end - start - len(ids))
    elif isinstance(ids, range):
        return np.arange(ids.start, ids.stop, ids.step, dtype=np.int32)
    return np.array(ids, np.int32)
