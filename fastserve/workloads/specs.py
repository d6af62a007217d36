"""Workloads and arrival processes by name, as options spell them: `zipf:2`, `gamma:4`, `constant:100,50`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..types import InvalidRequest
from .arrivals import Arrivals, Bursts, Gamma, Poisson
from .lengths import Bimodal, Constant, Lengths, alpaca, log_normal_pair, sharegpt, zipf_pair
from .programs import ProgramLoad, Programs, agents, chat
from .synthetic import Synthetic

Made = TypeVar("Made")


@dataclass(frozen=True)
class _Entry(Generic[Made]):
    """What a name takes after its colon, one kind a parameter; those from `required` on may be left out."""

    usage: str
    help: str
    kinds: tuple[type[int] | type[float], ...]
    required: int
    make: Callable[..., Made]


WORKLOADS: dict[str, _Entry[Lengths]] = {
    "sharegpt": _Entry("sharegpt", "conversations: log-normal, mean prompt 161 and output 338 tokens", (), 0, sharegpt),
    "alpaca": _Entry("alpaca", "instructions: log-normal, mean prompt 19 and output 58 tokens", (), 0, alpaca),
    "zipf": _Entry(
        "zipf:THETA[,LONGEST]",
        "prompt and output each with probability ∝ k^-THETA, up to 1024 tokens unless said otherwise",
        (float, int),
        1,
        zipf_pair,
    ),
    "constant": _Entry("constant:PROMPT,OUTPUT", "every job the same", (int, int), 2, Constant),
    "bimodal": _Entry(
        "bimodal:SHORT,LONG,SHARE,PROMPT",
        "outputs of LONG tokens with probability SHARE, else SHORT",
        (int, int, float, int),
        4,
        Bimodal,
    ),
    "lognormal": _Entry(
        "lognormal:PROMPT_MEAN,PROMPT_SIGMA,OUTPUT_MEAN,OUTPUT_SIGMA[,LONGEST]",
        "log-normal with these means, each cut at 1024 tokens unless said otherwise",
        (float, float, float, float, int),
        4,
        log_normal_pair,
    ),
}

# Of calls that follow each other.
PROGRAMS: dict[str, _Entry[Programs]] = {
    "chat": _Entry(
        "chat:TURNS,USERS[,THINK[,MESSAGE[,ANSWER[,SYSTEM]]]]",
        "conversations of TURNS turns that share system prompts; THINK seconds between turns (10), and mean tokens of "
        "messages (64), answers (192) and system prompts (256)",
        (int, int, float, int, int, int),
        2,
        chat,
    ),
    "agents": _Entry(
        "agents[:MOST[,THINK[,RESULT[,OUTPUT[,TOOLS[,TASK]]]]]]",
        "chains of 2 to MOST calls (20) that share descriptions of tools; THINK seconds between calls (2), and mean "
        "tokens of results (160), outputs (64), descriptions (1024) and tasks (128)",
        (int, float, int, int, int, int),
        0,
        agents,
    ),
}

ARRIVALS: dict[str, _Entry[Arrivals]] = {
    "poisson": _Entry("poisson", "independent of each other", (), 0, Poisson),
    "gamma": _Entry(
        "gamma:CV", "gaps with this coefficient of variation: 1 is poisson, more is burstier", (float,), 1, Gamma
    ),
    "burst": _Entry("burst:SIZE", "SIZE jobs at once, at even distances", (int,), 1, Bursts),
}


def parse_load(workload: str, arrivals: str | Arrivals) -> Synthetic | ProgramLoad:
    """The jobs that both name. Raises InvalidRequest, listing the choices."""
    process = parse_arrivals(arrivals) if isinstance(arrivals, str) else arrivals
    if _name(workload) in PROGRAMS:
        return ProgramLoad(_parse("workload", workload, PROGRAMS), process)
    return Synthetic(parse_workload(workload), process)


def parse_workload(text: str) -> Lengths:
    """The lengths of jobs that `text` names. Raises InvalidRequest, listing the choices."""
    if _name(text) not in WORKLOADS:
        usages = [entry.usage for entry in WORKLOADS.values()] + [entry.usage for entry in PROGRAMS.values()]
        raise InvalidRequest("workload", f"must be one of {', '.join(usages)}; got {text!r}")
    return _parse("workload", text, WORKLOADS)


def parse_arrivals(text: str) -> Arrivals:
    """The arrival process that `text` names. Raises InvalidRequest, listing the choices."""
    return _parse("arrivals", text, ARRIVALS)


def _name(text: str) -> str:
    return text.strip().partition(":")[0].lower()


def _parse(option: str, text: str, entries: dict[str, _Entry[Made]]) -> Made:
    _, colon, rest = text.strip().partition(":")
    entry = entries.get(_name(text))
    if entry is None:
        raise InvalidRequest(
            option, f"must be one of {', '.join(each.usage for each in entries.values())}; got {text!r}"
        )
    words = rest.split(",") if colon else []
    if not entry.required <= len(words) <= len(entry.kinds):
        raise InvalidRequest(option, f"must be written {entry.usage}, got {text!r}")
    try:
        numbers = [kind(word) for kind, word in zip(entry.kinds, words, strict=False)]
    except ValueError:
        raise InvalidRequest(option, f"must be written {entry.usage}, with numbers, got {text!r}") from None
    return entry.make(*numbers)
