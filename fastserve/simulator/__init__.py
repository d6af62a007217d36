"""The real engine on a virtual clock: `simulate` runs a workload, `replay` runs a recorded one again."""

from .executor import SimExecutor, VirtualClock
from .run import SimulationTotals, simulate

__all__ = [
    "SimExecutor",
    "SimulationTotals",
    "VirtualClock",
    "simulate",
]
