"""Key-value memory: which job holds which blocks, in which tier, what they have in common, and what should move."""

from .audit import check_blocks
from .block import Block, first_unused
from .blocks import BlockManager, Done
from .counters import CacheCounters
from .swap import BurstReserve, Holder, LinkEstimate, Moves, Want, plan_moves
from .transfers import CopyRow

__all__ = [
    "Block",
    "BlockManager",
    "BurstReserve",
    "CacheCounters",
    "CopyRow",
    "Done",
    "Holder",
    "LinkEstimate",
    "Moves",
    "Want",
    "check_blocks",
    "first_unused",
    "plan_moves",
]
