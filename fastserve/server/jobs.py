"""OpenJob: one prompt and its output as the API server keeps them. What the engine holds of it may be lost at any time.

Update ──take──▶ output, logprobs ──detokenizer──▶ text ──news()──▶ whoever writes the answer
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from ..ipc import Update
from ..origin import Origin
from ..tokenizer import IncrementalDetokenizer, Tokenizer
from ..types import FinishReason, InvalidRequest, JobMetrics, SamplingParams, TokenLogprobs


class OpenJob:
    """The truth of one job. The ledger writes it, in the event loop; everyone else reads.

    `output` and `logprobs` grow; `text` holds what is safe to show, so it may lag behind while half a character or what
    may become a stop string is held back. `finish_reason` is as in CompletionOutput; with "error" comes `error`.
    `metrics` comes at the end from the engine, on time.monotonic; it is None where the engine did not have the last
    word: for a job that was closed, or ended because the engine was lost. `first_token`, `last_token` and `finished`
    are this process's own times.
    """

    __slots__ = (
        "_changed",
        "_detokenizer",
        "_refusal",
        "_waiter",
        "arrival",
        "blame",
        "cached_tokens",
        "deaths",
        "deaths_at",
        "engine",
        "error",
        "finish_reason",
        "finished",
        "first_token",
        "inherited",
        "key",
        "last_token",
        "logprobs",
        "metrics",
        "origin",
        "output",
        "params",
        "pieces",
        "priority",
        "prompt",
        "seed",
        "stop_reason",
        "stopped",
        "submissions",
        "ticket",
        "told_after",
    )

    def __init__(
        self,
        key: int,
        prompt: list[int],
        params: SamplingParams,
        seed: int,
        priority: int,
        arrival: float,
        origin: Origin,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.key = key
        self.prompt = prompt
        self.params = params
        self.seed = seed
        self.priority = priority
        self.arrival = arrival  # time.monotonic
        self.origin = origin
        self.output: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None  # the stop string or the stop token id
        self.error: str | None = None
        self.metrics: JobMetrics | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.finished: float | None = None

        self.inherited = 0.0  # seconds that earlier calls of its program were served
        self.cached_tokens = 0  # of its prompt, that the engine found which put out the first token
        self.engine = 0  # the number of the one that it is on
        self.pieces: Sequence[int] = ()  # of its prompt, where there are several (affinity.py)

        # The ledger's own: under which key the engine has it, None while it has not, and how engines died with it.
        self.ticket: int | None = None
        self.submissions = 0
        self.stopped = False  # a stop string is complete; the engine's accounts are still to come
        self.told_after = 0  # the Step from which on the engine's list of running jobs can be taken to know of it
        self.deaths = 0  # engines that died while it ran, without a token between
        self.deaths_at = -1  # tokens it had then
        self.blame = 0  # what those deaths say against it

        self._detokenizer = (
            IncrementalDetokenizer(
                tokenizer, tuple(params.stop), params.include_stop_str_in_output, params.skip_special_tokens
            )
            if tokenizer is not None
            else None
        )
        self._changed = False
        self._refusal: InvalidRequest | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def text(self) -> str:
        return self._detokenizer.text if self._detokenizer is not None else ""

    async def news(self) -> None:
        """Return when something was added or the job ended since the last call; at once when it has ended.

        One waiter at a time. Raises InvalidRequest when the engine does not take the job.
        """
        if not self._changed and self.finish_reason is None:
            if self._waiter is not None:
                raise RuntimeError(f"job {self.key} has a waiter already")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._changed = False
        if self._refusal is not None:
            raise self._refusal

    # --- for the ledger ----------------------------------------------------------------------------------------------

    def take(self, update: Update) -> bool:
        """What one iteration did. True when the engine has to be told that a stop string has ended the job."""
        reason, stopped_before = update.finish_reason, self.stopped
        if update.token is not None and not stopped_before:
            self.last_token = time.monotonic()
            if self.first_token is None:
                self.first_token = self.last_token
                self.cached_tokens = update.cached_tokens
            self.output.append(update.token)
            if update.logprobs is not None:
                self.logprobs.append(update.logprobs)
            if self._detokenizer is not None:
                self._read(self._detokenizer, update.token, reason)
        if reason is not None:
            self.metrics = self._whole(update.metrics)
            if reason == FinishReason.STOP.value and update.token in self.params.stop_token_ids:
                self.stop_reason = update.token
            self._finish(reason, update.error)
        elif not stopped_before:
            self._wake()
        return self.stopped and not stopped_before and reason is None

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """End the job without the engine."""
        if self.finish_reason is None:
            self._finish(reason.value, error)

    def refuse(self, refusal: InvalidRequest) -> None:
        if self.finish_reason is None:
            self._refusal = refusal
            self.end(FinishReason.ERROR, str(refusal))

    def _read(self, detokenizer: IncrementalDetokenizer, token: int, reason: str | None) -> None:
        """Turn a token into text."""
        if reason == FinishReason.STOP.value and not self.params.include_stop_str_in_output:
            return  # the stop token belongs to the output and not to the text
        detokenizer.append((token,), match_stop=len(self.output) > self.params.min_tokens)
        if detokenizer.matched_stop is not None:
            self.stopped = True

    def _finish(self, reason: str, error: str | None) -> None:
        if self._detokenizer is not None:
            self._detokenizer.flush()
            if self._detokenizer.matched_stop is not None:  # maybe in what was held back until now
                self.stop_reason = self._detokenizer.matched_stop
                reason, error = FinishReason.STOP.value, None
        self.finish_reason, self.error = reason, error
        self.finished = time.monotonic()
        self._wake()

    def _whole(self, metrics: JobMetrics | None) -> JobMetrics | None:
        """What the last engine measured, with what it cannot know: that an earlier one had begun."""
        if metrics is None or self.submissions == 1 or self.first_token is None:
            return metrics
        first = self.first_token if metrics.first_token is None else min(self.first_token, metrics.first_token)
        return replace(metrics, first_token=first)

    def _wake(self) -> None:
        self._changed = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
