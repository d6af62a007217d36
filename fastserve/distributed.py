"""Groups of ranks: how one begins, who is in it, and how it ends.

world = pipeline × tensor. Ranks of one tensor-parallel group are neighbours (rank = pipeline rank ×
tensor_parallel_size + tensor rank), because launchers put neighbours on one host, and sums need the fastest way.

A rank is started by mpiexec, mpirun or srun, or by `ranks.Ranks`, which starts a group on this host and needs no MPI.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from . import _C
from .config import check_integer
from .joining import LIMIT_VARIABLE, Awaited, limit_of, watched
from .types import InvalidRequest

_MOST_RANKS = 65536
_PLACES = re.compile(r"( \[csrc/[^\]]*\])+$")

# What launchers tell their processes. Slurm sets SLURM_PROCID for a batch script too, SLURM_STEP_NUM_TASKS only for
# what srun starts. MPI's own variables come first: srun may start what an MPI library set up.
_LAUNCHERS = (
    ("fastserve", "FASTSERVE_RANK", "FASTSERVE_WORLD_SIZE"),
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE"),
    ("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("srun", "PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


@dataclass(frozen=True)
class Launched:
    """What the launcher of this process says of it."""

    launcher: str
    rank: int
    size: int
    variable: str = field(default="", compare=False)  # that has the rank


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """Who started this process as one of several; None when nobody did.

    Raises InvalidRequest, naming the variable, for values that cannot be.
    """
    for launcher, rank_name, size_name in _LAUNCHERS:
        if rank_name in environment and size_name in environment:
            size = _number(environment, size_name, 1, _MOST_RANKS)
            return Launched(launcher, _number(environment, rank_name, 0, size - 1), size, rank_name)
    return None


def _number(environment: Mapping[str, str], name: str, low: int, high: int) -> int:
    text = environment[name]
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise InvalidRequest(name, f"must be a whole number from {low} to {high}, got {text!r}")
    return int(text)


@dataclass(frozen=True)
class Grid:
    """How the ranks share a model: layers in stages, and each stage's matrices in slices.

    Raises InvalidRequest for sizes that cannot be.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    def __post_init__(self) -> None:
        for option in ("tensor_parallel_size", "pipeline_parallel_size"):
            object.__setattr__(self, option, check_integer(option, getattr(self, option), 1, _MOST_RANKS))

    @property
    def size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def check(self, ranks: int) -> None:
        """Raise InvalidRequest unless the grid has that many places."""
        if self.size != ranks:
            raise InvalidRequest(
                "tensor_parallel_size × pipeline_parallel_size",
                f"must be the number of ranks ({ranks}), got {self.tensor_parallel_size} × "
                f"{self.pipeline_parallel_size} = {self.size}",
            )

    def coordinates(self, rank: int) -> tuple[int, int]:
        """(pipeline rank, tensor rank)."""
        return divmod(rank, self.tensor_parallel_size)

    def tensor_ranks(self, rank: int) -> range:
        """The ranks that have slices of the same matrices as this one."""
        first = rank - rank % self.tensor_parallel_size
        return range(first, first + self.tensor_parallel_size)

    def pipeline_ranks(self, rank: int) -> range:
        """The ranks that have the same slices in other stages, first stage first."""
        return range(rank % self.tensor_parallel_size, self.size, self.tensor_parallel_size)


class GroupError(_C.GroupError):
    """A rank is gone or could not go on. The message says which one, where, and why."""

    @classmethod
    def of(cls, error: Exception) -> GroupError:
        """Without the places in the source that the runtime's errors end with."""
        return cls(_PLACES.sub("", str(error)))


def line_of(error: BaseException, world: _C.Communicator) -> str:
    """What the other ranks are told of an error of this one. A GroupError says already whose it is."""
    if isinstance(error, _C.GroupError):
        return str(GroupError.of(error))
    rank, process, host = world.members[world.rank]
    return f"rank {rank} on {host} (process {process}): {type(error).__name__}: {_PLACES.sub('', str(error))}"


class Group:
    """This process's place in a group, and its three communicators.

    `world` holds all ranks, `tensor` those of its stage and `pipeline` those that have its slices in other stages, in
    stage order. As a context it is closed at the end; an exception inside is told to all other ranks.
    """

    def __init__(self, world: _C.Communicator, grid: Grid, timeout: float = math.inf) -> None:
        """Collective. `timeout`: seconds that one wait of `tensor` or `pipeline` may take; `world` may be idle.

        Raises InvalidRequest unless the grid has as many places as the world has ranks.
        """
        grid.check(world.size)
        self.grid = grid
        self.world = world
        self.timeout = timeout
        self.pipeline_rank, self.tensor_rank = grid.coordinates(world.rank)
        tensor = world.split(self.pipeline_rank, self.tensor_rank)
        pipeline = world.split(self.tensor_rank, self.pipeline_rank)
        assert tensor is not None and pipeline is not None  # no color is negative
        self.tensor, self.pipeline = tensor, pipeline
        for part in (tensor, pipeline):
            part.set_timeout(timeout)

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def size(self) -> int:
        return self.world.size

    @property
    def hosts(self) -> list[str]:
        """The host of each rank."""
        return [host for _, _, host in self.world.members]

    def gather(self, value: Any) -> list[Any]:
        """Collective. What each rank says, by rank; ready for JSON."""
        mine = json.dumps(value).encode()
        sizes = self.world.all_gather(np.int64(len(mine)).tobytes()).view(np.int64)
        told = self.world.all_gather(mine, sizes.tolist()).tobytes()
        ends = np.cumsum(sizes).tolist()
        return [json.loads(told[end - size : end]) for end, size in zip(ends, sizes.tolist(), strict=True)]

    def abort(self, reason: str) -> None:
        """End every wait of every rank with an error that says this."""
        for part in (self.tensor, self.pipeline, self.world):
            part.abort(reason)

    def close(self) -> None:
        """Leave in order. Others may still wait for each other."""
        for part in (self.tensor, self.pipeline, self.world):
            part.close()

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort(line_of(error, self.world))


def connect(
    grid: Grid, *, host: str = "", timeout: float = math.inf, on_failure: Callable[[str], None] | None = None
) -> Group:
    """Join the group that this process was started in; a group of one where it was started by itself.

    `host` names this host (default: the system's name); ranks whose hosts have the same name, on one machine, share
    memory. `timeout`: see Group. Raises InvalidRequest where the grid does not fit the number of ranks, and _C.Error
    where ranks do not find each other, or the launcher needs MPI and this build has none that works. MPI's start cannot
    be interrupted: when some rank does not come to it, this process ends (exit code 2), after rank 0 has told
    `on_failure` why, on another thread.
    """
    here = launched()
    grid.check(here.size if here else 1)
    if here is None or (here.size == 1 and here.launcher != "fastserve"):
        return Group(_C.local_communicator(host), grid, timeout)
    if here.launcher == "fastserve":
        from .ranks import PATH_VARIABLE, end_with_launcher

        end_with_launcher()
        path = os.environ[PATH_VARIABLE]
        return Group(_C.join_shared_memory(path, here.rank, here.size, host), grid, timeout)
    awaited = Awaited(here.launcher, here.variable, here.rank, here.size, host or socket.gethostname())
    try:
        limit = limit_of(timeout, here.size)
    except ValueError as error:
        raise InvalidRequest(LIMIT_VARIABLE, f"must be seconds: {error}") from None
    with watched(awaited, limit, on_failure) as alarm:
        return _launched_group(here, grid, host, timeout, alarm)


def _launched_group(here: Launched, grid: Grid, host: str, timeout: float, alarm: int) -> Group:
    world = _C.connect_mpi(host, alarm=alarm)
    if (world.rank, world.size) != (here.rank, here.size):
        message = (
            f"{here.launcher} started rank {here.rank} of {here.size}, but {mpi_library()} sees rank {world.rank} of "
            f"{world.size}: launcher and library do not speak with each other (use the mpiexec of that library, or "
            "srun with an --mpi that it knows)"
        )
        world.abort(message)
        raise InvalidRequest("launcher", message)
    return Group(world, grid, timeout)


def mpi_library() -> str | None:
    """The MPI library that the runtime was built with, such as "MPICH 5.0.2"; None for none."""
    return _C.mpi_library() or None
