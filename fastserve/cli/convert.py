"""`fastserve convert`: a model written as a FasterTransformer checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .options import JsonOption
from .terminal import error_console


def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A directory in Hugging Face layout (safetensors or pytorch_model.bin), or a hub id; or a "
            "FasterTransformer checkpoint, to be cut for another number of ranks.",
            show_default=False,
        ),
    ],
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIRECTORY", help="Where to write the checkpoint; made if need be.", show_default=False),
    ],
    tensor_parallel_size: Annotated[
        int,
        typer.Option(help="Cut the weights for so many ranks: a divisor of heads and feed-forward units."),
    ] = 1,
    dtype: Annotated[
        str | None,
        typer.Option(help="Store weights as fp32, fp16 or bf16.", show_default="what most are stored in now"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint that is in DIRECTORY; other files there stay.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a GPT-2 or OPT model as a FasterTransformer checkpoint, with its tokenizer beside it.

    The result is config.ini and model.*.bin, laid out as FasterTransformer's own converters do it. FastServe serves
    such a directory like any other, however many ranks it is cut for. Other families need no conversion: their
    Hugging Face directories are served as they are.

    fastserve convert ./opt-125m ./opt-125m-ft --tensor-parallel-size 2 --dtype fp16

    fastserve generate --model ./opt-125m-ft --prompt "Once upon a time"
    """
    from ..convert import convert as write
    from ..loaders import open_model

    with _progress(model) as advance:
        done = write(
            open_model(model),
            directory,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            force=force,
            on_progress=advance,
        )
    if as_json:
        print(json.dumps(done.as_dict(), indent=2))
        return
    tokenizer = "with its tokenizer" if done.tokenizer_files else "without a tokenizer: prompts are token ids"
    ranks = f"{done.tensor_parallel_size} rank{'s' if done.tensor_parallel_size > 1 else ''}"
    size = f"{done.files} files, {done.bytes / 1e6:,.1f} MB"
    print(f"{done.directory}: {done.family} in {done.dtype} for {ranks}, {size}, {tokenizer}")


@contextmanager
def _progress(model: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on standard error, where that is a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = error_console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"converting {model}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
