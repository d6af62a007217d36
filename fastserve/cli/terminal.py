"""What commands show on the way: a line while a model loads, and answers as they grow."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..types import InvalidRequest
from .options import engine_options

if TYPE_CHECKING:
    from rich.console import Console

    from ..llm import LLM
    from ..outputs import RequestOutput
    from ..serving import EngineError

_PICTURES = (".png", ".svg", ".pdf")


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


def is_terminal(stream: TextIO | None) -> bool:
    """False, too, for a standard stream that was closed before Python started: that is None."""
    return stream is not None and stream.isatty()


def standard_input(otherwise: str) -> TextIO:
    """Raises InvalidRequest, with what to do `otherwise`, where standard input is closed."""
    if sys.stdin is None:
        raise InvalidRequest("prompt", f"cannot be read, as standard input is closed; {otherwise}")
    return sys.stdin


def check_writable(option: str, path: Path) -> None:
    """Before time is spent on what could not be kept. Makes the file's folder, as saving would.

    Raises InvalidRequest, naming the option, for a folder and for a file that cannot be written.
    """
    if path.is_dir():
        raise InvalidRequest(option, f"must be a file, and {path} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except FileExistsError:
        raise InvalidRequest(option, f"cannot write {path}: {path.parent} is no folder") from None
    except OSError as error:
        raise InvalidRequest(option, f"cannot write {path}: {error.strerror}") from error


def failure(outputs: Sequence[RequestOutput]) -> EngineError | None:
    """An error that tells of the answers which ended in one; None where none did."""
    from ..serving import EngineError

    failed = [(i, answer.error) for i, output in enumerate(outputs) for answer in output.outputs if answer.error]
    if not failed:
        return None
    (prompt, error), count = failed[0], sum(len(output.outputs) for output in outputs)
    return EngineError(
        error if count == 1 else f"{len(failed)} of {count} answers failed, of prompt {prompt + 1}: {error}"
    )


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


def check_picture(path: Path) -> None:
    """Before time is spent on what could not be drawn. Raises InvalidRequest, naming --plot."""
    if path.suffix.lower() not in _PICTURES:
        raise InvalidRequest("plot", f"must end in {', '.join(_PICTURES)}; got {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequest("plot", "needs matplotlib: pip install 'fastserve[plots]'")
    check_writable("plot", path)
