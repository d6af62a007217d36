"""Conversations and agents: chains of calls, each of which repeats all before it.

A program is one growing text. It begins with a prompt that it shares with others (a system prompt, the descriptions of
tools), of a popularity that follows Zipf's law; then come, call by call, what is new (a message, the result of a tool)
and the answer, and every call's prompt is all of the text so far. A call comes a think-time after the one before it has
ended: the loop is closed within a program, and open between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np

from .arrivals import Arrivals
from .checks import MAX_TOKENS, check_count, check_real
from .job import SimJob
from .lengths import Distribution, log_normal, zipf
from .synthetic import MAX_RATE, MIN_RATE

BLOCK: Final = 16  # tokens that have an identity; what is shared is a whole number of them

_CHUNK: Final = 1024  # gaps are drawn this many at a time
# Standard deviation of the logarithm of a length: what people ask spreads wider than what they are answered, and what
# agents and their tools tell each other has a form.
_MESSAGE_SPREAD: Final = 1.3
_ANSWER_SPREAD: Final = 1.0
_AGENT_SPREAD: Final = 0.5
_LONGEST: Final = 8  # times the mean: longer ones are cut
_TOOLS: Final = 4  # sets of them, of which agents have one
_MOST_CALLS: Final = 1000
_LONGEST_THINK: Final = 1e6  # seconds on average

# Identities: shared prompts are numbered, and programs are; within either, so are the blocks of the text.
_SHARED: Final = 1 << 62
_TEXT: Final = 24  # bits of a block's number


@dataclass(frozen=True)
class Programs:
    """What programs are like."""

    name: str
    kind: str  # what their own names begin with
    calls: tuple[Distribution, ...]  # of programs with each of the shared prompts; one: of all
    opening: Distribution  # tokens that are new in the first call, behind what is shared
    more: Distribution  # and in every later one, behind the answer
    output: Distribution
    think: float  # seconds between a call's end and the next call, on average; exponential
    shared: Distribution  # which of the shared prompts
    shared_tokens: int  # of each of them
    users: int = 0  # that programs are of, in turn; 0: nobody's

    @property
    def longest(self) -> int:
        """No call has more tokens than this, prompt and output together."""
        calls = max(each.longest for each in self.calls)
        new = self.opening.longest + (calls - 1) * self.more.longest
        return self.shared_tokens + new + calls * self.output.longest

    @property
    def mean_calls(self) -> float:
        """Of a program."""
        if len(self.calls) == 1:
            return self.calls[0].mean
        means = [each.mean for each in self.calls]
        return float(sum(means * self.shared.probabilities))


@dataclass(frozen=True)
class ProgramLoad:
    """An endless workload of programs, which arrive by an arrival process.

    Equal seeds give equal programs, whatever the rate and the process.
    """

    programs: Programs
    arrivals: Arrivals

    @property
    def name(self) -> str:
        return self.programs.name

    @property
    def longest(self) -> int:
        """No job has more tokens than this, prompt and output together."""
        return self.programs.longest

    def jobs(self, seed: int, count: int, rate: float) -> Iterator[SimJob]:
        """The first calls of programs that have `count` calls in all; others are behind them, as `then`.

        Calls come at `rate` a second on average, think-times and waiting left out: programs come at that divided by the
        mean number of their calls. The last program is cut to the count. The first arrives at 0. Raises InvalidRequest
        for a seed below 0, or a rate that is not a number above 0.
        """
        check_real("rate", "jobs a second", rate, MIN_RATE, MAX_RATE)
        check_count("seed", "a seed", seed, 0, 2**64 - 1)
        return self._drawn(seed, count, rate / self.programs.mean_calls)

    def _drawn(self, seed: int, left: int, rate: float) -> Iterator[SimJob]:
        gaps, draw = (np.random.default_rng(each) for each in np.random.SeedSequence(seed).spawn(2))
        now, number = 0.0, 0  # on the clock of one program a second
        while True:
            for gap in self.arrivals.gaps(gaps, number, _CHUNK).tolist():
                calls = self._program(number, draw)[:left]
                if not calls:
                    return
                left -= len(calls)
                yield chained([replace(calls[0], arrival=now / rate), *calls[1:]])
                now, number = now + gap, number + 1

    def _program(self, number: int, draw: np.random.Generator) -> list[SimJob]:
        """Its calls, not yet chained."""
        what = self.programs
        drawn = draw.random(2)
        which = int(what.shared.quantile(drawn[1:])[0])
        calls = what.calls[which - 1 if len(what.calls) > 1 else 0]
        count = int(calls.quantile(drawn[:1])[0])
        new, outputs = (each.quantile(draw.random(count)) for each in (what.more, what.output))
        new[0] = what.opening.quantile(draw.random(1))[0]
        thinking = (what.think * draw.standard_exponential(count)).tolist()
        prompts = what.shared_tokens + np.cumsum(new) + np.cumsum(outputs) - outputs
        common = what.shared_tokens // BLOCK
        blocks = -(-int(prompts[-1]) // BLOCK)
        text = tuple(
            [_SHARED | which << _TEXT | block for block in range(common)]
            + [number << _TEXT | block for block in range(common, blocks)]
        )
        user = f"user-{number % what.users}" if what.users else None
        return [
            SimJob(
                0.0, prompt, output, user, content=text[: -(-prompt // BLOCK)], content_block=BLOCK,
                program=f"{what.kind}-{number}", think_time=thinking[call],
            )
            for call, (prompt, output) in enumerate(zip(prompts.tolist(), outputs.tolist(), strict=True))
        ]  # fmt: skip


def chained(calls: list[SimJob]) -> SimJob:
    """The first of the calls, with the others behind it."""
    first = replace(calls[-1], think_time=0.0)  # nothing follows
    for call in reversed(calls[:-1]):
        first = replace(call, then=first)
    return first


def calls_of(job: SimJob) -> Iterator[SimJob]:
    """A job and all that come after it."""
    call: SimJob | None = job
    while call is not None:
        yield call
        call = call.then


def chat(
    turns: int, users: int, think: float = 10.0, message: int = 64, answer: int = 192, system: int = 256
) -> Programs:
    """Conversations of that many turns; lengths are means, but of the system prompts, of which there are eight."""
    check_count("workload", "the turns of chat", turns, 1, _MOST_CALLS)
    check_count("workload", "the users of chat", users, 1, MAX_TOKENS)
    check_real("workload", "the think-time of chat", think, 0.0, _LONGEST_THINK)
    given = (turns, users, think, message, answer, system)
    return Programs(
        name=_name("chat", given, (10.0, 64, 192, 256)),
        kind="chat",
        calls=(Distribution(np.eye(1, turns, turns - 1)[0]),),
        opening=_lengths("message", message, _MESSAGE_SPREAD),
        more=_lengths("message", message, _MESSAGE_SPREAD),
        output=_lengths("answer", answer, _ANSWER_SPREAD),
        think=think,
        shared=zipf(1.0, 8),
        shared_tokens=_whole_blocks("system prompts", system),
        users=users,
    )


def agents(
    most: int = 20, think: float = 2.0, result: int = 160, output: int = 64, tools: int = 1024, task: int = 128
) -> Programs:
    """Agents of two to `most` calls. There are four sets of tools, each for another sort of task.

    The more calls a task takes, the rarer it is: the numbers from two to `most` are cut into four at even ratios, each
    part being those that the tasks of a set take, all as often. Lengths are means, but of the tools' descriptions; a
    think-time is what a tool takes.
    """
    check_count("workload", "the most calls of agents", most, 2, _MOST_CALLS)
    check_real("workload", "the think-time of agents", think, 0.0, _LONGEST_THINK)
    ends = np.round(np.geomspace(2, most, _TOOLS + 1)).astype(int).tolist()
    given = (most, think, result, output, tools, task)
    return Programs(
        name=_name("agents", given, (20, 2.0, 160, 64, 1024, 128)),
        kind="agent",
        calls=tuple(_evenly(low, high) for low, high in pairwise(ends)),
        opening=_lengths("task", task, _AGENT_SPREAD),
        more=_lengths("result", result, _AGENT_SPREAD),
        output=_lengths("output", output, _AGENT_SPREAD),
        think=think,
        shared=zipf(1.0, _TOOLS),
        shared_tokens=_whole_blocks("tools", tools),
    )


def _name(kind: str, given: tuple[float, ...], defaults: tuple[float, ...]) -> str:
    """As `parse_workload` reads it, without the defaults at its end."""
    required, shown = len(given) - len(defaults), list(given)
    while len(shown) > required and shown[-1] == defaults[len(shown) - 1 - required]:
        shown.pop()
    return kind + (":" + ",".join(f"{each:g}" for each in shown) if shown else "")


def _evenly(low: int, high: int) -> Distribution:
    return Distribution((np.arange(1, high + 1) >= low).astype(float))


def _lengths(what: str, mean: int, spread: float) -> Distribution:
    check_count("workload", f"the mean {what}", mean, 1, MAX_TOKENS // _LONGEST)
    return log_normal(mean, spread, _LONGEST * mean)


def _whole_blocks(what: str, tokens: int) -> int:
    check_count("workload", f"the tokens of {what}", tokens, 0)
    return -(-tokens // BLOCK) * BLOCK
