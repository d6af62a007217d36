"""`fastserve chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..types import InvalidRequest, SamplingParams
from .options import ENGINE, SAMPLING, SEED, ModelOption, takes
from .terminal import error_console, failure, load, speed, standard_input

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..llm import LLM
    from ..outputs import RequestOutput

_DEFAULTS = {"max_tokens": 512, "temperature": 0.7, "top_p": 0.9}
_HELP = "[dim]/reset forgets the conversation · Ctrl-C stops an answer · /exit or Ctrl-D leaves[/]"


@takes(engine={**ENGINE, **SEED}, sampling=SAMPLING)
def chat(
    *,
    model: ModelOption = "smollm2",
    system: Annotated[str | None, typer.Option(help="What the model is told first.", show_default=False)] = None,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Talk with a model, through its chat template.

    Unless given, --max-tokens is 512, --temperature 0.7 and --top-p 0.9. Lines of standard input are messages where it
    is no terminal.
    """
    standard_input("chat reads what you say from there")
    params = SamplingParams(**{**_DEFAULTS, **sampling})
    console = error_console()
    with load(model, engine) as llm:
        if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
            raise InvalidRequest("model", f"{model} has no chat template; use: fastserve generate --model {model}")
        console.print(_HELP, soft_wrap=True)
        opening = [{"role": "system", "content": system}] if system is not None else []
        conversation = list(opening)
        for line in _lines():
            if line == "/exit":
                return
            if line == "/reset":
                conversation = list(opening)
            elif line.startswith("/"):
                console.print(_HELP, soft_wrap=True)
            elif line:
                conversation.append({"role": "user", "content": line})
                answer = _answer(llm, conversation, params)
                if answer:
                    conversation.append({"role": "assistant", "content": answer})
                else:
                    conversation.pop()


def _lines() -> Iterator[str]:
    """What the user types, line by line, until the end of input."""
    prompt = "\n› " if sys.stdin.isatty() else ""
    if prompt:
        import readline  # noqa: F401 - editing and history, from here on
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            error_console().print(f"\n{_HELP}", soft_wrap=True)


def _answer(llm: LLM, conversation: list[dict[str, str]], params: SamplingParams) -> str:
    """Print the next message as it grows, and return it: what there is of it, where Ctrl-C ended it."""
    console = error_console()
    try:
        outputs = llm.stream_chat(conversation, params)
    except InvalidRequest as error:
        console.print(
            f"the conversation does not fit any more ({error}); /reset starts over", markup=False, soft_wrap=True
        )
        return ""
    text, last = "", None
    try:
        for last in outputs:
            grown = last.outputs[0].text
            sys.stdout.write(grown[len(text) :])
            sys.stdout.flush()
            text = grown
    except KeyboardInterrupt:
        outputs.close()
    sys.stdout.write("\n")
    if last is not None and (failed := failure([last])):
        console.print(f"the answer failed: {failed}", markup=False, soft_wrap=True)
        return ""
    if last is not None:
        console.print(f"[dim]{_footer(last)}[/]")
    return text


def _footer(last: RequestOutput) -> str:
    return speed(last) if last.finished else "stopped"
