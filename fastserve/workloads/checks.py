"""Numbers of a workload, checked; an error names the option and what the number is."""

from __future__ import annotations

from ..types import InvalidRequest

MAX_TOKENS = 2**17  # longest prompt or output of a synthetic workload

# What no job of a trace may exceed: the longest context and the largest max_tokens of any engine, and a time that a
# clock of 64-bit floats can still divide into iterations.
LONGEST_JOB = 2**30  # tokens of prompt and output together
LARGEST_LIMIT = 2**31 - 1  # max_tokens, and priority either way
LAST_ARRIVAL = 10**9  # seconds after the first


def check_real(option: str, what: str, value: float, low: float, high: float) -> None:
    """Raise InvalidRequest unless low ≤ value ≤ high."""
    if not low <= value <= high:
        raise InvalidRequest(option, f"{what} must be a number between {low:g} and {high:g}, got {value!r}")


def check_count(option: str, what: str, value: int, low: int = 1, high: int = MAX_TOKENS) -> None:
    """Raise InvalidRequest unless low ≤ value ≤ high."""
    if not low <= value <= high:
        raise InvalidRequest(option, f"{what} must be an integer between {low} and {high}, got {value!r}")
