"""One open job: tokens in, text out, and an end that says why."""

from __future__ import annotations

from letters import LETTERS, letters

from fastserve.ipc import Update
from fastserve.origin import NOBODY
from fastserve.server.jobs import OpenJob
from fastserve.types import FinishReason, JobMetrics, SamplingParams


def job_with(params: SamplingParams) -> OpenJob:
    return OpenJob(1, [7], params, 0, 0, 10.0, NOBODY, letters())


def feed(job: OpenJob, text: str, reason: str | None = None) -> list[bool]:
    """One token for each letter; the last comes with `reason`."""
    tokens = [LETTERS.index(letter) for letter in text]
    reasons = [None] * (len(tokens) - 1) + [reason]
    return [job.take(update(token, reason)) for token, reason in zip(tokens, reasons, strict=True)]


def update(token: int | None, reason: str | None = None) -> Update:
    return Update(1, token, None, reason, None, JobMetrics(10.0) if reason else None)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    job = job_with(SamplingParams(stop=["xyz"]))
    feed(job, "abxy")
    assert job.text == "ab"
    feed(job, "xx")
    assert job.text == "abxyx"
    feed(job, "y", "length")
    assert (job.text, job.finish_reason, job.stop_reason) == ("abxyxxy", "length", None)


def test_a_stop_string_is_told_once_and_later_tokens_are_left_out() -> None:
    job = job_with(SamplingParams(stop=["xyz"]))
    assert feed(job, "abxyzcd") == [False] * 4 + [True, False, False]
    assert (job.text, len(job.output), job.finish_reason) == ("ab", 5, None)
    job.take(update(None, "stop"))
    assert (job.finish_reason, job.stop_reason) == ("stop", "xyz") and job.metrics is not None


def test_a_stop_string_in_the_last_token_allowed_needs_no_abort() -> None:
    job = job_with(SamplingParams(stop=["b"]))
    assert feed(job, "ab", "length") == [False, False]
    assert (job.text, job.finish_reason, job.stop_reason) == ("a", "stop", "b")


def test_no_stop_string_before_min_tokens() -> None:
    job = job_with(SamplingParams(stop=["b"], min_tokens=3))
    assert feed(job, "abab") == [False, False, False, True]
    assert job.text == "aba"


def test_the_stop_string_is_shown_if_asked_for() -> None:
    job = job_with(SamplingParams(stop=["bc"], include_stop_str_in_output=True))
    feed(job, "abcd")
    assert job.text == "abc"


def test_a_stop_token_is_in_the_output_and_not_in_the_text() -> None:
    token = LETTERS.index("Q")
    job = job_with(SamplingParams(stop_token_ids=[token]))
    feed(job, "abQ", "stop")
    assert (job.output[-1], job.text, job.stop_reason) == (token, "ab", token)
    shown = job_with(SamplingParams(stop_token_ids=[token], include_stop_str_in_output=True))
    feed(shown, "abQ", "stop")
    assert shown.text == "abQ"


def test_half_a_character_is_held_back_until_the_end() -> None:
    job = job_with(SamplingParams())
    job.take(update(4))
    assert job.text == ""
    job.take(update(5))
    assert job.text == "é"
    job.take(update(4, "length"))
    assert job.text == "é\ufffd"


def test_an_error_is_told() -> None:
    job = job_with(SamplingParams())
    job.take(Update(1, None, None, "error", "every token is masked", JobMetrics(10.0)))
    assert (job.finish_reason, job.error, job.output) == ("error", "every token is masked", [])


def test_the_first_token_is_the_first_of_all_engines() -> None:
    job = job_with(SamplingParams())
    job.submissions = 1
    feed(job, "a")
    job.submissions = 2
    job.take(Update(1, 7, None, "length", None, JobMetrics(10.0, first_token=1e12)))
    assert job.metrics is not None and job.metrics.first_token == job.first_token


def test_an_end_without_the_engine_lets_go_of_what_was_held_back() -> None:
    job = job_with(SamplingParams(stop=["xyz"]))
    feed(job, "axy")
    job.end(FinishReason.ABORT)
    job.end(FinishReason.ERROR, "too late")
    assert (job.text, job.finish_reason, job.error, job.metrics) == ("axy", "abort", None, None)


def test_without_a_tokenizer_there_is_no_text() -> None:
    job = OpenJob(1, [7], SamplingParams(), 0, 0, 10.0, NOBODY, None)
    feed(job, "ab", "length")
    assert (job.text, len(job.output), job.finish_reason) == ("", 2, "length")
