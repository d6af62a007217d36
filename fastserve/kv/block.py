"""One KV block: where it is, who has it, and what it holds where others may want that too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

NOWHERE: Final = -1


class Block:
    """The KV of `block_size` tokens, in a place on the device, on the host, or in both.

    There are as many as memory has places, and one is made whenever a job grows: hence the bare class.
    """

    # fmt: off
    __slots__ = (
        "device",  # NOWHERE: it is away
        "host",  # NOWHERE: no copy there
        "tables",  # of the owners that have it; none: it is cache, or moving
        "transfer",  # its direction, or None
        "stays",  # while it is offloaded: it is wanted again, and keeps its place on the device
        # Of a block in the cache's index (see cache.py): all of it holds KV, and none of it will change.
        "key",  # None: not in the index, and what follows is not there
        "tokens",
        "parent",  # what it goes on from; None: it begins a prompt
        "children",
        "below",  # children that are on the device, and not moving
        "counted",  # in the `below` of its parent
        "cost",  # seconds of computing it again
        "uses",
        "score",  # what it is worth; never more than its parent's
        "used",  # when that was last said of it
        "keep",  # until when it is sure to be wanted
    )
    # fmt: on

    def __init__(self, device: int, tables: tuple[Table, ...]) -> None:
        self.device = device
        self.host = NOWHERE
        self.tables = tables
        self.transfer: int | None = None
        self.stays = False
        self.key: bytes | None = None

    def enter(self, key: bytes, tokens: bytes, parent: Block | None, cost: float) -> None:
        """Be in the index from here on."""
        self.key, self.tokens, self.parent, self.cost = key, tokens, parent, cost
        self.children: set[Block] = set()
        self.below = 0
        self.counted = False
        self.uses = self.used = 0
        self.score = self.keep = 0.0

    @property
    def here(self) -> bool:
        """Whether an iteration can read it."""
        return self.device != NOWHERE and self.transfer is None


@dataclass(slots=True, eq=False)
class Table:
    """One owner's blocks, by position / block_size. The first `shared` are the index's."""

    owner: int
    blocks: list[Block] = field(default_factory=list)
    missing: int = 0  # blocks that are away or moving: with any, the owner cannot run
    moving: int = 0  # blocks in transfer
    gone: bool = False  # whether none is on the device or moving
    shared: int = 0
    diverged: bool = False  # another owner has computed the same block: what follows is not for the index meanwhile
    alone: tuple[Table, ...] = ()  # itself: the tables of a block that only it has

    def __post_init__(self) -> None:
        self.alone = (self,)
