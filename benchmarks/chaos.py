"""Kills the engine of a real server again and again while streams are under way, and compares every byte they carry.

    python benchmarks/chaos.py                 # 20 times kill -9, then 3 times SIGSTOP until the heartbeat fires
    python benchmarks/chaos.py --kills 100 --stop 0
    python benchmarks/chaos.py --options --data-parallel-size 2                                  # two engines, in turn
    python benchmarks/chaos.py --kills 40 --options --tensor-parallel-size 2 --pipeline-parallel-size 2    # four ranks

First every request is asked undisturbed. Then as many streams as there are requests are kept open, each asking its own
again and again, while one of the engine's processes after the other is killed, at random moments after all are up.
Every stream that has ended is compared: texts, logprobs, finish reasons, stop strings and token counts. Afterwards no
job and no KV block may be left. The exit code is 1 if anything differed.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from served import Server, ServerFailed, exchange, until

_RECOVERY = 300.0  # seconds that the next engine may take
_SHOWN = 3  # differences told in full

_TEXTS = (
    "Once upon a time there was a lighthouse keeper who",
    "The three most important inventions of the last century are",
    "To bake a loaf of bread, first",
    "Write a list of cities in Europe, one a line:",
    "Rain fell on the harbour all night, and in the morning",
    "Explain why the sky is blue.",
    "A short letter to a friend who has moved away:",
    "The difference between a frog and a toad is",
)


@dataclass(frozen=True)
class Request:
    path: str
    body: dict[str, Any]


@dataclass
class Choice:
    """One answer, put together from its events."""

    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class Stream:
    """What came of one request. All but `pause` has to be the same each time."""

    choices: dict[int, Choice] = field(default_factory=dict)
    tokens: tuple[int, int] | None = None  # of the prompt and of the outputs
    broken: str | None = None
    pause: float = field(default=0.0, compare=False)  # the longest wait for an event, in seconds


@dataclass
class Phase:
    """One line of the table."""

    name: str
    disturbances: int = 0
    streams: int = 0
    broken: int = 0
    different: int = 0
    pause: float = 0.0
    under_way: list[int] = field(default_factory=list)  # streams that had begun and not ended, at each disturbance
    restarts: int = 0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.broken and not self.different and self.restarts >= self.disturbances


# --- what is asked ----------------------------------------------------------------------------------------------------


def make_requests(count: int, tokens: int, seed: int) -> list[Request]:
    """All kinds, each with the seed that makes it repeatable; `tokens` is what the longest put out."""
    rng = random.Random(seed)
    return [_request(rng, number, tokens) for number in range(count)]


def _request(rng: random.Random, number: int, tokens: int) -> Request:
    text = f"{rng.choice(_TEXTS)} ({number})" * rng.choice((1, 1, 4))
    body: dict[str, Any] = {
        "seed": rng.getrandbits(32),
        "temperature": rng.choice((0.0, 0.7, 1.0)),
        "max_tokens": rng.randint(tokens // 5, tokens),
        "ignore_eos": rng.random() < 0.7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if number % 4 == 1:
        body["stop"] = rng.choice(([". "], ["\n\n", "zq"], ["e w", "xx", "-3"]))
        body["min_tokens"] = tokens // 8
    if number % 8 == 2:
        body |= {"frequency_penalty": 0.6, "presence_penalty": 0.3, "repetition_penalty": 1.1}
    if number % 8 == 3:
        body |= {"top_p": 0.9, "top_k": 40}
    if number % 8 == 6:
        body["n"] = 2
    with_logprobs = number % 4 == 2
    if number % 2:
        body |= {
            "messages": [{"role": "user", "content": text}],
            **({"logprobs": True, "top_logprobs": 3} if with_logprobs or number % 8 == 5 else {}),
        }
        return Request("/v1/chat/completions", body)
    body |= {"prompt": text, **({"logprobs": 3} if with_logprobs else {})}
    return Request("/v1/completions", body)


# --- what is answered -------------------------------------------------------------------------------------------------


async def ask(server: Server, request: Request, stream: Stream) -> Stream:
    """Fill `stream`; never raises for what the server does."""
    last = time.monotonic()
    done = False
    try:
        async with exchange(server, "POST", request.path, request.body) as answer:
            async for event in answer.events():
                now = time.monotonic()
                stream.pause, last = max(stream.pause, now - last), now
                if done:
                    raise ValueError("an event after [DONE]")
                if event == b"[DONE]":
                    done = True
                else:
                    _take(stream, json.loads(event))
            if answer.response.status != 200:
                raise ValueError(f"status {answer.response.status}")
            if not done or not answer.response.complete:
                raise ValueError("it ends without [DONE]")
            if any(choice.finish_reason is None for choice in stream.choices.values()):
                raise ValueError("an answer has no finish_reason")
    except (OSError, ValueError) as error:
        stream.broken = str(error) or type(error).__name__
    return stream


def _take(stream: Stream, event: dict[str, Any]) -> None:
    """Raises ValueError for an error, and for what follows the end of an answer."""
    if "error" in event:
        raise ValueError(event["error"]["message"])
    if usage := event.get("usage"):
        stream.tokens = (usage["prompt_tokens"], usage["completion_tokens"])
    for part in event["choices"]:
        choice = stream.choices.setdefault(part["index"], Choice())
        if choice.finish_reason is not None:
            raise ValueError("an answer goes on after its finish_reason")
        choice.text += part["text"] if "text" in part else part["delta"].get("content") or ""
        if logprobs := part.get("logprobs"):
            choice.logprobs += _by_token(logprobs)
        choice.finish_reason, choice.stop_reason = part["finish_reason"], part.get("stop_reason")


def _by_token(logprobs: dict[str, Any]) -> list[Any]:
    """The same however many tokens came in one event."""
    if "content" in logprobs:
        return list(logprobs["content"])
    return list(
        zip(*(logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")), strict=True)
    )


# --- what is done to the engine ---------------------------------------------------------------------------------------


class Chaos:
    """Keeps one stream a request open while the engine is disturbed."""

    def __init__(self, server: Server, requests: Sequence[Request], rng: random.Random, window: float) -> None:
        """`window`: seconds after an engine is up in which it is disturbed."""
        self._server = server
        self._requests = requests
        self.rng = rng
        self.window = window
        self._open: list[Stream] = []
        self.expected: list[Stream] = []

    async def undisturbed(self) -> Phase:
        phase = Phase("undisturbed")
        began = time.monotonic()
        self.expected = await self._ask_all()
        for stream in self.expected:
            _count(phase, stream, stream)
        phase.seconds = time.monotonic() - began
        return phase

    async def once(self, phase: Phase) -> None:
        """Ask for everything once more."""
        for index, stream in enumerate(await self._ask_all()):
            _count(phase, stream, self.expected[index])
            _tell(phase, index, self._requests[index], stream, self.expected[index])

    async def _ask_all(self) -> list[Stream]:
        return await asyncio.gather(*(ask(self._server, request, Stream()) for request in self._requests))

    async def disturbed(self, name: str, times: int, disturb: Callable[[Phase, int], Awaitable[None]]) -> Phase:
        """`disturb` is given the number of times before, and returns when the engine is up again."""
        phase = Phase(name)
        began, before = time.monotonic(), (await self._server.health())["engine"]["restarts"]
        self._open = [Stream() for _ in self._requests]
        over = asyncio.Event()
        feeding = [asyncio.create_task(self._feed(index, phase, over)) for index in range(len(self._requests))]
        try:
            for count in range(times):
                await disturb(phase, count)
                phase.disturbances = count + 1
        finally:
            over.set()
            await asyncio.gather(*feeding)
        phase.restarts = (await self._server.health())["engine"]["restarts"] - before
        phase.seconds = time.monotonic() - began
        return phase

    async def _feed(self, index: int, phase: Phase, over: asyncio.Event) -> None:
        while not over.is_set():
            self._open[index] = Stream()
            stream = await ask(self._server, self._requests[index], self._open[index])
            _count(phase, stream, self.expected[index])
            _tell(phase, index, self._requests[index], stream, self.expected[index])
            if stream.broken:
                await asyncio.sleep(0.2)  # a server that refuses is not asked a thousand times a second

    def note_under_way(self, phase: Phase) -> int:
        """How many streams have begun and not ended."""
        phase.under_way.append(sum(bool(stream.choices) and stream.tokens is None for stream in self._open))
        return phase.under_way[-1]

    def signals(self, number: signal.Signals) -> Callable[[Phase, int], Awaitable[None]]:
        """What sends one of the engine's processes after the other a signal, and waits for another in its place."""
        return functools.partial(self._signal, number)

    async def _signal(self, number: signal.Signals, phase: Phase, count: int) -> None:
        processes = await asyncio.wait_for(self._server.engines(), _RECOVERY)
        pid = processes[count % len(processes)]
        await asyncio.sleep(self.rng.uniform(0.0, self.window))
        self.note_under_way(phase)
        os.kill(pid, number)

        async def replaced() -> bool:
            try:
                return pid not in (await self._server.health())["engine"]["pids"]
            except ServerFailed:
                return False

        await until(replaced, _RECOVERY)
        await asyncio.wait_for(self._server.engines(), _RECOVERY)


def _count(phase: Phase, stream: Stream, expected: Stream) -> None:
    phase.streams += 1
    phase.pause = max(phase.pause, stream.pause)
    if stream.broken is not None:
        phase.broken += 1
    elif stream != expected:
        phase.different += 1


def _tell(phase: Phase, index: int, request: Request, stream: Stream, expected: Stream) -> None:
    if stream == expected or phase.broken + phase.different > _SHOWN:
        return
    print(f"request {index} of '{phase.name}' differs: {json.dumps(request.body)}", file=sys.stderr)
    print(f"  undisturbed {expected}\n  now         {stream}", file=sys.stderr)


async def run(given: argparse.Namespace) -> int:
    options = ["--model", given.model, "--heartbeat-timeout", str(given.heartbeat_timeout), *given.options]
    rng = random.Random(given.seed)
    requests = make_requests(given.streams, given.tokens, given.seed)
    async with Server(options) as server:
        chaos = Chaos(server, requests, rng, given.window)
        phases = [await chaos.undisturbed()]
        if given.kills:
            phases.append(await chaos.disturbed("kill -9", given.kills, chaos.signals(signal.SIGKILL)))
        if given.stop:
            phases.append(await chaos.disturbed("SIGSTOP", given.stop, chaos.signals(signal.SIGSTOP)))
        left, remains = await what_is_left(server)
    passed = not left and all(phase.passed for phase in phases)
    print(table(phases))
    print(f"afterwards: {json.dumps(remains)}")
    if given.json is not None:
        found = {"model": given.model, "phases": [asdict(phase) for phase in phases], "left": remains, "passed": passed}
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if passed else 1


async def what_is_left(server: Server) -> tuple[bool, dict[str, int]]:
    """Whether jobs or KV blocks are left, when the server had time to notice that nobody asks any more; and which."""
    try:
        await until(lambda: _is_empty(server), 20.0)
        left = False
    except (asyncio.TimeoutError, TimeoutError):
        left = True
    return left, _left(await server.jobs())


def _left(told: dict[str, Any]) -> dict[str, int]:
    kv = told.get("kv", {})
    used = {f"blocks used ({tier})": kv[tier]["used"] for tier in kv}
    return {"open jobs": told["open_jobs"], **used}


async def _is_empty(server: Server) -> bool:
    left = _left(await server.jobs())
    return len(left) == 3 and not any(left.values())


def table(phases: Sequence[Phase]) -> str:
    lines = [
        f"{'':12} {'times':>6} {'streams':>8} {'identical':>10} {'broken':>7} {'different':>10} {'under way':>10} "
        f"{'worst pause':>12} {'restarts':>9} {'seconds':>8}"
    ]
    for phase in phases:
        under_way = f"{min(phase.under_way)}–{max(phase.under_way)}" if phase.under_way else ""
        same = phase.streams - phase.broken - phase.different
        lines.append(
            f"{phase.name:12} {phase.disturbances:6} {phase.streams:8} {same:10} {phase.broken:7} {phase.different:10} "
            f"{under_way:>10} {phase.pause:10.2f} s {phase.restarts:9} {phase.seconds:8.1f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="streams of a server whose engine dies again and again")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kills", type=int, default=20, help="with SIGKILL (default: %(default)s)")
    parser.add_argument("--stop", type=int, default=3, help="SIGSTOPs until the heartbeat fires (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=32, help="at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=160, help="of the longest answer (default: %(default)s)")
    parser.add_argument(
        "--window",
        type=float,
        default=4.0,
        help="seconds after its start in which an engine dies (default: %(default)s)",
    )
    parser.add_argument("--heartbeat-timeout", type=float, default=4.0, help="seconds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of requests and moments (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="the last: more for fastserve serve")
    return asyncio.run(run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
