"""Options that several commands share: each is written once, and added to a command by `takes`.

A default of None means "not given": the value is left out, and the Python API's default holds. `show_default` tells the
reader what that is; a test compares them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from ..types import InvalidRequest

Command = TypeVar("Command", bound=Callable[..., Any])

_MODEL = "smollm2, a .gguf file, a directory in Hugging Face or FasterTransformer layout, or a hub id."
ModelOption = Annotated[str, typer.Option("--model", help=_MODEL)]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def panel_option(panel: str, kind: Any, default: str | bool, help: str, *names: str, **more: Any) -> Any:
    return Annotated[kind, typer.Option(*names, help=help, show_default=default, rich_help_panel=panel, **more)]


_engine = functools.partial(panel_option, "Engine")
_sampling = functools.partial(panel_option, "Sampling")

HARDWARE: dict[str, Any] = {
    "dtype": _engine(str | None, "bfloat16", "Type of computation: bfloat16, float32, or on a CUDA device float16."),
    "kv_cache_dtype": _engine(
        str | None,
        "auto",
        "Type of the KV cache: auto is --dtype's; bfloat16, float32, or int8, which takes half of bfloat16's memory.",
    ),
    "quantization": _engine(
        str | None,
        "auto",
        "Weights in memory: auto keeps the blocks of a quantized GGUF file (Q8_0, Q4_0, Q4_1), unless --dtype is "
        "float32; int8 quantizes any model, with one scale an output; none converts all weights to --dtype.",
    ),
    "device": _engine(str | None, "cpu", "Where to run: cpu, cuda, or one of several such devices: cuda:1."),
    "threads": _engine(int | None, "0", "Threads of each rank; 0 is its share of the cores."),
    "tensor_parallel_size": _engine(int | None, "1", "Ranks that share every matrix of the model."),
    "pipeline_parallel_size": _engine(
        int | None,
        "1",
        "Stages that share the layers. Every rank of every stage is a process; memory sizes are of each.",
    ),
    "max_model_len": _engine(int | None, "the model's", "Longest prompt + output, in tokens."),
    "max_num_seqs": _engine(int | None, "32", "Jobs in one iteration."),
    "max_num_batched_tokens": _engine(
        int | None, "512", "Tokens in one iteration; longer prompts are prefilled in chunks."
    ),
    "block_size": _engine(int | None, "16", "Tokens in one block of the KV cache."),
    "kv_cache_memory": _engine(
        str | None,
        "room for max-num-seqs full contexts, at most a quarter of free memory",
        "Size of the KV cache, such as 512M or 4G.",
    ),
    "swap_space": _engine(
        str | None,
        "4G, at most a quarter of what the KV cache leaves",
        "Host memory for the KV of preempted jobs, such as 4G; 0: none, and what loses its place is computed again. On "
        "a CPU it is the same memory as --kv-cache-memory's, which is the first to raise.",
    ),
    "swap_bandwidth": _engine(
        str | None,
        "as fast as it goes",
        "Slow each direction of swapping to so many bytes a second, such as 200M, to try a slow link; at least 1M.",
    ),
}
SCHEDULING: dict[str, Any] = {
    "policy": _engine(str | None, "skip-join-mlfq", "Who runs next: fcfs, mlfq, skip-join-mlfq or gittins."),
    "admission": _engine(
        str | None,
        "paged",
        "When a job starts: paged, when its prompt fits in the KV cache; reserve, when its longest output does, too.",
    ),
    "swap_mode": _engine(
        str | None,
        "proactive",
        "When the KV cache is full: proactive swaps ahead of need, while others run; reactive when it is needed, while "
        "all wait; recompute throws KV away.",
    ),
    "starvation_limit": _engine(
        str | None,
        "60",
        "Seconds after which a waiting job goes first, under any policy but fcfs, and among its tenant's where several "
        "have jobs; none: never.",
    ),
    "slowdown_limit": _engine(
        str | None, "none", "So does one that has waited this many times its own service; none: never."
    ),
    "stall_limit": _engine(
        str | None,
        "auto",
        "Cut prompts so that they make an iteration at most this many times as long for jobs that decode (up to 1.9 "
        "times where the batch has spare rows; what takes 0.2 seconds at most is not cut while nobody waits for a "
        "row); none: never; auto: 1.5 where tokens are streamed to many, else never.",
    ),
    "num_levels": _engine(int | None, "16", "Levels of the MLFQ."),
    "enable_prefix_caching": _engine(
        bool | None,
        "on",
        "Keep the KV of jobs that have ended until its memory is needed, and share that of prompts which begin alike; "
        "--no-enable-prefix-caching: neither.",
        "--enable-prefix-caching",
    ),
    "cost": _engine(
        Path | None, "measured once and remembered", "Cost profile to schedule by, as `fastserve profile` writes it."
    ),
}
SEED: dict[str, Any] = {"seed": _engine(int | None, "0", "Of the sampling; equal seeds give equal answers.")}
ENGINE = {**SCHEDULING, **HARDWARE}
TENANTS: dict[str, Any] = {
    "tenant_weights": _engine(
        list[str] | None,
        "1 each",
        "Share of the device of a tenant, beside others who want it, too. Repeatable. A tenant is a request's `user`; "
        "with --api-key it is `key 0`, the first key as a whole, or `key 0/USER`, a user within it.",
        "--tenant-weight",
        metavar="NAME=WEIGHT",
    ),
}

SAMPLING: dict[str, Any] = {
    "max_tokens": _sampling(int | None, False, "Longest answer, in tokens."),
    "min_tokens": _sampling(int | None, "0", "Shortest answer: nothing ends it before."),
    "temperature": _sampling(float | None, False, "Randomness; 0 always takes the most likely token."),
    "top_k": _sampling(int | None, "0", "Choose among this many most likely tokens; 0 is all."),
    "top_p": _sampling(float | None, False, "Choose among the likeliest tokens that share this probability."),
    "min_p": _sampling(
        float | None, "0", "Drop tokens less likely than this share of the likeliest one's probability."
    ),
    "repetition_penalty": _sampling(float | None, "1", "Above 1 discourages tokens of the prompt and the answer."),
    "presence_penalty": _sampling(float | None, "0", "Above 0 discourages tokens that are in the answer."),
    "frequency_penalty": _sampling(float | None, "0", "Above 0 discourages tokens the more, the more often they came."),
    "stop": _sampling(list[str] | None, False, "End the answer before this text. Repeatable."),
    "stop_token_ids": _sampling(
        list[int] | None, False, "End the answer at this token. Repeatable.", "--stop-token-id", metavar="ID"
    ),
    "ignore_eos": _sampling(bool | None, False, "Go on after the end-of-sequence token.", "--ignore-eos"),
}
# Flags that turn another off: named in its help, as a column of their own would leave little room for all help.
_NEGATIVES = {"enable_prefix_caching": "--no-enable-prefix-caching"}
_LIMITS = {"starvation_limit": " of seconds", "slowdown_limit": "", "stall_limit": ""}

SIMULATION = (
    "workload", "trace", "arrivals", "jobs", "rate", "load", "seeds", "warmup_jobs", "hardware", "tensor_parallel_size",
    "pipeline_parallel_size", "kv_blocks", "swap_blocks", "swap_seconds", "repayment", "workers", "plot",
    "timeline", "write_trace",
)  # fmt: skip
SERVING = (
    "host", "port", "served_model_name", "api_key", "cors_origin", "max_body_size", "max_queue", "shutdown_timeout",
    "heartbeat_timeout", "log_format", "data_parallel_size", "launcher",
)  # fmt: skip
LOAD = (
    "base_url", "target", "endpoint", "api_key", "num_jobs", "arrival", "cv", "rounds", "concurrency_limit",
    "extra_body", "timeout", "slo",
)  # fmt: skip
# What an InvalidRequest calls a field, where that is the name of an option.
OPTION_NAMES = {
    **{name: f"--{name.replace('_', '-')}" for name in (*ENGINE, *SEED, *SAMPLING, "n", "model", "chat", "prompt")},
    **{name: f"--{name.replace('_', '-')}" for name in ("prompts_file", "prompt_token_ids", "input_len", "output_len")},
    **{name: f"--{name.replace('_', '-')}" for name in ("num_prompts", "batch_size", "warmup", "iterations", "output")},
    **{name: f"--{name.replace('_', '-')}" for name in (*SIMULATION, *SERVING, *LOAD)},
    "stop_token_ids": "--stop-token-id",
    "tenant_weights": "--tenant-weight",
    "num_blocks": "--kv-blocks",
    "num_host_blocks": "--swap-blocks",
}


def takes(**groups: Mapping[str, Any]) -> Callable[[Command], Command]:
    """Give a command the options of each group; it gets those that were given as one dict, named like the group."""

    def add(command: Command) -> Command:
        own = inspect.signature(command)
        hints = get_type_hints(command, include_extras=True)
        kept = [
            parameter.replace(annotation=hints[name])
            for name, parameter in own.parameters.items()
            if name not in groups
        ]
        offered = {name: annotation for options in groups.values() for name, annotation in options.items()}
        for name in _NEGATIVES.keys() & offered.keys():
            offered[f"no_{name}"] = Annotated[bool | None, typer.Option(_NEGATIVES[name], hidden=True)]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in offered.items()
        ]

        @functools.wraps(command)
        def collect(**values: Any) -> Any:
            for group, options in groups.items():
                given = {name: _wanted(name, values) for name in options}
                values[group] = {name: value for name, value in given.items() if value not in (None, [])}
            return command(**values)

        signature = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in kept] + added)
        collect.__signature__ = signature  # type: ignore[attr-defined]
        collect.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        del collect.__wrapped__  # typer would look through it, at the signature without the groups
        return collect  # type: ignore[return-value]

    return add


def _wanted(name: str, values: dict[str, Any]) -> Any:
    """Take an option's value out of all that were given; False where the flag that turns it off was."""
    value, negative = values.pop(name), values.pop(f"no_{name}", None)
    if value and negative:
        raise InvalidRequest(name, f"cannot be given with {_NEGATIVES[name]}")
    return False if negative else value


def engine_options(given: dict[str, Any]) -> dict[str, Any]:
    """As LLM takes them. Raises InvalidRequest for a limit that is neither a number nor `none`, and for no weight."""
    limits: dict[str, Any] = {name: _limit(name, unit, given[name]) for name, unit in _LIMITS.items() if name in given}
    if "tenant_weights" in given:
        limits["tenant_weights"] = dict(map(_weight, given["tenant_weights"]))
    return {**given, **limits}


def _weight(text: str) -> tuple[str, float]:
    """The last = is the one, so that a name may have some."""
    name, equals, weight = text.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        number = -1.0
    if not equals or not 0 < number < float("inf"):
        raise InvalidRequest(
            "tenant_weights", f"must be NAME=WEIGHT with a number above 0, such as ann=2, got {text!r}"
        )
    return name, number


def _limit(option: str, unit: str, text: str) -> float | str | None:
    if option == "stall_limit" and text.lower() == "auto":
        return "auto"
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise InvalidRequest(option, f"must be a number{unit} or none, got {text!r}") from None
