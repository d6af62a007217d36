"""`fastserve bench`: how fast the engine is on this machine, and how any server bears a load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench_serve import serve
from .options import ENGINE, SEED, JsonOption, ModelOption, engine_options, takes

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="Measure how fast the engine is on this machine, and how a server bears a load.", rich_markup_mode="markdown"
)

InputLength = Annotated[int, typer.Option(help="Prompt tokens a job.")]
OutputLength = Annotated[int, typer.Option(help="Output tokens a job.")]

app.command("serve")(serve)


@app.command()
@takes(engine={**ENGINE, **SEED})
def latency(
    *,
    model: ModelOption = "smollm2",
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Jobs at once. Repeatable.", show_default="1, 8 and 32")
    ] = None,
    input_len: InputLength = 128,
    output_len: OutputLength = 128,
    warmup: Annotated[int, typer.Option(help="Runs before those that count.")] = 1,
    iterations: Annotated[int, typer.Option(help="Runs that count.")] = 3,
    as_json: JsonOption = False,
    engine: dict[str, Any],
) -> None:
    """Time one batch: prefill, and every decode iteration.

    fastserve bench latency --batch-size 1 --batch-size 8 --batch-size 32
    """
    from ..bench import latency as benchmark

    result = benchmark.run(
        model,
        batch_sizes=batch_size or benchmark.BATCH_SIZES,
        input_len=input_len,
        output_len=output_len,
        warmup=warmup,
        iterations=iterations,
        console=_console(as_json),
        **engine_options(engine),
    )
    if as_json:
        print(json.dumps(result, indent=2))


@app.command()
@takes(engine={**ENGINE, **SEED})
def throughput(
    *,
    model: ModelOption = "smollm2",
    num_prompts: Annotated[int, typer.Option(help="Jobs that arrive together.")] = 64,
    input_len: InputLength = 128,
    output_len: OutputLength = 128,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Prompts, one a line, instead of random ones.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
    engine: dict[str, Any],
) -> None:
    """Time many jobs that arrive together.

    fastserve bench throughput --num-prompts 128 --output-len 64 --json
    """
    from ..bench import throughput as benchmark

    result = benchmark.run(
        model,
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        prompts_file=prompts_file,
        console=_console(as_json),
        **engine_options(engine),
    )
    if as_json:
        print(json.dumps(result, indent=2))


def _console(as_json: bool) -> Console | None:
    from rich.console import Console

    return None if as_json else Console()
