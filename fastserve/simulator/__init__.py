"""The real engine on a virtual clock: `simulate` runs a workload, `replay` runs a recorded one again."""

from .executor import SimExecutor, VirtualClock
from .replay import Recorder, Recording, ReplayDiverged, plan_digest, replay
from .run import SimulationTotals, simulate

__all__ = [
    "Recorder",
    "Recording",
    "ReplayDiverged",
    "SimExecutor",
    "SimulationTotals",
    "VirtualClock",
    "plan_digest",
    "replay",
    "simulate",
]
