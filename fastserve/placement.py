"""Where a model runs: in this process, or over the ranks of a group, one of which this process is.

alone         tensor_parallel_size = pipeline_parallel_size = 1
launched      mpiexec, mpirun or srun has started as many processes as the grid has places, all with one program
started here  nobody has: this process is rank 0, and starts the others on this host
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence
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
_RANK_0_FIRST: Final = 1.5  # seconds that others stay after an error: an idle engine looks once a second

_closed = False  # whether a launched group of this process has ended: there is no second one


class Placement:
    """One rank's view. Every method that speaks with the others is called by all, in the same order.

    As a context: an exception within is told to all others, and what others tell is raised as GroupError.
    """

    def __init__(self, grid: Grid, group: Group | None = None, ranks: Ranks | None = None) -> None:
        self.grid = grid
        self._process = os.getpid()
        self._group = group
        self._ranks = ranks
        self._links: Links | None = None
        self._runtime: NativeRuntime | None = None
        self._pulse: Pulse | None = None
        self._failure: str | None = None  # why the group was aborted
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

    @property
    def rank(self) -> int:
        return self._group.rank if self._group is not None else 0

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

    def check_same(self, what: str, value: str) -> None:
        """Raise InvalidRequest, on all, unless all ranks have the same."""
        told = self.gather(value)
        for rank, other in enumerate(told):
            if other != told[0]:
                raise InvalidRequest(
                    what, f"must be the same on all ranks: rank {rank} on {self.members[rank]['host']} has other {what}"
                )

    def shard(self, source: ModelSource, running: RuntimeConfig, rows: int) -> Shard | None:
        """What this rank holds; None: everything. Stages are cut by the time that layers and the rest take here.

        `rows` are those of an iteration.
        """
        if self._group is None:
            return None
        layers: list[tuple[int, int]] = []
        if self.rank == 0:
            costs = (1.0, 0.0)
            if self.grid.pipeline_parallel_size > 1:
                costs = measure_stages(source, running, rows)
            stages = stages_by_cost(
                source.spec.num_layers, self.grid.pipeline_parallel_size, layer=costs[0], first=0.0, last=costs[1]
            )
            layers = [(stage.start, stage.stop) for stage in stages]
        agreed = [range(*each) for each in self.gather(layers)[0]]
        return _cut(source.spec, self.grid, self.rank, agreed)

    def load(self, source: ModelSource, running: RuntimeConfig, shard: Shard | None) -> NativeRuntime:
        """Raises ModelError and InvalidRequest."""
        if self._group is not None:
            self._links = connect_runtime(self._group)
        own = source if shard is None else own_files(source, shard)
        self._runtime = NativeRuntime(own, running, shard, self._links)
        self.gather(None)  # all are ready
        return self._runtime

    def follow(self) -> NoReturn:
        """On ranks other than 0: work for it until it closes, and end the process.

        Raises GroupError when a rank is gone.
        """
        assert self._runtime is not None
        self._runtime.follow()
        self.close()
        raise SystemExit(0)

    def close(self) -> None:
        """Leave. Rank 0 lets the others go; when it cannot, they end with an error. Idempotent."""
        global _closed
        if os.getpid() != self._process:  # a fork, which is no rank
            return
        group, self._group = self._group, None
        runtime, self._runtime = self._runtime, None
        if group is None:
            return
        _closed = self._ranks is None
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
        if isinstance(error, _C.Error):
            raise GroupError.of(error) from error


def place(grid: Grid, command: Sequence[str] | None, timeout: float = math.inf) -> Placement:
    """Collective. Where this process is in the grid.

    `command` starts another rank on this host; None: nothing does. `timeout`: seconds that ranks of one iteration may
    wait for each other. Raises InvalidRequest where there are not as many ranks as places, and GroupError where they do
    not come together.
    """
    if grid.size == 1:
        return Placement(grid)
    here = launched()
    try:
        if here is not None and here.size > 1:
            if _closed:
                raise GroupError("the group of this process has ended; launch another one for another model")
            placement = Placement(grid, connect(grid, timeout=timeout))
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
    """Say on stderr why this rank, which is not rank 0, ends; where it was started by rank 0, that one says it.

    A launcher ends all ranks when the first ends, so rank 0 gets a moment to do with the error what it has to.
    """
    here = launched()
    if here is not None and here.launcher != "fastserve":
        print(f"fastserve: rank {here.rank}: {_said(error)}", file=sys.stderr, flush=True)
        time.sleep(_RANK_0_FIRST)


def _cut(spec: ModelSpec, grid: Grid, rank: int, stages: Sequence[range]) -> Shard:
    stage, tensor_rank = grid.coordinates(rank)
    return cut(spec, tensor_rank=tensor_rank, tensor_size=grid.tensor_parallel_size, stage=stage, stages=stages)


def _started(grid: Grid, command: Sequence[str], timeout: float) -> Placement:
    """As rank 0 of processes that are started here. Raises _C.Error when one ends instead of coming."""
    ranks = Ranks(command, grid.size, first=1)
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
