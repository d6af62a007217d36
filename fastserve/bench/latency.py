"""`fastserve bench latency`: how long one batch takes, prefill and decode apart, for several batch sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..types import InvalidRequest, SamplingParams
from .runs import Iteration, wall_spans
from .summary import summarize
from .tables import new_table
from .workload import at_least, synthetic_prompts

if TYPE_CHECKING:
    from ..llm import LLM

BATCH_SIZES = (1, 8, 32)


@dataclass(slots=True)
class _Sample:
    """What the repetitions of one batch size took, in seconds."""

    prefills: list[float] = field(default_factory=list)  # a repetition's start to the end of its last prefill chunk
    decodes: list[float] = field(default_factory=list)  # every iteration that only decoded
    totals: list[float] = field(default_factory=list)
    decoded: int = 0  # tokens of those iterations

    def add(self, iterations: Sequence[Iteration]) -> None:
        """Account for one repetition. Time in which the engine prepared the next iteration counts, too: what a user
        waits for is the wall clock, from the end of one iteration to the end of the next."""
        start = iterations[0].submitted
        ends = [end for _, end in wall_spans(iterations)]
        last_prefill = max(i for i, iteration in enumerate(iterations) if iteration.prefill_tokens)
        self.prefills.append(ends[last_prefill] - start)
        self.totals.append(ends[-1] - start)
        self.decodes += [later - earlier for earlier, later in pairwise(ends[last_prefill:])]
        self.decoded += sum(iteration.decode_tokens for iteration in iterations[last_prefill + 1 :])


def run(
    model: str,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    input_len: int = 128,
    output_len: int = 128,
    warmup: int = 1,
    iterations: int = 3,
    seed: int = 0,
    console: Console | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Time batches of synthetic prompts and return the result as a JSON-ready dict; print it to `console`, if given.

    Each batch size runs `warmup` times unmeasured and `iterations` times measured, greedily, to exactly `output_len`
    tokens a job. `options` go to LLM. Raises InvalidRequest for an option out of its range.
    """
    from ..llm import LLM

    for option, value, low in (
        ("input_len", input_len, 1),
        ("output_len", output_len, 2),
        ("warmup", warmup, 0),
        ("iterations", iterations, 1),
        *(("batch_size", size, 1) for size in batch_sizes),
    ):
        at_least(option, value, low)
    if not batch_sizes:
        raise InvalidRequest("batch_size", "needs at least one value")
    rows = max(batch_sizes)
    fitting = {"max_num_seqs": rows, "max_num_batched_tokens": max(512, rows), "max_model_len": input_len + output_len}
    # Every repetition has the same prompts, and is to compute them.
    options = {**fitting, "enable_prefix_caching": False, **options}
    if rows > options["max_num_seqs"]:
        raise InvalidRequest("batch_size", f"must be at most max_num_seqs ({options['max_num_seqs']})")
    record: list[Iteration] = []
    llm = LLM(model, on_iteration=record.append, seed=seed, **options)
    with llm, _progress(console) as progress:
        results = []
        for batch_size in batch_sizes:
            task = progress.add_task(f"batch {batch_size}", total=warmup + iterations)
            repetitions = progress.track(range(warmup + iterations), task_id=task)
            prompts = synthetic_prompts(batch_size, input_len, llm.spec.vocab_size, seed)
            results.append(_measure(llm, record, prompts, output_len, warmup, repetitions))
    result = {
        "benchmark": "latency",
        "model": model,
        "input_len": input_len,
        "output_len": output_len,
        "warmup": warmup,
        "iterations": iterations,
        "seed": seed,
        "engine": llm.info,
        "results": results,
    }
    if console is not None:
        console.print(table(result))
    return result


def _measure(
    llm: LLM,
    record: list[Iteration],
    prompts: list[list[int]],
    output_len: int,
    warmup: int,
    repetitions: Iterable[int],
) -> dict[str, Any]:
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    sample = _Sample()
    for repetition in repetitions:
        record.clear()
        outputs = llm.generate(prompts, params)
        if any(len(output.outputs[0].token_ids) != output_len for output in outputs):
            raise InvalidRequest("output_len", "input_len + output_len does not fit in max_model_len")
        if repetition >= warmup:
            sample.add(record)
    prefill, decode, total = (summarize(values) for values in (sample.prefills, sample.decodes, sample.totals))
    return {
        "batch_size": len(prompts),
        "prefill_seconds": prefill.as_dict(),
        "prefill_tokens_per_second": len(prompts) * len(prompts[0]) / prefill.mean,
        "decode_iteration_seconds": decode.as_dict(),
        "decode_tokens_per_second": sample.decoded / sum(sample.decodes),
        "total_seconds": total.as_dict(),
        "output_tokens_per_second": len(prompts) * output_len / total.mean,
    }


def table(result: dict[str, Any]) -> Group:
    """The result as a table, one line a batch size."""
    title = f"{result['model']}: {result['input_len']} tokens in, {result['output_len']} out"
    view = new_table()
    view.add_column("batch", justify="right")
    for heading in ("prefill s", "prefill tok/s", "decode tok/s", "step ms P50", "P95", "P99", "total s"):
        view.add_column(heading, justify="right")
    for row in result["results"]:
        iteration = row["decode_iteration_seconds"]
        view.add_row(
            str(row["batch_size"]),
            f"{row['prefill_seconds']['mean']:.3f}",
            f"{row['prefill_tokens_per_second']:.0f}",
            f"[bold]{row['decode_tokens_per_second']:.1f}[/]",
            *(f"{1e3 * iteration[p]:.1f}" for p in ("p50", "p95", "p99")),
            f"{row['total_seconds']['mean']:.2f}",
        )
    return Group(Text(title, style="bold"), view)


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=console is None,
    )
