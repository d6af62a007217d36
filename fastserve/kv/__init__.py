"""Key-value memory: which job holds which blocks, in which tier, and which should move."""

from .blocks import BlockManager, CopyRow
from .counters import CacheCounters
from .swap import BurstReserve, Holder, LinkEstimate, Moves, Want, plan_moves

__all__ = [
    "BlockManager",
    "BurstReserve",
    "CacheCounters",
    "CopyRow",
    "Holder",
    "LinkEstimate",
    "Moves",
    "Want",
    "plan_moves",
]
