"""When jobs arrive. A process is written for one job a second and stretched to the rate asked for.

So the same seed gives the same pattern at every rate: arrivals only move closer together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .checks import check_count, check_real

Floats = npt.NDArray[np.float64]


class Arrivals(Protocol):
    """A stationary arrival process of one job a second on average."""

    @property
    def name(self) -> str:
        """As `parse_arrivals` reads it."""

    def gaps(self, rng: np.random.Generator, first: int, count: int) -> Floats:
        """Seconds from job first + i to the one after it, for i below count."""


@dataclass(frozen=True, slots=True)
class Gamma:
    """Independent gaps from a Gamma distribution with this coefficient of variation.

    1 is Poisson, more is burstier, 0 is a job every second. Raises InvalidRequest outside 0 … 100.
    """

    cv: float

    def __post_init__(self) -> None:
        check_real("arrivals", "the coefficient of variation of gamma", self.cv, 0.0, 100.0)

    @property
    def name(self) -> str:
        return f"gamma:{self.cv:g}"

    def gaps(self, rng: np.random.Generator, first: int, count: int) -> Floats:
        if self.cv == 0:
            return np.ones(count)
        return rng.gamma(self.cv**-2, self.cv**2, count)


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent exponential gaps."""

    name: str = "poisson"

    def gaps(self, rng: np.random.Generator, first: int, count: int) -> Floats:
        return rng.exponential(1.0, count)


@dataclass(frozen=True, slots=True)
class Bursts:
    """`size` jobs at once every `size` seconds. Raises InvalidRequest for a size below 1."""

    size: int

    def __post_init__(self) -> None:
        check_count("arrivals", "the size of a burst", self.size)

    @property
    def name(self) -> str:
        return f"burst:{self.size}"

    def gaps(self, rng: np.random.Generator, first: int, count: int) -> Floats:
        last_of_burst = (np.arange(first, first + count) + 1) % self.size == 0
        return np.where(last_of_burst, float(self.size), 0.0)
