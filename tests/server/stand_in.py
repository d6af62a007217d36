"""A small honest engine: speaks ipc.py, schedules first come first served, and "computes" tokens as a pure function.

`StandIn` is the engine without a process: messages in, messages out. Run as a program it is one, with a heartbeat:
`python stand_in.py --options JSON --address ADDRESS`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from fastserve.ipc import (
    SERVER_PID,
    Abort,
    Add,
    Failed,
    FromEngine,
    Jobs,
    JobStatus,
    LevelStatus,
    ListJobs,
    Ready,
    Refused,
    Status,
    Step,
    Stop,
    ToEngine,
    Update,
)
from fastserve.types import JobMetrics, TokenLogprobs

VOCAB = 61
EOS = 3
CONTEXT = 4096


def token_at(seed: int, prompt: list[int], output: list[int]) -> int:
    """The next token: of the seed, the position and the tokens before. Seldom the end of the sequence."""
    before = array("q", [seed % 2**31, sum(prompt), len(output), *output[-4:]])
    drawn = zlib.crc32(before.tobytes())
    return EOS if drawn % 97 == 0 else 4 + drawn % (VOCAB - 4)


def expected_output(add: Add) -> tuple[list[int], str]:
    """What a job puts out when nobody disturbs it, and its finish_reason. Stop strings are not the engine's."""
    output: list[int] = []
    while (reason := ended(add, output)) is None:
        output.append(token_at(add.seed, add.prompt, output))
    return output, reason


def ended(add: Add, output: list[int]) -> str | None:
    stops = {*add.params.stop_token_ids, *(() if add.params.ignore_eos else (EOS,))}
    if output and output[-1] in stops and len(output) > add.params.min_tokens:
        return "stop"
    room = CONTEXT - len(add.prompt)
    return "length" if len(output) >= min(room, add.params.max_tokens or room) else None


def logprobs_at(seed: int, output: list[int]) -> TokenLogprobs:
    """Of the last token; a pure function, too."""
    return TokenLogprobs(output[-1], -(seed % 7) - len(output) / 1024, [(output[-1], -0.5)])


@dataclass(kw_only=True)
class Options:
    """What the engine does wrong, and how fast."""

    slots: int = 8
    pace: float = 0.0  # seconds an iteration sleeps
    status_every: float = 0.02
    starts: str | None = None  # a file that counts starts
    failing: list[int] = field(default_factory=list)  # starts, from 0, that say Failed
    crashing: list[int] = field(default_factory=list)  # that end without a word
    hanging: list[int] = field(default_factory=list)  # that never are ready
    fails_at: int | None = None  # the iteration of the first start after which it says Failed
    killed_at: list[int] = field(default_factory=list)  # by start, the iteration after which kill -9 comes
    stays: bool = False  # when it has said Failed, as a launcher does that waits for a host
    poison: dict[str, int] = field(default_factory=dict)  # seed → output position at which the engine dies
    killed_by_poison: bool = False  # as by a system that is out of memory; else it crashes
    silent_death: bool = False  # it does not say first who is running
    kv_cache_memory: int | None = None  # bytes of the pool it says it has
    engine: int = 0
    garbage_at: int | None = None  # the iteration after which something is sent that is no message

    @property
    def iteration(self) -> float:
        """Seconds of one, as it says; where it does not sleep, one."""
        return self.pace or 1.0

    def command(self) -> list[str]:
        return [sys.executable, __file__, "--options", json.dumps(asdict(self))]


class Poisoned(Exception):
    """A job has brought the engine down."""


class StandIn:
    """Live jobs are in `jobs`, in order of arrival here; the first `slots` of them run."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.jobs: dict[int, Add] = {}
        self.outputs: dict[int, list[int]] = {}
        self.running: list[int] = []
        self.iterations = 0
        self.stopping = False

    def handle(self, message: ToEngine) -> list[FromEngine]:
        if isinstance(message, Add):
            wrong = next((token for token in message.prompt if not 0 <= token < VOCAB), None)
            if wrong is not None:
                return [Refused(message.key, "prompt", f"holds the token id {wrong}")]
            if message.key in self.jobs or ended(message, message.output) is not None:
                raise RuntimeError(f"job {message.key} was added twice, or had ended")
            self.jobs[message.key] = message
            self.outputs[message.key] = list(message.output)
        elif isinstance(message, Abort):
            live = [self.jobs.pop(key) for key in message.keys if key in self.jobs]
            for add in live:
                del self.outputs[add.key]
            if message.stopped and live:
                return [Step([Update(add.key, None, None, "stop", None, _metrics(add)) for add in live], None)]
        elif isinstance(message, ListJobs):
            return [Jobs(message.query, [self._status_of(add) for add in self.jobs.values()])]
        elif isinstance(message, Stop):
            self.stopping = True
        return []

    def plan(self) -> Step | None:
        """Choose who runs; the Step says so, when that has changed."""
        chosen = list(self.jobs)[: self.options.slots]
        if chosen == self.running:
            return None
        self.running = chosen
        return Step([], chosen)

    def iterate(self) -> Step:
        """One iteration. Raises Poisoned."""
        updates = []
        self.iterations += 1
        for key in self.running:
            add = self.jobs.get(key)
            if add is None:
                continue
            output = self.outputs[key]
            if self.options.poison.get(str(add.seed)) == len(output):
                raise Poisoned(key)
            output.append(token_at(add.seed, add.prompt, output))
            logprobs = logprobs_at(add.seed, output) if add.params.logprobs is not None else None
            reason = ended(add, output)
            if reason is not None:
                del self.jobs[key], self.outputs[key]
            metrics = _metrics(add) if reason is not None else None
            updates.append(Update(key, output[-1], logprobs, reason, None, metrics))
        return Step(updates, None)

    def status(self) -> Status:
        level = LevelStatus(None, len(self.jobs) - len(self.running), len(self.running), 0.0)
        return Status(
            time.monotonic(), len(self.jobs), len(self.running), [level], self._backlog(), 100, 0, 0, 0,
            self.iterations, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0,
        )  # fmt: skip

    def _backlog(self) -> float:
        """Seconds, if outputs are as long as they may be."""
        left = sum((add.params.max_tokens or CONTEXT) - len(self.outputs[key]) for key, add in self.jobs.items())
        return left * self.options.iteration / max(1, min(self.options.slots, len(self.jobs)))

    def _status_of(self, add: Add) -> JobStatus:
        output, running = len(self.outputs[add.key]), add.key in self.running
        most = add.params.max_tokens or CONTEXT
        return JobStatus(add.key, 0, running, "device", len(add.prompt), 0, output, most, 0.0, 0.0, 0)


def _metrics(add: Add) -> JobMetrics:
    now = time.monotonic()
    return JobMetrics(add.arrival, first_token=now, finish=now)


def main(arguments: list[str]) -> int:
    import zmq

    given = list(zip(arguments[::2], arguments[1::2], strict=True))
    address = dict(given)["--address"]
    told: dict[str, Any] = {}
    for name, value in given:
        told |= json.loads(value) if name == "--options" else {}
    options = Options(**told)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = int(os.environ[SERVER_PID])
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 200)
    socket.connect(address)
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(ToEngine)

    def send(*messages: FromEngine) -> None:
        for message in messages:
            socket.send(encoder.encode(message))

    def received() -> Iterator[ToEngine]:
        while socket.poll(0):
            yield decoder.decode(socket.recv())

    start = _count(options.starts)
    if start in options.crashing:
        os.abort()

    def fail() -> int:
        send(Failed(f"start {start} was told to fail", "model"))
        socket.close()
        context.term()
        while options.stays and os.getppid() == parent:
            time.sleep(0.05)
        return 2

    if start in options.failing:
        return fail()
    while start in options.hanging and os.getppid() == parent:
        socket.poll(50)

    engine, next_status = StandIn(options), 0.0
    kv = options.kv_cache_memory or 4096 * (start + 1)  # as the memory that happens to be free
    cost = {"per_iteration": options.iteration}
    sizes = {"kv_cache_bytes": kv, "kv_cache_memory": kv, "max_num_seqs": options.slots}
    info = {"model": "stand-in", "start": start, **sizes, "cost": cost}
    send(Ready([os.getpid()], info, VOCAB, CONTEXT))
    while not engine.stopping and os.getppid() == parent:
        if not engine.jobs:
            socket.poll(int(options.status_every * 1000))
        for message in received():
            send(*engine.handle(message))
        planned = engine.plan()
        if planned is not None and not options.silent_death:
            send(planned)
        if engine.running:
            try:
                send(engine.iterate())
            except Poisoned:
                socket.close()  # what it said is heard
                context.term()
                os.kill(os.getpid(), signal.SIGKILL if options.killed_by_poison else signal.SIGSEGV)
            if options.killed_at[start : start + 1] == [engine.iterations]:
                os.kill(os.getpid(), signal.SIGKILL)
            if start == 0 and engine.iterations == options.fails_at:
                return fail()
            if engine.iterations == options.garbage_at:
                socket.send(b"\xc1")
            time.sleep(options.pace)
        if time.monotonic() >= next_status:
            next_status = time.monotonic() + options.status_every
            send(engine.status())
    socket.close()
    context.term()
    return 0


def _count(name: str | None) -> int:
    """How many starts there were before this one."""
    if name is None:
        return 0
    with Path(name).open("ab") as file:
        before = file.tell()
        file.write(b".")
    return before


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
