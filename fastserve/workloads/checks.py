"""Numbers of a workload, checked; an error names the option and what the number is."""

from __future__ import annotations

from ..types import InvalidRequest

MAX_TOKENS = 2**17  # longest prompt or output of a synthetic workload


def check_real(option: str, what: str, value: float, low: float, high: float) -> None:
    """Raise InvalidRequest unless low ≤ value ≤ high."""
    if not low <= value <= high:
        raise InvalidRequest(option, f"{what} must be a number between {low:g} and {high:g}, got {value!r}")


def check_count(option: str, what: str, value: int, low: int = 1, high: int = MAX_TOKENS) -> None:
    """Raise InvalidRequest unless low ≤ value ≤ high."""
    if not low <= value <= high:
        raise InvalidRequest(option, f"{what} must be an integer between {low} and {high}, got {value!r}")
