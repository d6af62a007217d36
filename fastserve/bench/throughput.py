"""`fastserve bench throughput`: how many tokens and requests a second the engine finishes when all arrive at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ..types import InvalidRequest, SamplingParams
from .runs import Iteration
from .summary import summarize_jobs
from .tables import new_table, summary_table
from .workload import at_least, read_prompts, synthetic_prompts

if TYPE_CHECKING:
    from ..llm import LLM


_RECENT = 64  # iterations over which the progress bar measures tokens/s


def run(
    model: str,
    *,
    num_prompts: int = 64,
    input_len: int = 128,
    output_len: int = 128,
    prompts_file: Path | None = None,
    seed: int = 0,
    console: Console | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run `num_prompts` jobs that arrive together and return the result as a JSON-ready dict; print it to `console`,
    if given.

    Prompts are synthetic, of `input_len` tokens, or the lines of `prompts_file`, repeated as often as it takes. Every
    job runs greedily to exactly `output_len` tokens. `options` go to LLM. Raises InvalidRequest for an option out of
    its range and for a file that cannot be read.
    """
    from ..llm import LLM

    for option, value in (("num_prompts", num_prompts), ("input_len", input_len), ("output_len", output_len)):
        at_least(option, value, 1)
    texts = read_prompts(prompts_file) if prompts_file is not None else None
    if texts is None:
        options = {"max_model_len": input_len + output_len, **options}
    record: list[Iteration] = []
    progress = Progress(
        TextColumn("{task.fields[done]}/{task.fields[jobs]} jobs"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console is None,
    )

    def on_iteration(iteration: Iteration) -> None:
        record.append(iteration)
        recent = record[-_RECENT:]
        progress.update(
            task,
            advance=iteration.prefill_tokens + iteration.decode_tokens,
            done=max(0, num_prompts - len(iteration.job_ids) - iteration.waiting),
            rate=sum(each.decode_tokens for each in recent) / (recent[-1].completed - recent[0].submitted),
        )

    with LLM(model, on_iteration=on_iteration, seed=seed, **options) as llm:
        prompts = _prompts(llm, texts, num_prompts, input_len, seed)
        # The last token of a job is emitted but never computed, hence the minus one.
        work = sum(len(prompt) + output_len - 1 for prompt in prompts)
        task = progress.add_task("", total=work, done=0, jobs=num_prompts, rate=0.0)
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        with progress:
            outputs = llm.generate(prompts, params)
            progress.update(task, completed=work, done=num_prompts)
        info = llm.info
    finished = [(output.outputs[0].metrics, len(output.outputs[0].token_ids)) for output in outputs]
    if any(tokens != output_len for _, tokens in finished):
        raise InvalidRequest("output_len", "prompt and output_len do not fit in max_model_len")
    seconds = record[-1].completed - record[0].submitted
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    output_tokens = num_prompts * output_len
    result = {
        "benchmark": "throughput",
        "model": model,
        "num_prompts": num_prompts,
        "prompts": str(prompts_file) if prompts_file is not None else "synthetic",
        "output_len": output_len,
        "seed": seed,
        "engine": info,
        "seconds": seconds,
        "iterations": len(record),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "requests_per_second": num_prompts / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "total_tokens_per_second": (prompt_tokens + output_tokens) / seconds,
        "summary": {measure: summary.as_dict() for measure, summary in summarize_jobs(finished).items()},
    }
    if console is not None:
        console.print(table(result))
    return result


def _prompts(llm: LLM, texts: list[str] | None, count: int, length: int, seed: int) -> list[list[int]]:
    if texts is None:
        return synthetic_prompts(count, length, llm.spec.vocab_size, seed)
    if llm.tokenizer is None:
        raise InvalidRequest("prompts_file", "this model has no tokenizer; leave it out for synthetic prompts")
    encoded = [llm.tokenizer.encode(text) for text in texts]
    return [encoded[i % len(encoded)] for i in range(count)]


def table(result: dict[str, Any]) -> Group:
    """The result as two tables: totals, and summaries over the jobs."""
    title = f"{result['model']}: {result['num_prompts']} jobs, {result['output_len']} tokens out each"
    totals = new_table()
    totals.add_column("")
    totals.add_column("total", justify="right")
    totals.add_column("a second", justify="right")
    totals.add_row("requests", str(result["num_prompts"]), f"{result['requests_per_second']:.2f}")
    totals.add_row("output tokens", str(result["output_tokens"]), f"[bold]{result['output_tokens_per_second']:.1f}[/]")
    everything = result["prompt_tokens"] + result["output_tokens"]
    totals.add_row("all tokens", str(everything), f"{result['total_tokens_per_second']:.1f}")
    totals.add_row("seconds", f"{result['seconds']:.2f}", "")
    return Group(Text(title, style="bold"), totals, summary_table(result["summary"]))
