"""One job of a workload, as a simulator takes it: when it comes and how long it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SimJob:
    """A job whose output length is known to whoever wrote the workload, and to nobody who schedules it."""

    arrival: float  # seconds since the workload began
    prompt_tokens: int
    output_tokens: int
    user: str | None = None
    priority: int = 0  # lower first
    max_tokens: int | None = None  # the limit its user declared; None: the context's
