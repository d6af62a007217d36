"""A model over a grid of ranks, which are threads of one process; each loads its part, and rank 0 leads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from threads import each_rank

from fastserve import _C
from fastserve.config import RuntimeConfig
from fastserve.distributed import Grid, Group
from fastserve.links import connect_runtime
from fastserve.native import NativeRuntime
from fastserve.sharding import cut, stages_by_cost

Result = TypeVar("Result")
Make = Callable[[Any, RuntimeConfig], NativeRuntime]


def over(
    tensor: int,
    pipeline: int,
    config_of: Callable[[], tuple[Any, RuntimeConfig]],
    lead: Callable[[Make], Result],
    machines: Sequence[int] | None = None,
) -> Result:
    """What `lead` returns on rank 0, which makes its runtime by what it is given; others by what `config_of` says."""
    grid = Grid(tensor, pipeline)

    def body(world: _C.Communicator) -> Any:
        group = Group(world, grid, timeout=60.0)
        links = connect_runtime(group)

        def make(source: Any, config: RuntimeConfig) -> NativeRuntime:
            stages = stages_by_cost(source.spec.num_layers, pipeline, layer=1.0, first=0.0, last=0.5)
            shard = cut(
                source.spec, tensor_rank=group.tensor_rank, tensor_size=tensor, stage=group.pipeline_rank, stages=stages
            )
            made.append(NativeRuntime(source, config, shard, links))
            return made[-1]

        made: list[NativeRuntime] = []
        if world.rank == 0:
            result = lead(make)
            made[-1].close()
            return result
        make(*config_of()).follow()
        return None

    results = each_rank(grid.size, body, machines)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results[0]
