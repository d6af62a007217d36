"""What a request gives back, and how it is put together token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from .requests import Request
from .tokenizer import IncrementalDetokenizer, Tokenizer
from .types import FinishReason, Job, JobMetrics, TokenLogprobs


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One answer to a prompt."""

    index: int  # which of the request's `n`
    text: str  # without the stop string or stop token, unless include_stop_str_in_output
    token_ids: list[int]  # up to and including the token that ended it
    finish_reason: str | None  # stop, length, abort or error; None while it grows
    error: str | None = None  # why, where finish_reason is error
    stop_reason: str | int | None  # the stop string or the stop token id; None for end-of-sequence and otherwise
    logprobs: list[TokenLogprobs] | None  # one for each of token_ids, where asked for
    metrics: JobMetrics

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A prompt and its answers so far. A snapshot: it does not change after it was handed out."""

    request_id: str
    prompt: str | None  # None when the prompt was given as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def finished(self) -> bool:
        return all(output.finished for output in self.outputs)

    @property
    def text(self) -> str:
        """Of the first answer, as are token_ids and finish_reason: for the usual case of one."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def metrics(self) -> JobMetrics:
        """Of the request as a whole: from its arrival to the last token of its last answer.

        With n > 1, preemptions and recomputed tokens are sums, cached tokens those of the first answer, as the others
        find what it has computed, and the seconds those of the answer that came last.
        """
        each = [output.metrics for output in self.outputs]
        last = max(each, key=lambda metrics: metrics.finish or 0.0)
        return replace(
            last,
            first_scheduled=_earliest(metrics.first_scheduled for metrics in each),
            first_token=_earliest(metrics.first_token for metrics in each),
            finish=last.finish if self.finished else None,
            preemptions=sum(metrics.preemptions for metrics in each),
            recomputed_tokens=sum(metrics.recomputed_tokens for metrics in each),
            cached_tokens=each[0].cached_tokens,
        )

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt whose KV was found in the cache."""
        return self.outputs[0].metrics.cached_tokens


def _earliest(times: Iterable[float | None]) -> float | None:
    return min((time for time in times if time is not None), default=None)


class Completion:
    """An answer as it grows: follows one job and turns its tokens into text."""

    def __init__(self, index: int, job: Job, tokenizer: Tokenizer | None) -> None:
        params = job.params
        self.job = job
        self._index = index
        self._text: IncrementalDetokenizer | None = None
        if tokenizer is not None:
            self._text = IncrementalDetokenizer(
                tokenizer, tuple(params.stop), params.include_stop_str_in_output, params.skip_special_tokens
            )
        self._token_ids: list[int] = []

    def append(self, tokens: list[int]) -> bool:
        """Take in new tokens of the job. True when they complete a stop string; the job then has to be ended."""
        for token in tokens:
            self._token_ids.append(token)
            if self._text is None or self._hidden(token):
                continue
            self._text.append([token], match_stop=len(self._token_ids) > self.job.params.min_tokens)
            if self._text.matched_stop is not None:
                return True
        return False

    def finish(self) -> None:
        """The job has ended: text held back so far (half a character, the start of a stop string) is let go."""
        if self._text is not None and self._text.matched_stop is None:
            self._text.flush()

    def output(self) -> CompletionOutput:
        reason = self.job.finish_reason
        matched = self._text.matched_stop if self._text is not None else None
        if matched is not None:
            reason = FinishReason.STOP  # even where the same token was also the last one allowed
        logprobs = self.job.logprobs[: len(self._token_ids)] if self.job.params.logprobs is not None else None
        return CompletionOutput(
            index=self._index,
            text=self._text.text if self._text is not None else "",
            token_ids=self._token_ids.copy(),
            finish_reason=reason.value if reason is not None else None,
            error=self.job.error,
            stop_reason=matched if matched is not None else self._stop_token(),
            logprobs=logprobs,
            metrics=replace(self.job.metrics),
        )

    def _hidden(self, token: int) -> bool:
        """Whether this is the stop token that ended the job, which belongs to token_ids but not to the text."""
        ended = self.job.finish_reason is FinishReason.STOP and token in self.job.stop_tokens
        return ended and not self.job.params.include_stop_str_in_output

    def _stop_token(self) -> int | None:
        if self.job.finish_reason is FinishReason.STOP and self._token_ids:
            last = self._token_ids[-1]
            return last if last in self.job.params.stop_token_ids else None
        return None


class LiveRequest:
    """A request the engine works on: one job for each of its `n` answers. `on_news` is called when they grow or end."""

    def __init__(self, request: Request, on_news: Callable[[LiveRequest], None]) -> None:
        self.request = request
        self.on_news = on_news
        self.completions: list[Completion] = []

    @property
    def finished(self) -> bool:
        return all(completion.job.finished for completion in self.completions)

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self.request.token_ids,
            outputs=[completion.output() for completion in self.completions],
        )
