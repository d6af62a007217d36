"""What tenants are served on average, by their weights, and how far ahead of that each of them is."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

# Whoever has had no job for so many seconds does not count any more.
_LATELY: Final = 60.0


class Average:
    """A counter beside those of tenants: it goes up by all that is served, over all weights.

    It is of those that have jobs and of those that had some lately, who are served nothing: who sends a job now and
    then, is thought of as somebody who takes little, and not as one that comes and goes. These weigh no more than those
    that have jobs, or who always comes by another name would leave little to who stays.
    """

    def __init__(self, most: float) -> None:
        """`most`: seconds. What anybody is further ahead is forgiven, or whoever had an idle device for
        itself would pay for that for ever; what anybody is further behind is lost, or who asks for
        little would save up."""
        self.now = 0.0
        self.seconds = 0.0  # that a weight of 1 was served
        self._busy = self._idle = 0.0  # weights of those that have jobs, and of the others
        self._most = most
        self._resting: OrderedDict[str, tuple[float, float]] = OrderedDict()  # since when, and their weights

    def rests(self, name: str, weight: float) -> None:
        """Somebody has no jobs any more."""
        self._resting[name] = self.now, weight
        self._idle += weight
        self._busy -= weight

    def wakes(self, name: str, weight: float) -> None:
        """It has some."""
        self._busy += weight
        if self._resting.pop(name, None) is not None:
            self._idle -= weight

    def forget(self, now: float) -> None:
        """Those that had some lately, and not any more. The others are all there are, then."""
        self.now = max(self.now, now)
        while self._resting:
            name, (since, weight) = next(iter(self._resting.items()))
            if since + _LATELY > self.now:
                return
            del self._resting[name]
            self._idle = self._idle - weight if self._resting else 0.0

    def serve(self, counter: float, seconds: float, weight: float) -> float:
        """The counter of one that was served so many seconds more."""
        self.seconds += seconds / self.weight
        most = self._most / weight
        return min(max(counter + seconds / weight, self.seconds - most), self.seconds + most)

    @property
    def resting(self) -> int:
        """How many had some lately, and have none now."""
        return len(self._resting)

    @property
    def weight(self) -> float:
        """Of all that count."""
        return self._busy + min(self._busy, self._idle)
