"""One rank under mpiexec: under_mpi.py CASE [ranks a host [device]]. What it prints is checked by test_mpi.py."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from dataclasses import replace

import numpy as np
from layouts import shard_of
from shared_models import PROMPT, SMALL, SMALL_CONFIG
from synthetic import plan as batch

from fastserve import _C
from fastserve.distributed import Grid, Group, connect, launched
from fastserve.links import connect_runtime
from fastserve.native import NativeRuntime

case = sys.argv[1]
here = launched()
assert here is not None
host = f"host{here.rank // int(sys.argv[2])}" if len(sys.argv) > 2 else ""


def say(group: Group, *words: object) -> None:
    """A line of each rank, in rank order, from rank 0: what ranks print themselves gets mixed up."""
    line = " ".join(map(str, words)).encode()
    lengths = group.world.all_gather(np.array([len(line)], np.int64)).view(np.int64).tolist()
    text = group.world.all_gather(line, lengths).tobytes()
    if group.rank == 0:
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            print(text[end - length : end].decode(), flush=True)


def sums(group: Group) -> None:
    digest = hashlib.sha256()
    for count in (1, 577, 8193, 65537, 300_001):
        parts = np.random.default_rng(count).standard_normal((group.size, count)).astype(np.float32)
        values = parts[group.rank].copy()
        group.world.all_reduce_sum(values)
        expected = parts[0].copy()
        for part in parts[1:]:
            expected = expected + part
        assert values.tobytes() == expected.tobytes(), count
        digest.update(values)
    say(group, group.world.kind, digest.hexdigest())


def messages(group: Group) -> None:
    """Around the ring, long and short, sends begun before receives."""
    world = group.world
    for length in (0, 1, 4096, 3_000_001):
        data = np.full(length, world.rank, np.uint8)
        memory = np.full(length, 255, np.uint8)
        sent = world.send(data, (world.rank + 1) % world.size)
        received = world.receive(memory, (world.rank - 1) % world.size)
        received.wait()
        sent.wait()
        assert (memory == (world.rank - 1) % world.size).all()
    say(group, "messages")


def grid(group: Group) -> None:
    values = np.full(3, 10.0**group.rank, np.float32)
    group.tensor.all_reduce_sum(values)
    stage = np.full(3, 10.0**group.rank, np.float32)
    group.pipeline.all_reduce_sum(stage)
    say(group, group.pipeline_rank, group.tensor_rank, int(values[0]), int(stage[0]), *group.hosts)


def killed(group: Group) -> None:
    group.world.barrier()
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.world.set_timeout(60.0)
    group.world.barrier()


def raises(group: Group) -> None:
    if group.rank == 1:
        raise ValueError("no such layer")
    group.world.barrier()


def hangs(group: Group) -> None:
    if group.rank == 1:
        signal.pause()
    group.world.set_timeout(0.5)
    group.world.barrier()


def plan(group: Group) -> None:
    """Rank 1 has fewer blocks than the plan needs."""
    config = replace(SMALL_CONFIG, num_blocks=8) if group.rank == 1 else SMALL_CONFIG
    runtime = NativeRuntime(SMALL, config, shard_of(SMALL, group), connect_runtime(group))
    if group.rank != 0:
        return runtime.follow()
    runtime.submit(PROMPT)
    runtime.poll()


def decodes(group: Group) -> None:
    """A prompt and three more tokens."""
    links = connect_runtime(group)
    runtime = NativeRuntime(SMALL, replace(SMALL_CONFIG, device=sys.argv[3]), shard_of(SMALL, group), links)
    if group.rank != 0:
        runtime.follow()
    else:
        tokens = []
        for step in range(4):
            table = [(0, 1, 8)] if step == 2 else []  # a block has four
            runtime.submit(PROMPT if step == 0 else batch(step, [(0, 2 + step, 1, 1)], [-1], table=table))
            result = runtime.poll()
            assert result is not None
            tokens += result.tokens.tolist()
        runtime.close()
        print(*tokens, flush=True)
    links.close()


alone = decodes

shape = Grid(2, here.size // 2) if case in ("grid", "plan", "decodes") else Grid(here.size)
try:
    with connect(shape, host=host) as joined:
        globals()[case](joined)
except _C.Error as error:
    print(f"rank {here.rank} heard: {error}", file=sys.stderr, flush=True)
    sys.exit(3)
