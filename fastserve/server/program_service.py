"""What programs were served in calls that have ended, in whichever engine: it outlasts engines."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from ..origin import Origin
from .jobs import OpenJob

# Programs that are remembered, those that called last.
_MOST: Final = 65_536


class ProgramService:
    """Programs are told apart within a tenant. O(1) an event."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[tuple[str, str], float] = OrderedDict()

    def of(self, origin: Origin) -> float:
        """Modelled solo seconds that the earlier calls of a request's program were served."""
        return 0.0 if origin.program is None else self._seconds.get((origin.tenant, origin.program), 0.0)

    def ended(self, job: OpenJob) -> None:
        """A job has ended. What one had that was closed, or whose engine was lost at its end, nobody knows."""
        program = job.origin.program
        if program is None or job.metrics is None:
            return
        key = job.origin.tenant, program
        self._seconds[key] = self._seconds.pop(key, 0.0) + job.metrics.service_seconds
        if len(self._seconds) > _MOST:
            self._seconds.popitem(last=False)
