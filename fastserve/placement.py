"""Where a model runs: in this process, or over the ranks of a group, one of which this process is.

alone         tensor_parallel_size = pipeline_parallel_size = 1
launched      mpiexec, mpirun or srun has started as many processes as the grid has places, all with one program
started here  nobody has: this process is rank 0, and starts the others on this host
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Final, NoReturn

from . import _C
from .config import RuntimeConfig
from .distributed import Grid, Group, GroupError, connect, launched, line_of
from .links import Links, connect_runtime
from .loaders.fastertransformer import FasterTransformerModel
from .loaders.ft_layout import places
from .loaders.spec import ModelSource, ModelSpec
from .native import NativeRuntime
from .pulse import Pulse
from .ranks import RankFailed, Ranks
from .sharding import Shard, cut, stages_by_cost
from .stage_costs import measure_stages
from .types import InvalidRequest

_GOODBYE: Final = 10.0  # seconds that the others get to end by themselves
_RANK_0_FIRST: Final = 1.5  # seconds that others stay after an error: an idle rank 0 looks four times a second

_FAILED: Final = 2  # exit code of the others
# What is said of a rank that somebody outside may have ended: it did not fail by what it was doing.
_ENDED: Final = re.compile(r"( is gone|has not been heard of for .*|was ended by SIG(KILL|TERM|INT|HUP).*)$")

_in_group = False  # whether this process is, or was, in a launched group: that is for one model


class Placement:
    """One rank's view. Every method that speaks with the others is called by all, in the same order.

    As a context: an exception within is told to all others, and what others tell is raised as GroupError.
    """

    def __init__(self, grid: Grid, group: Group | None = None, ranks: Ranks | None = None) -> None:
        self.grid = grid
        self.rank = group.rank if group is not None else 0
        self._process = os.getpid()
        self._group = group
        self._ranks = ranks
        self._links: Links | None = None
        self._runtime: NativeRuntime | None = None
        self._pulse: Pulse | None = None
        self._failure: str | None = None  # why the group was aborted
        self.weight_bytes = 0
        self.members: list[dict[str, Any]] = []  # of each rank: rank, process, host
        if group is not None:
            self.members = [
                {"rank": rank, "process": process, "host": host} for rank, process, host in group.world.members
            ]

    def watch(self, silence: float) -> None:
        """From now on, ranks of several hosts that are not heard of for so many seconds end the group."""
        if self._group is None or self._group.world.kind != "across hosts" or math.isinf(silence):
            return
        ways = self._group.world.split(0, self.rank)
        assert ways is not None  # no color is negative
        self._pulse = Pulse(ways, silence, self._found_gone)

    def check(self) -> None:
        """Raise GroupError if the group has ended by what this rank was not waiting for."""
        if self._failure is not None:
            raise GroupError(self._failure)

    def gather(self, value: Any) -> list[Any]:
        """What each rank says, by rank; ready for JSON."""
        return [value] if self._group is None else self._group.gather(value)

    def share_of_host(self, engines: int) -> tuple[int, int]:
        """(ranks on this host, compute threads of each) where nobody says how many, and so many engines share it.

        A launcher may have bound ranks to cores. Each gets its share of those that it may use.
        """
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
        told = self.gather([self.members[self.rank]["host"] if self.members else "", sorted(cores)])
        host = told[self.rank][0]
        here = [set(theirs) for where, theirs in told if where == host]
        share = sum(1 / sum(core in theirs for theirs in here) for core in cores) / engines
        return len(here), max(1, math.floor(share + 1e-9))

    def device(self, device: str, engine: int = 0) -> str:
        """The device of this rank: those of one host that are told `cuda` take one each, engines in the order of their
        numbers, and in each the ranks in theirs."""
        if device != "cuda" or (not self.members and engine == 0):
            return device
        hosts = [member["host"] for member in self.members] or [""]
        host = hosts[self.rank]
        return f"cuda:{engine * hosts.count(host) + hosts[: self.rank].count(host)}"

    def check_same(self, what: str, value: str) -> None:
        """Raise InvalidRequest, on all, unless all ranks have the same."""
        told = self.gather(value)
        for rank, other in enumerate(told):
            if other != told[0]:
                raise InvalidRequest(
                    what, f"must be the same on all ranks: rank {rank} on {self.members[rank]['host']} has other {what}"
                )

    def stages(self, source: ModelSource, running: RuntimeConfig, rows: int, given: Sequence[int] | None) -> list[int]:
        """Layers of each stage: as given, or cut by the time that layers and the rest take on rank 0's host.

        `rows` are those of an iteration. Raises InvalidRequest for other layers than the model has.
        """
        stages, layers = self.grid.pipeline_parallel_size, source.spec.num_layers
        if given is not None:
            if len(given) != stages or sum(given) != layers or min(given) < 1:
                raise InvalidRequest("stages", f"must be {stages} numbers of layers, {layers} in all, got {given}")
            return list(given)
        counts: list[int] = []
        if self.rank == 0:
            layer, rest = measure_stages(source, running, rows) if stages > 1 else (1.0, 0.0)
            counts = [len(each) for each in stages_by_cost(layers, stages, layer=layer, first=0.0, last=rest)]
        return list(self.gather(counts)[0])

    def shard(self, source: ModelSource, stages: Sequence[int]) -> Shard | None:
        """What this rank holds, with so many layers in each stage; None: everything."""
        if self._group is None:
            return None
        ends = list(accumulate(stages))
        return _cut(
            source.spec, self.grid, self.rank, [range(end - n, end) for end, n in zip(ends, stages, strict=True)]
        )

    def load(self, source: ModelSource, running: RuntimeConfig, shard: Shard | None) -> NativeRuntime:
        """Raises ModelError and InvalidRequest. Afterwards `weight_bytes` are those of all ranks."""
        if self._group is not None:
            self._links = connect_runtime(self._group)
        own = source if shard is None else own_files(source, shard)
        self._runtime = NativeRuntime(own, running, shard, self._links)
        self.weight_bytes = sum(self.gather(self._runtime.weight_bytes))
        return self._runtime

    def follow(self) -> NoReturn:
        """On ranks other than 0: work for it until it closes, and end the process."""
        assert self._runtime is not None
        self._runtime.follow()
        self.close()
        raise SystemExit(0)

    def close(self) -> None:
        """Leave. Rank 0 lets the others go; when it cannot, they end with an error. Idempotent."""
        if os.getpid() != self._process:  # a fork, which is no rank
            return
        group, self._group = self._group, None
        runtime, self._runtime = self._runtime, None
        if group is None:
            return
        grace = _GOODBYE
        try:
            if runtime is not None and group.rank == 0:
                runtime.close()
            if self._pulse is not None:
                self._pulse.stop()
            if self._links is not None:
                self._links.close()
            group.close()
        except _C.Error as error:
            self._abort(group, error)
            grace = 0.0
        self._end_ranks(grace)

    def _found_gone(self, reason: str) -> None:
        if (group := self._group) is not None:
            self._abort(group, GroupError(reason))

    def _abort(self, group: Group, error: BaseException) -> None:
        reason = line_of(error, group.world)
        self._failure = self._failure or reason
        with contextlib.suppress(_C.Error):  # what is closed has nobody waiting
            group.abort(reason)
            if self._links is not None:
                self._links.abort(error)
        if self._pulse is not None:
            self._pulse.abort(reason)

    def _end_ranks(self, grace: float) -> None:
        """End the processes that were started here, which get some seconds to end by themselves."""
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.end(grace)

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, SystemExit):
            return
        group, self._group = self._group, None
        self._runtime = None
        if group is not None:
            self._abort(group, error)
        self._end_ranks(0.0)
        if self.rank > 0:
            _leave_it_to_rank_0(error)
        if isinstance(error, _C.Error):
            raise GroupError.of(error) from error


def place(
    grid: Grid,
    command: Sequence[str] | None,
    timeout: float = math.inf,
    on_failure: Callable[[str], None] | None = None,
) -> Placement:
    """Collective. Where this process is in the grid.

    `command` starts another rank on this host; None: nothing does. `timeout`: seconds that ranks of one iteration may
    wait for each other. `on_failure`: see connect. Raises InvalidRequest where there are not as many ranks as places,
    and GroupError where they do not come together.
    """
    global _in_group
    if grid.size == 1:
        return Placement(grid)
    try:
        if is_launched():
            if _in_group:
                raise GroupError("the ranks of this process's launcher are for one model, and have or had one")
            _in_group = True
            placement = Placement(grid, connect(grid, timeout=timeout, on_failure=on_failure))
            placement.watch(timeout)
            return placement
        if command is None:
            raise InvalidRequest(
                "tensor_parallel_size × pipeline_parallel_size",
                f"must be 1 for a module in memory, or as many as the processes that mpiexec starts; got {grid.size}",
            )
        return _started(grid, command, timeout)
    except _C.Error as error:
        raise GroupError.of(error) from error


def is_launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    here = launched()
    return here is not None and here.size > 1


def ended_by_others(error: GroupError) -> bool:
    """Whether it is of a rank that somebody outside may have ended, as far as can be told."""
    return _ENDED.search(str(error)) is not None


def check_fits(grid: Grid, spec: ModelSpec) -> None:
    """Raise InvalidRequest for a grid that a model of this shape cannot be spread over."""
    stages = stages_by_cost(spec.num_layers, grid.pipeline_parallel_size, layer=1.0, first=0.0, last=0.0)
    _cut(spec, grid, 0, stages)


def own_files(source: ModelSource, shard: Shard) -> ModelSource:
    """The source that reads what a rank holds from the files that were cut for it, where there are such; else `source`.

    A FasterTransformer checkpoint for as many ranks as the tensor-parallel group has is cut where we cut.
    """
    if not isinstance(source, FasterTransformerModel) or source.rank is not None:
        return source
    for name, place in places(source.spec, source.tensor_parallel_size):
        part = shard.part_of(name, place.shape, source.spec)
        if place.axis is None or part is None:
            continue
        cut_there = range(*place.index(shard.tensor_rank)[place.axis].indices(place.shape[place.axis]))
        if part[place.axis] != cut_there:
            return source
    return FasterTransformerModel(source.directory, rank=shard.tensor_rank)


def report(error: Exception) -> None:
    """Say on stderr why this rank does not come to its group. Who is in one tells the others, and rank 0 says it."""
    here = launched()
    who = "a rank" if here is None else f"rank {here.rank} of {here.size}"
    print(f"fastserve: {who} on {socket.gethostname()}: {_said(error)}", file=sys.stderr, flush=True)


def _leave_it_to_rank_0(error: BaseException) -> NoReturn:
    """Which has been told. A launcher ends all ranks when the first ends, so rank 0 gets a moment to say it."""
    if os.environ.get("FASTSERVE_DEBUG"):
        traceback.print_exception(error)
    here = launched()
    if here is not None and here.launcher != "fastserve":
        time.sleep(_RANK_0_FIRST)
    raise SystemExit(_FAILED) from error


def _cut(spec: ModelSpec, grid: Grid, rank: int, stages: Sequence[range]) -> Shard:
    stage, tensor_rank = grid.coordinates(rank)
    return cut(spec, tensor_rank=tensor_rank, tensor_size=grid.tensor_parallel_size, stage=stage, stages=stages)


def _started(grid: Grid, command: Sequence[str], timeout: float) -> Placement:
    """As rank 0 of processes that are started here. Raises _C.Error when one ends instead of coming."""
    ranks = Ranks(command, grid.size, first=1, ended_by=signal.SIGKILL)  # they have nothing to clean up
    placed: list[Placement] = []

    def failed(failure: RankFailed) -> None:
        for placement in placed:
            placement._found_gone(str(failure))

    try:
        ranks.watch(failed)
        group = Group(_C.join_shared_memory(ranks.path, 0, grid.size), grid, timeout)
    except BaseException:
        ranks.end()
        raise
    placed.append(Placement(grid, group, ranks))
    return placed[0]


def _said(error: BaseException) -> str:
    return str(GroupError.of(error)) if isinstance(error, _C.Error) else f"{type(error).__name__}: {error}"
