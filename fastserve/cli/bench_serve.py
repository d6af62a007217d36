"""`fastserve bench serve`: how any OpenAI-compatible server bears a load."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..types import InvalidRequest
from .options import JsonOption
from .terminal import check_picture, error_console, is_terminal

if TYPE_CHECKING:
    from ..bench.serve.experiment import Experiment, Watcher
    from ..bench.serve.results import ServeRun

DEFAULT_URL = "http://127.0.0.1:8000"
_SERVER, _LOAD, _REQUESTS, _OUTPUT = "Server", "Load", "Requests", "Output"


def _in(panel: str, help: str, *names: str, default: Any = False, **more: Any) -> Any:
    return typer.Option(*names, help=help, show_default=default, rich_help_panel=panel, **more)


def serve(
    *,
    base_url: Annotated[str | None, _in(_SERVER, "Where the server is.", default=DEFAULT_URL)] = None,
    target: Annotated[
        list[str] | None,
        _in(
            _SERVER,
            "Several servers, measured in turn and compared with the first. Repeatable.",
            "--target",
            metavar="NAME=URL",
        ),
    ] = None,
    model: Annotated[str | None, _in(_SERVER, "The name of the model.", default="the first of /v1/models")] = None,
    endpoint: Annotated[str, _in(_SERVER, "completions or chat.", default=True)] = "completions",
    api_key: Annotated[str | None, _in(_SERVER, "Sent as a bearer token.", envvar="FASTSERVE_API_KEY")] = None,
    trace: Annotated[
        Path | None,
        _in(
            _LOAD,
            "Jobs from a file: Azure LLM or BurstGPT CSV, Mooncake or FastServe JSONL, or JSON with requests of "
            "t_unit, prompt_len and output_len.",
        ),
    ] = None,
    workload: Annotated[
        str | None,
        _in(
            _LOAD, "Jobs drawn at random, as in `fastserve simulate`: constant:128,64, chat:8,16, …", default="sharegpt"
        ),
    ] = None,
    num_jobs: Annotated[int | None, _in(_LOAD, "Jobs in a run.", default="100, or the whole trace")] = None,
    rate: Annotated[
        list[float] | None, _in(_LOAD, "Jobs a second. Repeatable.", default="1, or the trace's own")
    ] = None,
    arrival: Annotated[
        str | None,
        _in(
            _LOAD,
            "When jobs come: poisson, gamma, trace, all-at-once; or burst:SIZE.",
            default="poisson, or the trace's",
        ),
    ] = None,
    cv: Annotated[
        float | None, _in(_LOAD, "Coefficient of variation of gamma's gaps: more is burstier.", default="1")
    ] = None,
    seed: Annotated[
        int,
        _in(
            _LOAD,
            "Of lengths, arrivals and prompts. A server that remembers prompts knows those of a seed it has met.",
            default=True,
        ),
    ] = 0,
    warmup: Annotated[int, _in(_LOAD, "Jobs sent to each server before its first run, not counted.", default=True)] = 4,
    rounds: Annotated[int, _in(_LOAD, "Runs of each server at each rate; medians are told.", default=True)] = 1,
    concurrency_limit: Annotated[
        int | None, _in(_LOAD, "Most jobs at once: the others wait here, and their clocks run.", default="none")
    ] = None,
    ignore_eos: Annotated[
        bool,
        _in(
            _REQUESTS,
            "Have outputs of exactly the planned length; without, it is a limit.",
            "--ignore-eos/--no-ignore-eos",
            default=True,
        ),
    ] = True,
    temperature: Annotated[float, _in(_REQUESTS, "Of the sampling.", default=True)] = 0.0,
    text_prompts: Annotated[
        bool,
        _in(
            _REQUESTS,
            "Prompts of words, for servers that take no token ids; lengths are then about right. Chats always are.",
            "--text-prompts",
        ),
    ] = False,
    extra_body: Annotated[
        str | None, _in(_REQUESTS, "More fields of every request, as a JSON object: '{\"top_k\": 20}'.")
    ] = None,
    timeout: Annotated[
        float | None,
        _in(_REQUESTS, "Seconds after a job's arrival at which it is given up, as an error.", default="never"),
    ] = None,
    slo: Annotated[
        str | None,
        _in(
            _OUTPUT,
            "Goodput: jobs within all of these seconds. Of jct, ttft, tpot, itl (longest gap), normalized_latency.",
            metavar="ttft=0.5,tpot=0.1",
        ),
    ] = None,
    as_json: JsonOption = False,
    plot: Annotated[Path | None, _in(_OUTPUT, "Draw latencies into this file: .png, .svg or .pdf.")] = None,
    label: Annotated[str | None, _in(_OUTPUT, "What this is, for titles and JSON.")] = None,
) -> None:
    """Send a load to any OpenAI-compatible server, and tell how it bears it.

    The loop is open: each job is sent at its time, however many are unanswered. JCT, TTFT and the rest count from that
    time. Jobs that fail are told apart, and are in no latency. Ctrl-C prints what there is.

    In conversations and agents (chat, agents), a call comes a think-time after the one before it was answered, and
    repeats in its prompt all that was said. Their users and, to FastServe, their programs are named.

    **Examples**

    fastserve bench serve --workload constant:128,64 --rate 4 --num-jobs 200 --slo ttft=0.5,tpot=0.1

    Sixteen users who talk with a model, eight turns each:

    fastserve bench serve --workload chat:8,16,2 --num-jobs 128 --endpoint chat --rate 4

    A trace, twice as fast as it was recorded at 2 jobs a second:

    fastserve bench serve --trace conversations.csv --rate 4

    Two servers at three rates, three times in turn, as a table and as a picture:

    fastserve bench serve --target vllm=http://127.0.0.1:8001 --target ours=http://127.0.0.1:8000
    --trace sharegpt-like-120.json --rate 1 --rate 2 --rate 3 --rounds 3 --plot compared.png
    """
    import asyncio

    from ..bench.serve.experiment import Experiment
    from ..bench.serve.plan import Plan
    from ..bench.serve.prompts import asking
    from ..bench.serve.results import parse_slo
    from ..bench.serve.target import parse_target

    if plot is not None:
        check_picture(plot)
    if target and base_url is not None:
        raise InvalidRequest("base_url", "cannot be given with --target")
    experiment = Experiment(
        servers=[parse_target(each) for each in target or ()] or [("server", base_url or DEFAULT_URL)],
        plan=Plan(trace, workload, num_jobs, arrival, cv, seed),
        asking=asking(endpoint, text_prompts, ignore_eos, temperature, extra_body),
        rates=rate or (),
        rounds=rounds,
        warmup=warmup,
        model=model,
        api_key=api_key,
        timeout=timeout,
        concurrency=concurrency_limit,
        slo=parse_slo(slo) if slo is not None else None,
        label=label,
    )
    with _watch() as watcher:
        runs = asyncio.run(experiment.run(watcher))
    _tell(experiment, runs, as_json, plot)
    if runs[-1].summary["interrupted"]:
        raise KeyboardInterrupt
    if not any(run.summary["completed"] for run in runs):
        raise typer.Exit(1)


def _watch() -> Watcher:
    from ..bench.serve.experiment import Watcher
    from ..bench.serve.progress import Bar

    return Bar(error_console()) if is_terminal(sys.stderr) else Watcher()


def _tell(experiment: Experiment, runs: list[ServeRun], as_json: bool, plot: Path | None) -> None:
    if as_json:
        print(json.dumps(experiment.as_dict(runs), indent=1))
    else:
        from rich.console import Console

        from ..bench.serve.tables import print_runs

        # A file has all the room that a table wants.
        print_runs(Console(highlight=False, width=None if is_terminal(sys.stdout) else 140), experiment.title, runs)
    if plot is not None:
        from ..bench.serve.plots import plot_runs

        plot_runs(runs, plot, experiment.title)
        if not as_json:
            print(f"drawn as {plot}")
