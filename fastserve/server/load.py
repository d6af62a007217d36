"""How long one engine would take for a job more: what it said it has to do, what it was given since, and its speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from ..cost import CostModel
from ..ipc import Status

_HALF_LIFE: Final = 10.0  # seconds in iterations, after which what was measured of an engine's speed counts half
_TELLING: Final = 0.5  # seconds in iterations, before which it says nothing


def rows_of(info: Mapping[str, Any], limit: str = "max_num_seqs") -> int:
    """Jobs that can run at a time, by what an engine or several say of themselves: every stage has a batch."""
    return int(info.get(limit, info.get("max_num_seqs", 1))) * _stages(info)


def _stages(info: Mapping[str, Any]) -> int:
    return int(info.get("pipeline_parallel_size", 1))


class Work(NamedTuple):
    """What is left to do of a job."""

    known: int  # tokens of prompt and output that exist
    left: float  # tokens of output that are expected
    cached: int = 0  # of those that exist, the first that this engine need not compute


class Load:
    """Seconds until one engine would be done, if no other jobs came. Belongs to one event loop.

    Every Status brings the engine's own estimate of its backlog, by its own cost model; jobs that it did not know yet
    are added by that model, too. Divided by how fast the engine has been, compared with what the model says.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._cost = CostModel.constant(1.0)  # of an engine that tells none: jobs are counted
        self.rows = 1  # of the iterations under way at a time
        self._stages = 1  # of a pipeline: so many of those
        self._live = 0
        self._backlog = 0.0
        self._heard = clock()  # when it was so
        self._given: dict[int, float] = {}  # modelled seconds, by the key of each job that the Status does not know
        self._given_seconds = 0.0  # all of them
        self._modelled = self._busy = 0.0  # seconds in iterations, by the model and as they were
        self._told = (0.0, 0.0)  # both, by the last Status
        self._since = clock()  # when it last came or went
        self._loading = 0.0  # seconds that it took to come
        self._up = False

    # --- what happens ------------------------------------------------------------------------------------------------

    def came(self, info: Mapping[str, Any]) -> None:
        """The engine takes jobs. What it was given meanwhile is on its way to it."""
        cost = info.get("cost")
        if isinstance(cost, Mapping):
            self._cost = CostModel(**cost)
        self._stages = _stages(info)
        self.rows = rows_of(info)
        now = self._clock()
        self._up, self._loading, self._since, self._heard = True, now - self._since, now, now
        self._told = (0.0, 0.0)

    def went(self) -> None:
        """There is no engine from now on, and nothing that it had; another is being started."""
        self._up, self._since = False, self._clock()
        self._live, self._backlog = 0, 0.0
        self._given.clear()
        self._given_seconds = 0.0

    def said(self, status: Status, jobs: int) -> None:
        """What the engine knew of the `jobs` that it has; those it did not know are the last that it was given."""
        self._live, self._backlog, self._heard = status.live, status.backlog, self._clock()
        unknown = max(0, jobs - status.live)
        while len(self._given) > unknown:
            self.drop(next(iter(self._given)))
        modelled, busy = status.modelled_seconds - self._told[0], status.busy_seconds - self._told[1]
        self._told = (status.modelled_seconds, status.busy_seconds)
        kept = 0.5 ** (busy / _HALF_LIFE)
        self._modelled = self._modelled * kept + modelled
        self._busy = self._busy * kept + busy

    def take(self, key: int, work: Work) -> None:
        """The engine is given a job."""
        self._given[key] = self._seconds(work)
        self._given_seconds += self._given[key]

    def drop(self, key: int) -> bool:
        """A job has ended. False where the Status knew it: the next one will tell."""
        seconds = self._given.pop(key, None)
        self._given_seconds = self._given_seconds - (seconds or 0.0) if self._given else 0.0
        return seconds is not None

    def give_up(self, key: int, work: Work) -> None:
        """A job that is not begun is another engine's from now on."""
        if not self.drop(key):
            self._backlog = max(0.0, self._backlog - self._seconds(work))

    # --- what that means ---------------------------------------------------------------------------------------------

    @property
    def speed(self) -> float:
        """Of the engine, compared with its cost model: 1 where that is right."""
        return self._modelled / self._busy if self._busy >= _TELLING and self._modelled > 0.0 else 1.0

    def seconds(self, work: Work | None = None) -> float:
        """Until all is done that the engine has, and a job more if there is one.

        An engine that is down is expected to take as long as last time to come back; once that is over, as long again
        as it is overdue.
        """
        now = self._clock()
        todo = self._given_seconds + (self._seconds(work) if work is not None else 0.0)
        if not self._up:
            return abs(self._loading - (now - self._since)) + todo / self.speed
        return (max(0.0, self._backlog - (now - self._heard) * self.speed) + todo) / self.speed

    def _seconds(self, work: Work) -> float:
        """What a job adds, by the model: of what iterations cost whatever is in them it pays a part.

        Of a pipeline it takes one stage at a time.
        """
        cost, stages = self._cost, self._stages
        rows = -(-min(self.rows, self._live + len(self._given) + 1) // stages)
        alone = cost.prefill_seconds(work.cached, work.known - work.cached) + work.left * cost.decode_seconds(
            work.known
        )
        return (alone - (1 + work.left) * cost.per_iteration * (1 - 1 / rows)) / stages
