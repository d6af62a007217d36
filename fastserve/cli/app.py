"""The commands put together, and the one place where errors become a line on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from ..types import InvalidRequest
from ..version import __version__
from . import bench, chat, convert, generate, info, profile, serve, simulate
from .options import OPTION_NAMES

# The base of typer's own complaints about a command line (click's class, which newer typers bring along).
_UsageError = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="fastserve",
    help="Serve large language models so that jobs finish soon: preemption at every token, skip-join MLFQ scheduling.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=True,
)
app.command("serve")(serve.serve)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("info")(info.info)
app.command("convert")(convert.convert)
app.command("profile")(profile.profile)
app.command("simulate")(simulate.simulate)
app.add_typer(bench.app, name="bench")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"fastserve {__version__}")


@app.callback(invoke_without_command=True)
def _options(
    show_version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if show_version:
        version()
        raise typer.Exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for bad input, 130 for Ctrl-C, 1 for any other failure.

    An error is one line on standard error; FASTSERVE_DEBUG=1 in the environment shows where it came from.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stdout is None:  # what Python makes of a descriptor that was closed before it started
        print("fastserve: standard output is closed; redirect it to a file or to /dev/null", file=sys.stderr)
        return 1
    try:
        result = app(args=words or ["--help"], prog_name="fastserve", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader of our output has had enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("FASTSERVE_DEBUG"):
            raise
        print(f"fastserve: {_one_line(error)}", file=sys.stderr)
        return 2 if _is_bad_input(error) else 1


# By name, so that commands that need none of these do not wait for their imports.
_OWN_ERRORS = ("EngineError", "EngineStartError", "GroupError", "ServerError")


def _is_bad_input(error: Exception) -> bool:
    from ..loaders.spec import ModelError

    return isinstance(error, (InvalidRequest, ModelError, _UsageError))


def _one_line(error: Exception) -> str:
    if isinstance(error, InvalidRequest):
        text = str(error).removeprefix(f"{error.field}: ")
        text = f"{OPTION_NAMES.get(error.field, error.field)}: {text}"
    elif isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "fastserve"
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        text = f"{message}. Try: {command} --help"
    elif isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    elif _is_bad_input(error) or type(error).__name__ in (
        "EngineError",
        "EngineStartError",
        "GroupError",
        "ServerError",
    ):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (FASTSERVE_DEBUG=1 shows where)"
    return " ".join(text.split())
