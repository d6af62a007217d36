"""What commands show on the way: a line while a model loads, and answers as they grow."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .options import engine_options

if TYPE_CHECKING:
    from rich.console import Console

    from ..llm import LLM
    from ..outputs import RequestOutput


def error_console() -> Console:
    """A console on standard error; its decorations vanish where that is not a terminal."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def load(model: str, engine: dict[str, Any]) -> LLM:
    """Load a model, with a spinner on a terminal."""
    options = engine_options(engine)
    with error_console().status(f"loading {model}"):
        from ..llm import LLM

        return LLM(model, **options)


def print_growing(outputs: Iterator[RequestOutput]) -> RequestOutput:
    """Print the first answer of a stream as it grows; returns the finished output."""
    printed = 0
    for output in outputs:
        text = output.outputs[0].text
        sys.stdout.write(text[printed:])
        sys.stdout.flush()
        printed = len(text)
    sys.stdout.write("\n")
    return output


def speed(output: RequestOutput) -> str:
    """`24 tokens · 27.0 tokens/s · first after 0.05 s`"""
    tokens = sum(len(answer.token_ids) for answer in output.outputs)
    metrics = output.metrics
    if not metrics.jct or metrics.ttft is None:
        return f"{tokens} tokens"
    return f"{tokens} tokens · {tokens / metrics.jct:.1f} tokens/s · first after {metrics.ttft:.2f} s"
