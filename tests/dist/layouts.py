"""A model over a grid of ranks, which are threads of one process; each loads its part, and rank 0 leads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from threads import each_rank

from fastserve import _C
from fastserve.config import RuntimeConfig
from fastserve.distributed import Grid, Group
from fastserve.links import Links, connect_runtime
from fastserve.native import NativeRuntime
from fastserve.sharding import Shard, cut, stages_by_cost

Result = TypeVar("Result")
Make = Callable[[Any, RuntimeConfig], NativeRuntime]


def shard_of(source: Any, group: Group) -> Shard:
    """The part of the model that this rank holds."""
    stages = stages_by_cost(source.spec.num_layers, group.grid.pipeline_parallel_size, layer=1.0, first=0.0, last=0.5)
    return cut(
        source.spec,
        tensor_rank=group.tensor_rank,
        tensor_size=group.grid.tensor_parallel_size,
        stage=group.pipeline_rank,
        stages=stages,
    )


def each_of(
    tensor: int,
    pipeline: int,
    body: Callable[[Group, Links, Make], Any],
    machines: Sequence[int] | None = None,
    timeout: float = 60.0,
) -> list[Any]:
    """What `body` returns or raises on each rank, given its group and what makes its runtime."""
    grid = Grid(tensor, pipeline)

    def of_rank(world: _C.Communicator) -> Any:
        group = Group(world, grid, timeout=timeout)
        links = connect_runtime(group)

        def make(source: Any, config: RuntimeConfig) -> NativeRuntime:
            return NativeRuntime(source, config, shard_of(source, group), links)

        return body(group, links, make)

    return each_rank(grid.size, of_rank, machines)


def over(
    tensor: int,
    pipeline: int,
    config_of: Callable[[], tuple[Any, RuntimeConfig]],
    lead: Callable[[Make], Result],
    machines: Sequence[int] | None = None,
) -> Result:
    """What `lead` returns on rank 0, which makes its runtime by what it is given; others by what `config_of` says."""

    def body(group: Group, links: Links, make: Make) -> Any:
        made: list[NativeRuntime] = []

        def keep(source: Any, config: RuntimeConfig) -> NativeRuntime:
            made.append(make(source, config))
            return made[-1]

        if group.rank != 0:
            make(*config_of()).follow()
            return None
        result = lead(keep)
        made[-1].close()
        return result

    results = each_of(tensor, pipeline, body, machines)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results[0]
