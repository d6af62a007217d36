"""`fastserve generate`: answers to prompts from flags, a file or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..types import InvalidRequest, SamplingParams
from .options import ENGINE, SAMPLING, SEED, JsonOption, ModelOption, takes
from .terminal import error_console, failure, is_terminal, load, print_growing, speed, standard_input

if TYPE_CHECKING:
    from ..llm import LLM
    from ..outputs import RequestOutput

Prompt = str | list[int]

_MAX_TOKENS = 128  # the API's 16 are few for a reader


@takes(engine={**ENGINE, **SEED}, sampling=SAMPLING)
def generate(
    *,
    model: ModelOption = "smollm2",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt. Repeatable.", show_default=False)] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="A file of prompts, one a line; - is standard input.", show_default=False)
    ] = None,
    prompt_token_ids: Annotated[
        list[str] | None,
        typer.Option(help="A prompt as token ids, such as 504,3575,282. Repeatable.", show_default=False),
    ] = None,
    use_chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    n: Annotated[int, typer.Option(help="Answers to each prompt.", rich_help_panel="Sampling")] = 1,
    as_json: JsonOption = False,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Generate text from prompts.

    Without --prompt, --prompts-file or --prompt-token-ids, all of standard input is one prompt. A single answer appears
    word by word on a terminal. --max-tokens is 128 and --temperature 1 unless given.

    fastserve generate --prompt "The capital of France is" --temperature 0

    fastserve generate --chat --prompts-file questions.txt --json > answers.json
    """
    # Launchers give standard input to one rank.
    prompts = [] if _follows(engine) else _read_prompts(prompt or [], prompts_file, prompt_token_ids or [])
    if use_chat and any(not isinstance(each, str) for each in prompts):
        raise InvalidRequest("chat", "needs prompts that are text, not token ids")
    params = SamplingParams(**{"max_tokens": _MAX_TOKENS, "n": n, **sampling})
    with load(model, engine) as llm, _naming_option(prompts):
        if len(prompts) == n == 1 and not as_json and is_terminal(sys.stdout):
            output = print_growing(_stream(llm, prompts[0], params, use_chat))
            if error := failure([output]):
                raise error
            error_console().print(f"[dim]{speed(output)}[/]")
            return
        show = is_terminal(sys.stderr)
        if use_chat:
            outputs = llm.chat([_conversation(each) for each in prompts], params, progress=show)
        else:
            outputs = llm.generate(prompts, params, progress=show)
        policy = llm.info["policy"]
    if as_json:
        print(json.dumps({"model": model, "policy": policy, "results": _results(prompts, outputs)}, indent=2))
    else:
        _print_all(prompts, outputs)
    if error := failure(outputs):
        raise error


def _follows(engine: dict[str, Any]) -> bool:
    """Whether this process is a rank that works for another one."""
    from ..distributed import launched

    here = launched()
    several = any(engine.get(size, 1) > 1 for size in ("tensor_parallel_size", "pipeline_parallel_size"))
    return several and here is not None and here.rank > 0


@contextmanager
def _naming_option(prompts: list[Prompt]) -> Iterator[None]:
    """What is wrong with token ids is wrong with --prompt-token-ids."""
    try:
        yield
    except InvalidRequest as error:
        if error.field != "prompt" or isinstance(prompts[error.request or 0], str):
            raise
        raise InvalidRequest("prompt_token_ids", str(error).removeprefix("prompt: "), error.request) from None


def _read_prompts(texts: list[str], file: Path | None, token_ids: list[str]) -> list[Prompt]:
    from ..bench.workload import read_prompts

    prompts: list[Prompt] = list(texts)
    if file is not None:
        if str(file) == "-":
            standard_input("give --prompts-file the name of a file")
            file = Path("/dev/stdin")
        prompts += read_prompts(file)
    prompts += [_parse_ids(ids) for ids in token_ids]
    if prompts:
        return prompts
    given = standard_input('give one with --prompt "…" or --prompts-file')
    text = "" if given.isatty() else given.read().removesuffix("\n")
    if not text:
        raise InvalidRequest("prompt", 'is missing; give one with --prompt "…", --prompts-file or standard input')
    return [text]


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InvalidRequest("prompt_token_ids", f"must be integers such as 504,3575,282; got {text!r}") from None


def _conversation(prompt: Prompt) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}]


def _stream(llm: LLM, prompt: Prompt, params: SamplingParams, use_chat: bool) -> Any:
    return llm.stream_chat(_conversation(prompt), params) if use_chat else llm.stream(prompt, params)


def _results(prompts: list[Prompt], outputs: list[RequestOutput]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt,
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
            **({"error": answer.error} if answer.error is not None else {}),
            "metrics": answer.metrics.as_dict(len(answer.token_ids)),
        }
        for prompt, output in zip(prompts, outputs, strict=True)
        for answer in output.outputs
    ]


def _print_all(prompts: list[Prompt], outputs: list[RequestOutput]) -> None:
    """One answer as it is; several under headings."""
    answers = [(prompt, answer) for prompt, output in zip(prompts, outputs, strict=True) for answer in output.outputs]
    for i, (prompt, answer) in enumerate(answers):
        if len(answers) > 1:
            print(f"{'' if i == 0 else chr(10)}=== {i + 1}/{len(answers)}: {' '.join(str(prompt).split())}")
        print(answer.text)
