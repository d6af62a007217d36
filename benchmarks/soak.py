"""Thousands of clients that leave, read slowly or behave, for minutes; then nothing may be left of them in the server.

    python benchmarks/soak.py --clients 2000 --minutes 10

Every client asks again and again, over a connection of its own each time. A third hang up at random moments: with half
of the request sent, before the answer, in the midst of it; properly or as if the line had broken. Half read slowly,
through a small receive buffer. Answers that are read to their end have to be the same each time. Now and then all
are done and rest: there memory is compared, and must not grow. Afterwards jobs, KV blocks, tasks, file descriptors and
threads of the server have to be what they were.
The exit code is 1 otherwise. The server starts with a soft limit of 1,024 open files.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import resource
import socket
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import tiny_model
from served import Answer, Server, exchange, until

from fastserve.server.descriptors import raise_limit

try:
    import psutil
except ImportError:
    sys.exit("soak: there is no psutil: `make setup-dev` installs what benchmarks need")

_LOGIN_LIMIT = 1024  # open files that a shell usually allows
_WARM_CLIENTS = 200  # that have been served before anything is counted
_WARM_SHARE = 0.3  # of the rests, up to which memory may still grow
_CLOSES = 0.1  # seconds that the server takes to close the connection by which it was asked
_LOOKS = 5  # of which the least counts: the connection of the one before may be on its way out
_POOL = 32  # threads that asyncio starts at most, and keeps
_PATIENCE = 60.0  # seconds for everything to be as before
_BODIES = 48
_JOBS = 8  # places a client: those of clients that have just left are still taken
_SMALL_BUFFER = 2048  # bytes
_PIECE = 4096  # bytes that a slow client reads at a time
_PAUSE = (0.2, 2.0)  # seconds between its reads
_DAWDLES = 20.0  # seconds, from the first byte on; without an end the load would grow for minutes, and memory with it
_LEAVES_AFTER = (0.003, 30.0)  # seconds, spread evenly over the orders of magnitude between
_MB = 2**20


@dataclass(frozen=True)
class Census:
    """What is there when nobody is being served."""

    jobs: float
    blocks: float  # of KV, on both tiers
    tasks: float
    server_descriptors: float
    engine_descriptors: float
    server_threads: float
    engine_threads: float

    def leaks(self, before: Census) -> list[str]:
        """What has become more."""
        then, now = asdict(before), asdict(self)
        allowed = {name: _POOL if name == "server_threads" else 0 for name in now}
        return [f"{name}: {then[name]:g} → {now[name]:g}" for name in now if now[name] > then[name] + allowed[name]]


@dataclass(frozen=True)
class Sample:
    """Resident memory at a moment, in seconds and bytes."""

    at: float
    server: int
    engine: int


@dataclass(frozen=True)
class Trend:
    """How the resident memory of a process went from rest to rest, in MB; `began` and `ended` in seconds of the run.

    Under load it says little: what is open grows for as long as clients come faster than they are served.
    """

    process: str
    rests: int
    began: float
    ended: float
    first: float
    last: float
    most: float  # under load
    slope: float  # a second

    @property
    def grown(self) -> float:
        return self.slope * (self.ended - self.began)


# --- clients ----------------------------------------------------------------------------------------------------------


def make_bodies(seed: int) -> list[dict[str, Any]]:
    """Of all sizes; some with so much in every event that a slow reader holds up the server's writing."""
    rng = random.Random(seed)
    bodies: list[dict[str, Any]] = []
    for number in range(_BODIES):
        words = "".join(rng.choice("abcdefgh ") for _ in range(rng.choice((3, 40, 400, 1200))))
        body = {"prompt": words, "seed": number, "temperature": 1.0, "max_tokens": rng.choice((1, 10, 40, 100, 250))}
        body |= {"ignore_eos": rng.random() < 0.8, "stream": number % 6 != 5}
        if number % 8 == 3:
            body["logprobs"] = 20
        if number % 8 == 5:
            body["n"] = 2
        if number % 8 == 6:
            body["stop"] = ["ab", "x"]
        bodies.append(body)
    return bodies


class Clients:
    """All clients of one server, and what became of their requests."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server = server
        self._seed = seed
        self._bodies = make_bodies(seed)
        self._answers: dict[int, int] = {}  # body → checksum of its answer
        self._rounds = 0
        self.over = asyncio.Event()
        self.counts: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()

    async def run(self, clients: int, *, once: bool = False) -> None:
        """Until `over` is set and everybody has had his last answer; or one request each."""
        self._rounds += 1
        await asyncio.gather(*(self._live(number, once) for number in range(clients)))

    async def run_for(self, seconds: float, clients: int) -> None:
        self.over.clear()
        running = asyncio.create_task(self.run(clients))
        await asyncio.wait({running}, timeout=seconds)
        self.over.set()
        await running

    async def _live(self, number: int, once: bool) -> None:
        rng = random.Random(f"{self._seed}/{self._rounds}/{number}")
        while not self.over.is_set():
            index = rng.randrange(_BODIES)
            shortest, longest = _LEAVES_AFTER
            patience = shortest * (longest / shortest) ** rng.random() if number % 3 == 0 else None
            try:
                await self._ask(rng, index, slow=number % 2 == 0, patience=patience)
            except (OSError, ValueError) as error:
                self.wrong[f"{type(error).__name__}: {error}"] += 1
                await asyncio.sleep(1.0)  # a server that is gone is not asked a thousand times a second
            if once:
                return

    async def _ask(self, rng: random.Random, index: int, *, slow: bool, patience: float | None) -> None:
        """Raises OSError and ValueError for an answer that is not what it has to be."""
        cut = patience is not None and rng.random() < 0.1
        sock = await self._connect(_SMALL_BUFFER if slow else None)
        options: dict[str, Any] = {"sock": sock, "limit": _PIECE // 2 if slow else 2**16, "cut": cut}
        async with exchange(self._server, "POST", "/v1/completions", self._bodies[index], **options) as answer:
            reading = asyncio.ensure_future(self._read(answer, rng, slow))
            try:
                await asyncio.wait({reading}, timeout=patience)
                if reading.done():
                    self._check(index, answer, reading.result())
                else:
                    self.counts["left"] += 1
                    answer.hang_up(reset=rng.random() < 0.5)
            finally:
                reading.cancel()

    async def _connect(self, buffer: int | None) -> socket.socket:
        sock = socket.socket()
        try:
            if buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, (self._server.host, self._server.port))
        except BaseException:
            sock.close()
            raise
        return sock

    async def _read(self, answer: Answer, rng: random.Random, slow: bool) -> bytes:
        pieces: list[bytes] = []
        end = math.inf
        async for piece in answer.pieces(_PIECE if slow else 2**16):
            end = end if pieces else time.monotonic() + _DAWDLES
            pieces.append(piece)
            if slow and time.monotonic() < end and not self.over.is_set():
                await asyncio.sleep(rng.uniform(*_PAUSE))
        return b"".join(pieces)

    def _check(self, index: int, answer: Answer, body: bytes) -> None:
        if answer.response.status != 200 or not answer.response.complete:
            raise ValueError(f"status {answer.response.status}: {body[-200:]!r}")
        if self._bodies[index]["stream"]:
            *events, done = [part.removeprefix(b"data: ") for part in body.split(b"\n\n") if part]
            if done != b"[DONE]":
                raise ValueError(f"a stream ends with {done[-200:]!r}")
            answers = [json.loads(event) for event in events]
        else:
            answers = [json.loads(body)]
        texts: dict[int, str] = {}
        for choice in (choice for each in answers for choice in each["choices"]):
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"] + (choice["finish_reason"] or "")
        checksum = zlib.crc32(repr(sorted(texts.items())).encode())
        if self._answers.setdefault(index, checksum) != checksum:
            raise ValueError(f"body {index} was answered differently before")
        self.counts["answered"] += 1


# --- what the server holds --------------------------------------------------------------------------------------------


async def census(server: Server, engine: int) -> Census:
    told = await server.jobs()
    tasks = await server.metric("fastserve:asyncio_tasks")
    processes = psutil.Process(server.pid), psutil.Process(engine)
    await asyncio.sleep(_CLOSES)
    return Census(
        told["open_jobs"],
        sum(tier["used"] for tier in told["kv"].values()),
        tasks,
        *(process.num_fds() for process in processes),
        *(process.num_threads() for process in processes),
    )


async def at_rest(server: Server, engine: int) -> Census:
    """Once nobody is served any more."""

    async def empty() -> bool:
        now = await census(server, engine)
        return not now.jobs and not now.blocks

    await until(empty, _PATIENCE)
    return await least(server, engine)


async def least(server: Server, engine: int) -> Census:
    """What is there in every look."""
    looks = [await census(server, engine) for _ in range(_LOOKS)]
    return Census(*(min(getattr(look, field.name) for look in looks) for field in fields(Census)))


async def as_before(server: Server, engine: int, before: Census) -> Census:
    """Once everything is as before; if that does not come to be, as it is."""

    now = before

    async def same() -> bool:
        nonlocal now
        now = await least(server, engine)
        return not now.leaks(before)

    with contextlib.suppress(asyncio.TimeoutError):  # what is left is told
        await until(same, _PATIENCE)
    return now


async def watch(server: Server, engine: int, every: float, samples: list[Sample]) -> None:
    """Until it is cancelled."""
    while True:
        samples.append(sample(server, engine))
        await asyncio.sleep(every)


def sample(server: Server, engine: int) -> Sample:
    processes = psutil.Process(server.pid), psutil.Process(engine)
    return Sample(time.monotonic(), *(process.memory_info().rss for process in processes))


def growth(samples: Sequence[Sample], which: str) -> float:
    """Bytes a second, by least squares."""
    values = [getattr(each, which) for each in samples]
    return float(np.polyfit([each.at for each in samples], values, 1)[0]) if len(samples) > 1 else 0.0


def trend(rests: Sequence[Sample], samples: Sequence[Sample], process: str) -> Trend:
    """After the warm-up. There must be a sample of each kind at least."""
    kept = rests[int(len(rests) * _WARM_SHARE) :]
    values = [getattr(each, process) / _MB for each in kept]
    began, ended = (kept[place].at - samples[0].at for place in (0, -1))
    most = max(getattr(each, process) for each in samples) / _MB
    return Trend(process, len(kept), began, ended, values[0], values[-1], most, growth(kept, process) / _MB)


# --- the run ----------------------------------------------------------------------------------------------------------


async def soak(given: argparse.Namespace, model: str) -> int:
    """The exit code."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(_LOGIN_LIMIT, most), most))
    sizes = ["--max-num-seqs", str(given.max_num_seqs), "--max-queue", str(_JOBS * given.clients)]
    async with Server(["--model", model, *sizes, *given.options]) as server:
        raise_limit()
        engine = await server.engine()
        await Clients(server, given.seed + 1).run(min(_WARM_CLIENTS, given.clients), once=True)
        before = await at_rest(server, engine)
        clients = Clients(server, given.seed)
        samples: list[Sample] = []
        watching = asyncio.create_task(watch(server, engine, given.every, samples))
        rests: list[Sample] = []
        began = time.monotonic()
        while (left := began + 60 * given.minutes - time.monotonic()) > 0:
            await clients.run_for(min(given.round, left), given.clients)
            with contextlib.suppress(asyncio.TimeoutError):  # what is left is told below
                await at_rest(server, engine)
            rests.append(sample(server, engine))
        seconds = time.monotonic() - began
        watching.cancel()
        after = await as_before(server, engine, before)
        problems = [f"leaked {leak}" for leak in after.leaks(before)]
        if await server.engine() != engine:
            problems.append("the engine was restarted")
    counts = clients.counts
    print(f"{given.clients} clients, {seconds:.0f} s: {counts['answered']} answers read to their end, ", end="")
    print(f"{counts['left']} clients left early")
    _print_census(before, after)
    trends = [trend(rests, samples, which) for which in ("server", "engine")]
    _print_memory(trends)
    problems += [f"{count} times {what}" for what, count in clients.wrong.most_common(5)]
    problems += [] if counts["answered"] and counts["left"] else ["nobody was served, or nobody left"]
    problems += [
        f"the {each.process}'s memory grew by {each.grown:.1f} MB, more than {given.tolerance:g}"
        for each in trends
        if each.grown > given.tolerance
    ]
    if given.json is not None:
        found = {"clients": given.clients, "seconds": seconds, **counts, "before": asdict(before)}
        found |= {"after": asdict(after), "memory": [asdict(each) for each in trends], "problems": problems}
        found |= {"rests": [asdict(each) for each in rests], "samples": [asdict(each) for each in samples]}
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def _print_census(before: Census, after: Census) -> None:
    then, now = asdict(before), asdict(after)
    print(f"{'':20} {'before':>8} {'after':>8}")
    for name in now:
        print(f"{name.replace('_', ' '):20} {then[name]:8g} {now[name]:8g}")


def _print_memory(trends: Sequence[Trend]) -> None:
    print(f"{'MB at rest':20} {'first':>8} {'last':>8} {'a minute':>9} {'under load':>11}")
    for each in trends:
        figures = f"{each.first:8.1f} {each.last:8.1f} {60 * each.slope:+9.2f} {each.most:11.1f}"
        print(f"{each.process:20} {figures}   {each.rests} rests, from {each.began:.0f} s to {each.ended:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="what thousands of clients leave behind in a server")
    parser.add_argument("--clients", type=int, default=2000, help="at once (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="(default: %(default)s)")
    parser.add_argument("--round", type=float, default=40.0, help="seconds between rests (default: %(default)s)")
    parser.add_argument("--model", help="as for fastserve serve (default: a tiny random one, made on the spot)")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="jobs of an iteration (default: %(default)s)")
    parser.add_argument(
        "--every", type=float, default=2.0, help="seconds between looks at memory (default: %(default)s)"
    )
    parser.add_argument(
        "--tolerance", type=float, default=32.0, help="MB that memory at rest may grow by (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of requests and clients (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="the last: more for fastserve serve")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fastserve-soak-") as folder:
        return asyncio.run(soak(given, given.model or str(tiny_model.write(Path(folder)))))


if __name__ == "__main__":
    sys.exit(main())
