"""What a request took: OpenAI's counts of tokens, and where its time went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .engine_api import OpenJob


def usage(prompt_tokens: int, jobs: Sequence[OpenJob]) -> dict[str, Any]:
    """`prompt_tokens` count once for all answers to a prompt."""
    completion_tokens = sum(len(job.output) for job in jobs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def cached(jobs: Sequence[OpenJob], n: int) -> dict[str, Any] | None:
    """OpenAI's `prompt_tokens_details` of jobs that have ended, `n` for each prompt; None where one is not known.

    Of the answers to one prompt the first tells what was there before the request; the others find what it computed.
    """
    found = [job.cached_tokens for job in jobs[::n]]
    return None if None in found else {"cached_tokens": sum(filter(None, found))}


def final_usage(prompt_tokens: int, jobs: Sequence[OpenJob], n: int) -> dict[str, Any]:
    """Of all answers, once they have ended: with what their prompts found in the cache, and where the time went."""
    return {
        **usage(prompt_tokens, jobs),
        "prompt_tokens_details": cached(jobs, n),
        "fastserve": accounting(jobs),
    }


def accounting(jobs: Sequence[OpenJob]) -> dict[str, Any]:
    """Seconds of the job that ended last; null where the engine has not told them.

    `swap` is the part of `queue` in which its KV was on its way back.
    """
    ended = [job.metrics for job in jobs if job.metrics is not None]
    if len(ended) < len(jobs):
        return dict.fromkeys(("queue", "prefill", "decode", "swap", "preemptions"))
    last = max(ended, key=lambda metrics: metrics.finish or 0.0)
    return {
        "queue": round(last.queue_seconds or 0.0, 6),
        "prefill": round(last.prefill_seconds, 6),
        "decode": round(last.decode_seconds, 6),
        "swap": round(last.swap_seconds, 6),
        "preemptions": sum(metrics.preemptions for metrics in ended),
    }
