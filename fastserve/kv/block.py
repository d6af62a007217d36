"""One KV block: where it is, who has it, and what it holds where others may want that too."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from .few import Few

NOWHERE: Final = -1


class Block:
    """The KV of `block_size` tokens, in a place on the device, on the host, or in both.

    There are as many as memory has places, and one is made whenever a job grows: hence the bare class.
    """

    __slots__ = (
        "accounts", "below", "children", "cost", "counted", "device", "host", "keep", "key",
        "parent", "score", "stays", "tables", "tokens", "transfer", "used", "uses",
    )  # fmt: skip

    def __init__(self, device: int, tables: Few[Table]) -> None:
        self.device = device  # NOWHERE: it is away
        self.host = NOWHERE  # NOWHERE: no copy there
        self.tables = tables  # of its owners, whose tables all have its parent; none: it is cache, or moving
        self.transfer: int | None = None  # its direction
        self.stays = False  # while it is offloaded: it is wanted again, and keeps its place on the device
        self.key: bytes | None = None  # None: not in the index, and has nothing of what `enter` gives it

    def enter(
        self, key: bytes, tokens: bytes, parent: Block | None, cost: float, accounts: tuple[str, ...] = ()
    ) -> None:
        """Be in the cache's index (see cache.py): all of it holds KV, and none of it will change."""
        self.key, self.tokens = key, tokens
        self.parent = parent  # what it goes on from; None: it begins a prompt
        self.children: Few[Block] = ()
        self.below = 0  # children that are on the device, and not moving
        self.counted = False  # in the `below` of its parent
        self.accounts = accounts  # that it counts for while nobody has it; those of all on its path are the same
        self.cost = cost  # seconds of computing it again
        self.uses = 0
        self.score = 0.0  # what it is worth; never more than its parent's
        self.used = 0  # when that was last said of it
        self.keep = 0.0  # until when it is sure to be wanted

    @property
    def here(self) -> bool:
        """Whether an iteration can read it."""
        return self.device != NOWHERE and self.transfer is None


def first_unused(path: Sequence[Block]) -> int:
    """Where the blocks of a path begin that nobody has: whoever has one has those before it."""
    return bisect_left(path, True, key=lambda block: not block.tables)


@dataclass(slots=True, eq=False)
class Table:
    """One owner's blocks, by position / block_size. The first `shared` are the index's."""

    owner: int
    accounts: tuple[str, ...] = ()  # that its blocks count for; those of all who share a block are the same
    blocks: list[Block] = field(default_factory=list)
    missing: int = 0  # blocks that are away or moving: with any, the owner cannot run
    moving: int = 0  # blocks in transfer
    gone: bool = False  # whether none is on the device or moving
    shared: int = 0
    diverged: bool = False  # another owner has computed the same block: what follows is not for the index meanwhile
    alone: tuple[Table, ...] = ()  # itself: the tables of a block that only it has

    def __post_init__(self) -> None:
        self.alone = (self,)
