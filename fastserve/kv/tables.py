"""Which blocks each owner has, and how many of them are where."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from .block import NOWHERE, Block, Table


class Tables:
    """The tables of all owners that have blocks, and what is counted of them. An owner without a table has none."""

    def __init__(self) -> None:
        self.gone = 0  # owners without a block on the device, though they have some
        self.partial: dict[int, None] = {}  # those with some on the device, and others not
        self.accounts: dict[str, int] = {}  # blocks on the device that owners have, by account; none is 0
        self._tables: dict[int, Table] = {}

    def owners(self) -> set[int]:
        """Those that have blocks."""
        return set(self._tables)

    def held(self, owner: int) -> int:
        """How many blocks the owner has, wherever they are."""
        table = self._tables.get(owner)
        return len(table.blocks) if table else 0

    def missing(self, owner: int) -> int:
        """How many of the owner's blocks are not on the device, or on their way to or from it; 0: it can run."""
        table = self._tables.get(owner)
        return table.missing if table else 0

    def moving(self, owner: int) -> int:
        """How many of the owner's blocks are in transfer."""
        table = self._tables.get(owner)
        return table.moving if table else 0

    def away(self, owner: int) -> int:
        """How many of the owner's blocks are on the host only, and not in transfer."""
        table = self._tables.get(owner)
        return table.missing - table.moving if table else 0

    def leavable(self, owner: int) -> tuple[int, int]:
        """How many blocks would leave the device with the owner, and how many of them need a copy."""
        table = self._tables.get(owner)
        blocks = leavable(table) if table else []
        return len(blocks), sum([block.host == NOWHERE for block in blocks])

    def table(self, owner: int) -> list[tuple[int, int]]:
        """The owner's whole table, which is on the device, as (index, block)."""
        table = self._tables.get(owner)
        return [(index, block.device) for index, block in enumerate(table.blocks)] if table else []

    def path(self, owner: int) -> list[Block]:
        """Those of the owner's blocks that are in the index."""
        table = self._tables.get(owner)
        return table.blocks[: table.shared] if table else []

    def shared(self, owner: int) -> int:
        """How many of the owner's blocks are in the index."""
        table = self._tables.get(owner)
        return table.shared if table else 0

    def common(self, owner: int) -> int:
        """How many of the owner's blocks, from the first on, others have, too."""
        table = self._tables.get(owner)
        if table is None:
            return 0
        # Who has a block has those before it as well.
        return bisect_left(table.blocks, True, key=lambda block: len(block.tables) == 1)

    def _count(self, table: Table, blocks: int) -> None:
        """So many more blocks on the device are the owner's, and were nobody's, or came back."""
        for account in table.accounts:
            held = self.accounts.get(account, 0) + blocks
            if held:
                self.accounts[account] = held
            else:
                self.accounts.pop(account, None)

    def _added(self, table: Table) -> None:
        self._tables[table.owner] = table

    def _removed(self, owner: int) -> Table | None:
        table = self._tables.pop(owner, None)
        if table is not None:
            self.gone -= table.gone
            self.partial.pop(owner, None)
        return table

    def _changed(self, tables: Iterable[Table], missing: int = 0, moving: int = 0) -> None:
        """So many more blocks of these are missing, or moving."""
        for table in tables:
            table.missing += missing
            table.moving += moving
            self._classify(table)

    def _classify(self, table: Table) -> None:
        """Whether the owner has all, some or none of its blocks on the device."""
        gone = table.missing - table.moving == len(table.blocks)
        self.gone += gone - table.gone
        table.gone = gone
        if 0 < table.missing < len(table.blocks):
            self.partial[table.owner] = None
        else:
            self.partial.pop(table.owner, None)


def leavable(table: Table) -> list[Block]:
    """Blocks on the device that nobody else needs there: others that have them lack some of theirs."""
    return [
        block
        for block in table.blocks
        if block.here and (len(block.tables) == 1 or all(each is table or each.missing for each in block.tables))
    ]
