"""`fastserve simulate`: compare scheduling policies in virtual time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..types import InvalidRequest
from .options import JsonOption, engine_options
from .terminal import check_picture, error_console, is_terminal

if TYPE_CHECKING:
    from ..bench.experiment import Experiment
    from ..bench.simulation import Setting
    from ..bench.sweep import SweepResult

_TIMELINE_JOBS = 64
_MAX_SEEDS = 1000


def _in(panel: str, help: str, *names: str, default: Any = False, **more: Any) -> Any:
    return typer.Option(*names, help=help, show_default=default, rich_help_panel=panel, **more)


_WORK, _MACHINE, _LIMITS, _OUTPUT = "Workload", "Deployment", "Scheduler", "Output"


def simulate(
    *,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Who runs next, from the list above. Repeatable; ratios are against the first.", show_default="all"
        ),
    ] = None,
    workload: Annotated[str | None, _in(_WORK, "How long jobs are, from the list above.", default="sharegpt")] = None,
    trace: Annotated[
        Path | None,
        _in(
            _WORK,
            "Jobs from a file instead: Azure LLM or BurstGPT CSV, Mooncake or FastServe JSONL, told by content. "
            "Jobs without output are left out.",
        ),
    ] = None,
    arrivals: Annotated[
        str | None,
        _in(
            _WORK,
            "When jobs come, from the list above. With --trace: draw jobs from it at random instead of replaying it.",
            default="poisson, or the trace's",
        ),
    ] = None,
    jobs: Annotated[int | None, _in(_WORK, "Jobs in a run.", default="1000, or the whole trace")] = None,
    rate: Annotated[
        list[float] | None, _in(_WORK, "Jobs a second. Repeatable.", default="--load 0.9, or the trace's own")
    ] = None,
    load: Annotated[
        list[float] | None,
        _in(_WORK, "The rate as a share of what fcfs can do, measured first with the same jobs. Repeatable."),
    ] = None,
    seed: Annotated[
        list[int] | None, _in(_WORK, "Of the jobs drawn; the same for every policy and rate. Repeatable.", default="0")
    ] = None,
    seeds: Annotated[int | None, _in(_WORK, "Short for the seeds 0, 1, … of this many runs.")] = None,
    program_ids: Annotated[
        bool,
        _in(
            _WORK,
            "Tell the engine which calls are of one program; without, each is a job like any other.",
            "--program-ids/--no-program-ids",
            default=True,
        ),
    ] = True,
    warmup_jobs: Annotated[int, _in(_WORK, "Leave the first jobs to arrive out of the statistics.", default=True)] = 0,
    model: Annotated[
        str | None, _in(_MACHINE, "Model preset, from the list above.", default="opt-13b, without --cost")
    ] = None,
    hardware: Annotated[
        str | None, _in(_MACHINE, "Hardware preset, from the list above.", "--hardware", "--gpu", default="a100-40g")
    ] = None,
    tensor_parallel_size: Annotated[int, _in(_MACHINE, "Devices that share every layer.", default=True)] = 1,
    pipeline_parallel_size: Annotated[int, _in(_MACHINE, "Stages that share the layers.", default=True)] = 1,
    no_pipelining: Annotated[
        bool, _in(_MACHINE, "One batch at a time goes through all stages, not one a stage.", "--no-pipelining")
    ] = False,
    cost: Annotated[
        str | None,
        _in(
            _MACHINE,
            "How long iterations take, instead of the preset's model: a profile that `fastserve profile` wrote, or "
            "constant:SECONDS.",
        ),
    ] = None,
    kv_blocks: Annotated[
        int | None,
        _in(_MACHINE, "KV blocks on the device.", default="what the weights leave; without --model, room for all"),
    ] = None,
    swap_space: Annotated[
        str | None,
        _in(_MACHINE, "Host memory for each device to swap KV blocks to; 0: none.", default="64G a GPU, with --model"),
    ] = None,
    swap_blocks: Annotated[int | None, _in(_MACHINE, "The same, in blocks.")] = None,
    swap_seconds: Annotated[
        float | None, _in(_MACHINE, "Seconds to move one KV block, either way.", default="the preset's link")
    ] = None,
    max_num_seqs: Annotated[int, _in(_LIMITS, "Jobs in one iteration.", default=True)] = 16,
    max_num_batched_tokens: Annotated[
        int | None, _in(_LIMITS, "Tokens in one iteration; longer prompts are prefilled in chunks.", default="2048")
    ] = None,
    max_model_len: Annotated[
        int | None, _in(_LIMITS, "Longest prompt + output, in tokens.", default="2048, or the workload's longest")
    ] = None,
    block_size: Annotated[int, _in(_LIMITS, "Tokens in one KV block.", default=True)] = 16,
    admission: Annotated[
        str,
        _in(
            _LIMITS,
            "When a job starts: paged, when its prompt fits; reserve, when its longest output does (Orca).",
            default=True,
        ),
    ] = "paged",
    swap_mode: Annotated[
        str, _in(_LIMITS, "When memory runs out: swap proactive, reactive, or recompute.", default=True)
    ] = "proactive",
    repayment: Annotated[
        float,
        _in(_LIMITS, "A job keeps its KV until served this many times what bringing it back costs.", default=True),
    ] = 16.0,
    starvation_limit: Annotated[
        str | None,
        _in(
            _LIMITS,
            "Seconds after which a waiting job goes first, among its user's where several have jobs; none: never.",
            default="60",
        ),
    ] = None,
    slowdown_limit: Annotated[
        str | None, _in(_LIMITS, "So does one that has waited this many times its own service.", default="none")
    ] = None,
    stall_limit: Annotated[
        str | None,
        _in(_LIMITS, "Prefills make an iteration at most this many times as long as its decodes.", default="none"),
    ] = None,
    enable_prefix_caching: Annotated[
        bool,
        _in(
            _LIMITS,
            "Jobs share the KV of what they have in common.",
            "--enable-prefix-caching/--no-enable-prefix-caching",
            default=True,
        ),
    ] = True,
    tenant_weight: Annotated[
        list[str] | None,
        _in(
            _LIMITS,
            "The weight of a user's share of the device; 1 for those not named. Repeatable.",
            metavar="NAME=WEIGHT",
        ),
    ] = None,
    num_levels: Annotated[int, _in(_LIMITS, "Levels of the MLFQ.", default=True)] = 16,
    write_trace: Annotated[
        Path | None,
        _in(_OUTPUT, "Write the jobs to this file as Mooncake JSONL, for --trace, and simulate nothing."),
    ] = None,
    as_json: JsonOption = False,
    plot: Annotated[
        Path | None, _in(_OUTPUT, "Draw latencies over rates or loads into this file: .png, .svg or .pdf.")
    ] = None,
    timeline: Annotated[
        bool, _in(_OUTPUT, f"Show which job ran when; at most {_TIMELINE_JOBS} jobs.", "--timeline")
    ] = False,
    progress: Annotated[
        bool | None,
        _in(_OUTPUT, "Progress on standard error.", "--progress/--no-progress", default="on a terminal"),
    ] = None,
    workers: Annotated[
        int | None, _in(_OUTPUT, "Processes. Results do not depend on them.", default="one a core")
    ] = None,
) -> None:
    """Compare scheduling policies in virtual time: the real engine and scheduler, on a modelled device.

    **Policies**

    - fcfs: first come, first served; run to completion
    - mlfq: multi-level feedback queue; every job enters the highest level
    - skip-join-mlfq: the paper's; a job enters the level that its prompt's prefill fits
    - gittins: by attained service, and output lengths learned on the way
    - srpt: shortest remaining first; an oracle, which is told every length

    **Workloads** (prompt and output lengths)

    - sharegpt: conversations, mean 161 + 338 tokens
    - alpaca: instructions, mean 19 + 58
    - zipf:THETA[,LONGEST]: heavy tails, each up to 1024 tokens
    - lognormal:PROMPT_MEAN,PROMPT_SIGMA,OUTPUT_MEAN,OUTPUT_SIGMA[,LONGEST]
    - constant:PROMPT,OUTPUT
    - bimodal:SHORT,LONG,SHARE,PROMPT: outputs of LONG tokens with probability SHARE
    - chat:TURNS,USERS[,THINK[,MESSAGE[,ANSWER[,SYSTEM]]]]: conversations with THINK seconds (10) between turns;
      mean tokens of messages (64), answers (192), shared system prompts (256)
    - agents[:MOST[,THINK[,RESULT[,OUTPUT[,TOOLS[,TASK]]]]]]: chains of 2 to MOST calls (20), THINK seconds (2) apart;
      mean tokens of results (160), outputs (64), shared descriptions of tools (1024), tasks (128)

    **Arrivals**: poisson · gamma:CV (coefficient of variation of the gaps) · burst:SIZE

    **Models**: gpt3-2.7b, gpt3-6.7b, gpt3-13b, gpt3-175b, opt-13b, opt-30b, opt-66b, opt-175b, llama-3-8b,
    llama-3-70b, smollm2-135m

    **Hardware**: a100-40g, a100-80g, h100, cpu

    **Examples**

    The default policies at three loads, five seeds each, as a table and as a picture:

    fastserve simulate --load 0.5 --load 0.7 --load 0.9 --seeds 5 --plot sweep.png

    The paper's kind of workload:

    fastserve simulate --model gpt3-175b --gpu a100-40g --tensor-parallel-size 8 --pipeline-parallel-size 2
    --workload zipf:2 --arrivals gamma:1 --max-num-seqs 8 --policy fcfs --policy skip-join-mlfq

    A trace, twice as fast as it was recorded at 5.5 jobs a second, on a measured machine:

    fastserve simulate --trace conversations.csv --rate 11 --cost profile.json

    Agents, and whether it matters that the engine knows which calls are of one program:

    fastserve simulate --workload agents --model llama-3-8b --gpu a100-80g --policy skip-join-mlfq --no-program-ids

    Who runs when, where every iteration takes a second:

    fastserve simulate --cost constant:1 --workload constant:8,6 --jobs 8 --rate 0.5 --max-num-seqs 2 --timeline
    """
    from ..bench.experiment import Experiment, limit_from

    if plot is not None:
        check_picture(plot)
    scheduler = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
        "block_size": block_size,
        "admission": admission,
        "swap_mode": swap_mode,
        "repayment": repayment,
        "enable_prefix_caching": enable_prefix_caching,
        "num_levels": num_levels,
    }
    experiment = Experiment(
        policies=policy or (),
        workload=workload,
        trace=trace,
        arrivals=arrivals,
        jobs=jobs,
        rates=rate or (),
        loads=load or (),
        seeds=_seeds(seed, seeds),
        warmup_jobs=warmup_jobs,
        program_ids=program_ids,
        model=model,
        hardware=hardware,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        pipelining=not no_pipelining,
        cost=cost,
        kv_blocks=kv_blocks,
        swap_space=swap_space,
        swap_blocks=swap_blocks,
        swap_seconds=swap_seconds,
        scheduler={name: value for name, value in scheduler.items() if value is not None}
        | engine_options({"tenant_weights": tenant_weight} if tenant_weight else {})
        | limit_from("starvation_limit", starvation_limit)
        | limit_from("slowdown_limit", slowdown_limit)
        | limit_from("stall_limit", stall_limit),
    )
    setting = experiment.setting()
    if write_trace is not None:
        print(f"{experiment.write_trace(setting, write_trace)} jobs written as {write_trace}")
        return
    if timeline and setting.jobs > _TIMELINE_JOBS:
        raise InvalidRequest("timeline", f"shows at most {_TIMELINE_JOBS} jobs; use --jobs {_TIMELINE_JOBS} or fewer")
    result = _run(experiment, setting, workers, timeline, progress)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        _print(experiment, setting, result, timeline)
    if plot is not None:
        from ..bench.simulation_plots import plot_sweep

        plot_sweep(result.runs, plot, experiment.title(setting))
        if not as_json:
            print(f"drawn as {plot}")


def _run(
    experiment: Experiment, setting: Setting, workers: int | None, timeline: bool, show: bool | None
) -> SweepResult:
    """With progress on standard error, unless it is not to be shown."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if workers is not None and workers < 1:
        raise InvalidRequest("workers", f"must be an integer of at least 1, got {workers}")
    if not (is_terminal(sys.stderr) if show is None else show):
        return experiment.run(setting, workers, timeline, None)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=error_console(), transient=show is None) as progress:
        task = progress.add_task("simulating", total=1.0)
        return experiment.run(setting, workers, timeline, lambda share: progress.update(task, completed=share))


def _print(experiment: Experiment, setting: Setting, result: SweepResult, timeline: bool) -> None:
    from rich.console import Console

    from ..bench.simulation_tables import print_runs, print_timelines

    # A file has all the room that a table wants.
    console = Console(highlight=False, width=None if is_terminal(sys.stdout) else 140)
    console.print(experiment.title(setting), soft_wrap=True, markup=False)
    notes = [f"first {setting.warmup_jobs} jobs left out"] if setting.warmup_jobs else []
    print_runs(console, result.runs, notes)
    if timeline:
        print_timelines(console, result.runs)


def _seeds(given: list[int] | None, count: int | None) -> list[int]:
    if count is None:
        return given or [0]
    if given:
        raise InvalidRequest("seeds", "cannot be given with --seed")
    if not 1 <= count <= _MAX_SEEDS:
        raise InvalidRequest("seeds", f"must be an integer between 1 and {_MAX_SEEDS}, got {count}")
    return list(range(count))
