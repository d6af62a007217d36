"""Workloads written as Mooncake's traces are (Qin et al., arXiv 2407.00079): timestamps, lengths, hashes of blocks.

Such a trace is an open loop: it says when a call came, and not what it waited for. Each hash stands for a block of 512
tokens and all before it, numbered in the order in which they first appear; the last block of a prompt may be shorter,
and has then a hash of its own.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count

from .content import continues
from .files import replacing
from .job import SimJob
from .trace_formats import MOONCAKE_BLOCK

# (tokens of the prompt that were in no call before it, tokens of the prompt, tokens of output) → seconds.
Service = Callable[[int, int, int], float]


def open_loop(jobs: Iterable[SimJob], service: Service) -> Iterator[SimJob]:
    """The same calls as jobs of their own, in order of arrival: each takes what `service` says, and nobody waits.

    Jobs are taken, and kept, only as far as time has come.
    """
    coming: list[tuple[float, int, SimJob, int]] = []  # later calls: when, and tokens that were there before
    order = count()

    def told(job: SimJob, before: int) -> SimJob:
        following = job.then
        if following is not None:
            seconds = service(job.prompt_tokens - before, job.prompt_tokens, job.output_tokens)
            there = 0
            if continues(job, following):
                there = min(job.prompt_tokens + job.output_tokens, following.prompt_tokens - 1)
            heapq.heappush(coming, (job.arrival + seconds + job.think_time, next(order), following, there))
        return replace(job, then=None, think_time=0.0)

    for job in jobs:
        while coming and coming[0][0] <= job.arrival:
            arrival, _, call, before = heapq.heappop(coming)
            yield told(replace(call, arrival=arrival), before)
        yield told(job, 0)
    while coming:
        arrival, _, call, before = heapq.heappop(coming)
        yield told(replace(call, arrival=arrival), before)


def write_mooncake(path: str | os.PathLike[str], jobs: Iterable[SimJob]) -> int:
    """Write jobs, in order of arrival and without calls behind them, one a line, and return how many.

    Timestamps are whole milliseconds. A job without content has hashes that no other has, and users have no hash in
    common, as they have nothing in the cache. The file appears, or is replaced, once all jobs are written: jobs may
    come out of it as they are taken.
    """
    hashes = _Hashes()
    written = 0
    with replacing(path) as file:
        for job in jobs:
            if job.then is not None:
                raise ValueError("a trace of Mooncake's has no calls that wait for others: write an open loop")
            line = {
                "timestamp": round(1000 * job.arrival),
                "input_length": job.prompt_tokens,
                "output_length": job.output_tokens,
                "hash_ids": hashes.of(job),
            }
            file.write(json.dumps(line) + "\n")
            written += 1
    return written


class _Hashes:
    """Numbers of blocks, by whose they are, how long their parts are, and all that they hold and come after."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int | tuple[str, int], int, tuple[int, ...]], int] = {}
        self._next = count()

    def of(self, job: SimJob) -> list[int]:
        starts = range(0, job.prompt_tokens, MOONCAKE_BLOCK)
        if job.content is None:
            return [next(self._next) for _ in starts]
        found: list[int] = []
        for start in starts:
            stop = min(start + MOONCAKE_BLOCK, job.prompt_tokens)
            parts = job.content[start // job.content_block : -(-stop // job.content_block)]
            # What parts the block begins and ends in the middle of, its place tells.
            key = (found[-1] if found else (job.user or "", job.content_block), stop, parts)
            if key not in self._numbers:
                self._numbers[key] = next(self._next)
            found.append(self._numbers[key])
        return found
