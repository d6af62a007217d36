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
    # What its prompt holds: an identity for each `content_block` tokens, the last of which may be fewer. Prompts that
    # begin with the same identities begin with the same tokens. None: it has nothing in common with any other.
    content: tuple[int, ...] | None = None
    content_block: int = 512
    program: str | None = None  # the program that it is a call of
    then: SimJob | None = None  # the program's next call, which comes `think_time` after this one has ended
    think_time: float = 0.0  # seconds
