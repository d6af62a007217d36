"""One KV block: where it is, who has it, and what it holds where others may want that too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

NOWHERE: Final = -1


@dataclass(slots=True, eq=False)
class Block:
    """The KV of `block_size` tokens, in a place on the device, on the host, or in both."""

    device: int  # NOWHERE: it is away
    host: int = NOWHERE  # NOWHERE: no copy there
    tables: list[Table] = field(default_factory=list)  # of the owners that have it; none: it is cache, or moving
    transfer: int | None = None  # its direction
    stays: bool = False  # while it is offloaded: it is wanted again, and keeps its place on the device
    # Of a block in the cache's index (see cache.py). All of it holds KV, and none of it will change.
    key: bytes | None = None  # None: not in the index
    tokens: bytes = b""
    parent: Block | None = None  # what it goes on from; None: it begins a prompt
    children: set[Block] = field(default_factory=set)
    below: int = 0  # children that are on the device, and not moving
    counted: bool = False  # in the `below` of its parent
    cost: float = 0.0  # seconds of computing it again
    uses: int = 0
    score: float = 0.0  # what it is worth; never more than its parent's
    used: int = 0  # when that was last said of it
    keep: float = 0.0  # until when it is sure to be wanted

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
