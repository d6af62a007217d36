"""What became of one job. Times are seconds since the run began."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

UNFINISHED = "unfinished"  # the error of a job that was cut off: nobody's fault, and no answer either
SHORT = 64  # tokens: answers up to it are short ones

_DIGITS = 6  # of seconds in JSON


@dataclass(slots=True)
class JobRecord:
    """One job. Latencies count from its arrival, so that a client that falls behind makes no server look fast."""

    index: int
    arrival: float  # when it was to be sent
    prompt_tokens: int  # as planned; then as the server counts
    asked_tokens: int  # of output
    due: float = 0.0  # when it could be sent: its arrival, or when the concurrency limit let it
    started: float | None = None  # when connecting began
    sent: float | None = None  # when the request was written
    times: array[float] = field(default_factory=lambda: array("d"))  # when each piece of the answer came
    end: float | None = None  # of the answer, or when the job failed
    status: int | None = None  # HTTP's
    usage_tokens: int | None = None  # of output, as the server counts; None: it does not
    finish_reason: str | None = None
    call: int = 0  # which of its program's, counted from 0
    program: str | None = None
    user: str | None = None
    cached_tokens: int | None = None  # of the prompt, as the server counts; None: it does not
    said: list[str] | None = None  # the answer's text, in programs of several calls
    error: str | None = None  # its kind, in a few words; None: the answer is whole
    detail: str = ""  # of the error, a line

    @property
    def ok(self) -> bool:
        return self.end is not None and self.error is None

    @property
    def tokens(self) -> int:
        """Of output so far: as the server counts, else one a piece."""
        return len(self.times) if self.usage_tokens is None else self.usage_tokens

    @property
    def text(self) -> str:
        """Of the answer, where it was kept."""
        return "".join(self.said or ())

    @property
    def lateness(self) -> float | None:
        """How far this client was behind its own schedule."""
        return None if self.started is None else self.started - self.due

    @property
    def jct(self) -> float:
        return self.times[-1] - self.arrival

    @property
    def ttft(self) -> float:
        return self.times[0] - self.arrival

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None with one token."""
        return (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def normalized_latency(self) -> float:
        return self.jct / self.tokens

    @property
    def gaps(self) -> list[float]:
        """Between neighbouring pieces of the answer."""
        return [after - before for before, after in pairwise(self.times)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, in seconds."""
        values: dict[str, Any] = {"index": self.index, "arrival": round(self.arrival, _DIGITS)}
        for name, moment in (
            ("sent", self.sent),
            ("first_token", self.times[0] if self.times else None),
            ("finish", self.times[-1] if self.times and self.ok else None),
        ):
            values[name] = None if moment is None else round(moment, _DIGITS)
        return values | {
            "late": None if self.lateness is None else round(self.lateness, _DIGITS),
            "prompt_tokens": self.prompt_tokens,
            "asked_tokens": self.asked_tokens,
            "output_tokens": self.tokens,
            "tokens_counted_by": "chunks" if self.usage_tokens is None else "usage",
            "program": self.program,
            "call": self.call,
            "user": self.user,
            "cached_tokens": self.cached_tokens,
            "finish_reason": self.finish_reason,
            "gaps": [round(gap, _DIGITS) for gap in self.gaps],
            "status": self.status,
            "error": self.error,
            "detail": self.detail or None,
        }
