"""`fastserve profile`: measure how long iterations take here, and remember it for the scheduler."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import HARDWARE, JsonOption, ModelArgument, takes
from .terminal import check_writable, error_console

if TYPE_CHECKING:
    from ..cost import CostModel

_PROMPTS = (32, 128, 512, 2048)
_CONTEXTS = (1, 128, 1024, 4096)


@takes(engine=HARDWARE)
def profile(
    *,
    model: ModelArgument,
    output: Annotated[
        Path | None,
        typer.Option(help="Write the profile here; name it with --cost.", show_default="where the engine looks itself"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Half a second instead of up to thirty.")] = False,
    as_json: JsonOption = False,
    engine: dict[str, Any],
) -> None:
    """Measure the cost model that the MLFQ schedules by.

    Run it once on a quiet machine, with the engine options that will serve; without it, the engine takes half a second
    at its first start to measure roughly.
    """
    from ..llm import LLM

    if output is not None:
        check_writable("output", output)
    with error_console().status(f"loading {model}") as status:
        samples = itertools.count(1)

        def on_sample(rows: list[tuple[int, int]], seconds: float) -> None:
            shape = f"{len(rows)} × {rows[0][1]} tokens"
            status.update(f"iteration {next(samples)}: {shape}, {1e3 * seconds:.1f} ms")

        # Under this policy the engine starts without a profile.
        with LLM(model, policy="fcfs", skip_tokenizer=True, **engine) as llm:
            path = output or llm.profile_path
            check_writable("output", path)
            cost = llm.profile(full=not quick, on_sample=on_sample)
            link = llm.info["link"]
    if as_json:
        print(cost.to_json(), end="")
    else:
        _print(cost, link)
    cost.save(path)  # last: what was measured has been shown, whatever becomes of the file
    if not as_json:
        print(f"saved as {path}")


def _print(cost: CostModel, link: dict[str, float] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("prompt tokens", "prefill", "context", "decode")
    for tokens, context in zip(_PROMPTS, _CONTEXTS, strict=True):
        prefill, decode = cost.prefill_seconds(0, tokens), cost.decode_seconds(context)
        table.add_row(f"{tokens}", f"{1e3 * prefill:.1f} ms", f"{context}", f"{1e3 * decode:.1f} ms")
    Console().print(f"one job alone on {cost.device}", table, highlight=False, soft_wrap=True)
    if link is not None:
        out, back = (link[f"{way}_bytes_per_second"] / 1e9 for way in ("offload", "upload"))
        print(f"KV moves to the host at {out:.2f} GB/s, back at {back:.2f} GB/s (measured at every start)")
