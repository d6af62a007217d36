"""What the API server's side of the engine costs: CPU of its process for each token, with text and with a reader a job.

    python benchmarks/engine_client.py --streams 32,512 --pace 0.02

An engine in a process of its own puts out one token for each of so many streams every `pace` seconds; each stream has a
task that awaits its news and looks at its text. Counted is the CPU time of this process, ZeroMQ's thread included,
from the first token of all to the last; beside it, that of bare futures set and awaited at that pace. `--receive`
compares ways of getting messages of such a size into the event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from fastserve.ipc import SERVER_PID, Abort, Add, ListJobs, Ready, Step, Stop, ToEngine, Update
from fastserve.loaders import open_model
from fastserve.server.client import EngineClient
from fastserve.server.jobs import OpenJob
from fastserve.tokenizer import Tokenizer
from fastserve.types import JobMetrics, SamplingParams

TEXT = "The quick brown fox jumps over the lazy dog, and the dog, who has seen it all before, goes back to sleep. "


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU of the engine client for each token")
    parser.add_argument("--streams", default="32,512", help="how many at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="of each stream (default: %(default)s)")
    parser.add_argument("--pace", type=float, default=0.02, help="seconds between iterations (default: %(default)s)")
    parser.add_argument("--stop", action="store_true", help="give every job a stop string that never comes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--receive", action="store_true", help="compare ways to receive instead")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine:
        serve(given.address, given.tokens, given.pace)
    elif given.receive:
        compare_receivers(given.pace)
    else:
        for streams in map(int, given.streams.split(",")):
            runs = sorted(asyncio.run(measure(streams, given)) for _ in range(given.repeats))
            bare = sorted(asyncio.run(bare_futures(streams, given.tokens, given.pace)) for _ in range(given.repeats))
            middle = given.repeats // 2
            print(f"{streams:5} streams: {runs[middle]:5.1f} µs a token (of them a bare future {bare[middle]:.1f})")


# --- the client -------------------------------------------------------------------------------------------------------


async def measure(streams: int, given: argparse.Namespace) -> float:
    """Microseconds of CPU for each token."""
    data = open_model("smollm2").tokenizer_data()
    assert data is not None
    tokenizer = Tokenizer.from_data(data)
    pace = ["--tokens", str(given.tokens), "--pace", str(given.pace)]
    client = EngineClient([sys.executable, __file__, "--engine", *pace], tokenizer)
    await client.start()
    try:
        params = SamplingParams(max_tokens=given.tokens, stop="~never~" if given.stop else ())
        prompt = tokenizer.encode(TEXT)
        warm = client.open(prompt, params, seed=0)  # the tokens' bytes are looked up once
        await read(warm)
        jobs = [client.open(prompt, params, seed=seed) for seed in range(streams)]
        readers = [asyncio.ensure_future(read(job)) for job in jobs]
        while not all(job.output for job in jobs):
            await asyncio.sleep(given.pace)
        had, began = sum(len(job.output) for job in jobs), time.process_time()
        await asyncio.gather(*readers)
        spent = time.process_time() - began
        return spent / (streams * given.tokens - had) * 1e6
    finally:
        await client.stop()


async def read(job: OpenJob) -> int:
    shown = 0
    while job.finish_reason is None:
        await job.news()
        shown += len(job.text[shown:])
    return shown


async def bare_futures(streams: int, rounds: int, pace: float) -> float:
    """The least that any stream costs: it is woken once for each token, at the same pace."""
    loop = asyncio.get_running_loop()
    futures: list[asyncio.Future[None]] = [loop.create_future() for _ in range(streams)]

    async def wait(index: int) -> None:
        for _ in range(rounds):
            await futures[index]
            futures[index] = loop.create_future()

    readers = [asyncio.ensure_future(wait(index)) for index in range(streams)]
    await asyncio.sleep(0)
    began = time.process_time()
    for _ in range(rounds):
        for future in futures:
            future.set_result(None)
        await asyncio.sleep(pace)
    await asyncio.gather(*readers)
    return (time.process_time() - began) / (streams * rounds) * 1e6


# --- the engine -------------------------------------------------------------------------------------------------------


def serve(address: str, tokens: int, pace: float) -> None:
    """All jobs at once, the words of their prompts again and again."""
    parent = int(os.environ[SERVER_PID])
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.connect(address)
        encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(ToEngine)
        socket.send(encoder.encode(Ready([os.getpid()], {}, 50_000, 4096)))
        jobs: dict[int, tuple[Add, int]] = {}
        while os.getppid() == parent:
            socket.poll(0 if jobs else 100)
            while socket.poll(0):
                message = decoder.decode(socket.recv())
                if isinstance(message, Add):
                    jobs[message.key] = (message, 0)
                elif isinstance(message, Stop):
                    return
                elif not isinstance(message, (Abort, ListJobs)):
                    raise TypeError(message)
            updates = []
            for key, (add, count) in list(jobs.items()):
                last = count + 1 == tokens
                metrics = JobMetrics(add.arrival) if last else None
                token = add.prompt[count % len(add.prompt)]
                updates.append(Update(key, token, None, "length" if last else None, None, metrics))
                jobs[key] = (add, count + 1)
                if last:
                    del jobs[key]
            if updates:
                socket.send(encoder.encode(Step(updates, None)))
                time.sleep(pace)


# --- ways to receive --------------------------------------------------------------------------------------------------

_SENDER = """
import sys, time, zmq
messages, pace = int(sys.argv[2]), float(sys.argv[3])
with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.connect(sys.argv[1])
    socket.recv()
    for _ in range(messages):
        socket.send(b"x" * 400)
        if pace:
            time.sleep(pace)
    socket.recv()
"""


def compare_receivers(pace: float) -> None:
    for name, receive in (("a plain socket, watched by the loop", _watched), ("zmq.asyncio", _awaited)):
        burst, paced = asyncio.run(_received(receive, 20_000, 0.0)), asyncio.run(_received(receive, 300, pace))
        print(f"{name:36} {burst:6.1f} µs of CPU a message in a burst, {paced:6.1f} one by one")


async def _received(
    receive: Callable[[str, Callable[[], subprocess.Popen[bytes]], int], Any], count: int, pace: float
) -> float:
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{Path(folder, 'socket')}"
        command = [sys.executable, "-c", _SENDER, address, str(count), str(pace)]
        return float(await receive(address, lambda: subprocess.Popen(command), count)) / count * 1e6


async def _watched(address: str, start: Callable[[], subprocess.Popen[bytes]], count: int) -> float:
    done, loop, left = asyncio.Event(), asyncio.get_running_loop(), count
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.bind(address)
        sender = start()

        def read() -> None:
            nonlocal left
            while True:
                try:
                    socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    return
                left -= 1
                if not left:
                    done.set()

        loop.add_reader(socket.FD, read)
        socket.send(b"go")
        read()
        began = time.process_time()
        await done.wait()
        spent = time.process_time() - began
        loop.remove_reader(socket.FD)
        socket.send(b"end")
        sender.wait()
        return spent


async def _awaited(address: str, start: Callable[[], subprocess.Popen[bytes]], count: int) -> float:
    with zmq.asyncio.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.bind(address)
        sender = start()
        await socket.send(b"go")
        began = time.process_time()
        for _ in range(count):
            await socket.recv()
        spent = time.process_time() - began
        await socket.send(b"end")
        await asyncio.to_thread(sender.wait)
        return spent


if __name__ == "__main__":
    main()
