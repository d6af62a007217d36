"""The ways on which a rank's runtime talks with those of other ranks (csrc/runtime/group.h)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import _C
from .distributed import Group, line_of


@dataclass(frozen=True)
class Links:
    """Communicators, each used by one thread at a time; None where this rank has nobody to talk to on it."""

    plans: _C.Communicator  # from rank 0 to all
    answers: _C.Communicator  # from all to rank 0
    sampler: int  # the rank that tells rank 0 what was sampled; 0: rank 0 samples
    tensor: _C.Communicator | None  # of this stage
    receives: _C.Communicator | None  # of the pipeline: from the stage before ...
    sends: _C.Communicator | None  # ... and to the next one, by another thread of that one
    timeout: float = math.inf  # seconds that rank 0 waits for another that has work to do
    ways: tuple[_C.Communicator, ...] = ()  # these two, and what only other stages use: without this rank it would end

    def abort(self, error: BaseException) -> None:
        """End every wait of every rank's runtime with a GroupError that says what this rank has come to."""
        reason = line_of(error, self.plans)
        for way in (self.tensor, *self.ways, self.answers, self.plans):
            if way is not None:
                way.abort(reason)

    def close(self) -> None:
        """Leave those that are not the group's own."""
        self.answers.close()
        for way in self.ways:
            way.close()


def connect_runtime(group: Group) -> Links:
    """Collective. The links of this rank's runtime; `group` must be there as long as they are."""
    stage, stages = group.pipeline_rank, group.grid.pipeline_parallel_size
    answers = group.world.split(0, group.rank)
    # What goes from stage i to the next is on way i % 2 for both, so none is both received from and sent on.
    ways = [way for _ in range(2) if stages > 1 and (way := group.pipeline.split(0, stage)) is not None]
    assert answers is not None
    return Links(
        plans=group.world,
        answers=answers,
        sampler=(stages - 1) * group.grid.tensor_parallel_size,
        tensor=group.tensor if group.grid.tensor_parallel_size > 1 else None,
        receives=ways[(stage - 1) % 2] if stage > 0 else None,
        sends=ways[stage % 2] if stage < stages - 1 else None,
        timeout=group.timeout,
        ways=tuple(ways),
    )
