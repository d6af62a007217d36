"""Who has had more than its share of the device's time: a clock of what a share comes to, and counters beside it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

# Whoever has had no job for so many seconds has no share any more.
_LATELY: Final = 60.0


class Entitlement:
    """Seconds of the device that a weight of 1 has been entitled to, and how far counters are beyond that.

    Shares are of those that have jobs and of those that had some lately: who comes back after a pause finds its share
    unspent by others. Who takes less than its share saves nothing up. Who takes more is beyond it once that is more
    than a `burst`, and is so until it has had less than its share for as long; but what is more than twice a burst is
    forgiven, or whoever had an idle device for itself would pay for that for ever.
    """

    def __init__(self, burst: float) -> None:
        """`burst`: seconds by weight."""
        self._burst = burst
        self._line = 0.0
        self._seconds: float | None = None  # of the device, when last heard of
        self._now = 0.0
        self._resting: OrderedDict[str, tuple[float, float]] = OrderedDict()  # since when and with which weight, by name
        self._weight = 0.0  # of those
        self.weight = 0.0  # of all that have shares

    @property
    def line(self) -> float:
        return self._line

    def advance(self, seconds: float, weight: float, now: float) -> None:
        """So many seconds there have been in all. `weight`: of those that have jobs."""
        self._now = max(self._now, now)
        while self._resting:
            name, (since, resting) = next(iter(self._resting.items()))
            if since + _LATELY > self._now:
                break
            del self._resting[name]
            self._weight -= resting
        if not self._resting:
            self._weight = 0.0  # exactly
        self.weight = weight + self._weight
        if self._seconds is not None and seconds > self._seconds and self.weight > 0:
            self._line += (seconds - self._seconds) / self.weight
        self._seconds = seconds if self._seconds is None else max(seconds, self._seconds)

    def rests(self, name: str, weight: float) -> None:
        """It has no jobs any more."""
        self._resting[name] = (self._now, weight)
        self._weight += weight

    def wakes(self, name: str) -> None:
        """It has some."""
        if (rested := self._resting.pop(name, None)) is not None:
            self._weight -= rested[1]

    def charged(self, counter: float, seconds: float) -> float:
        """The counter of one that has had so many seconds, by its weight, more."""
        return min(max(counter, self._line) + seconds, self._line + 2 * self._burst)

    def left(self, counter: float) -> float:
        """Seconds by weight until it is beyond its share; below 0: it is."""
        return self._line + self._burst - max(counter, self._line)

    def back(self, counter: float) -> float:
        """The line at which it is no longer."""
        return counter - self._burst
