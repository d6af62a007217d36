"""Whether the books of the blocks balance: for tests. O(everything)."""

from __future__ import annotations

from ..types import OFFLOAD, UPLOAD
from .block import NOWHERE, Block
from .blocks import BlockManager


def check_blocks(manager: BlockManager) -> None:
    """Raise RuntimeError unless every block of both tiers is in exactly one place, every reference to one is counted,
    and the counters are true."""
    tables, transfers = manager._tables, manager._transfers.under_way
    owned = {block for table in tables.values() for block in table.blocks}
    moving = {block for transfer in transfers.values() for block in transfer.blocks}
    every = owned | moving | set(manager.cache._index.values())
    device = manager._places.free.tolist() + [block.device for block in every if block.device != NOWHERE]
    host = list(manager._places.free_host) + [block.host for block in every if block.host != NOWHERE]
    for places, count, where in ((device, manager.num_blocks, "device"), (host, manager.num_host_blocks, "host")):
        if sorted(places) != list(range(count)):
            raise RuntimeError(f"blocks of the {where} lost or doubled: {len(places)} places for {count} blocks")
    references: dict[Block, list[int]] = {}
    for table in tables.values():
        for block in table.blocks:
            references.setdefault(block, []).append(table.owner)
        if (
            table.missing != sum(not block.here for block in table.blocks)
            or table.moving != sum(block.transfer is not None for block in table.blocks)
            or any(block.key is None for block in table.blocks[: table.shared])
            or any(len(block.tables) > 1 for block in table.blocks[table.shared :])
        ):
            raise RuntimeError(f"the table of owner {table.owner} is out of step: {table}")
    for block in every:
        if sorted(references.get(block, [])) != sorted(table.owner for table in block.tables):
            raise RuntimeError(f"a block counts other owners than it has: {block}")
        if (block.transfer is not None) != (block in moving) or (block.device == block.host == NOWHERE):
            raise RuntimeError(f"a block is nowhere, or moves without a copy: {block}")
    for transfer in transfers.values():
        if any(block.transfer != transfer.direction for block in transfer.blocks) or (
            transfer.direction == UPLOAD and any(block.stays for block in transfer.blocks)
        ):
            raise RuntimeError(f"a copy moves blocks that know nothing of it: {transfer}")
    accounts: dict[str, int] = {}
    for block in every:
        for account in next(iter(block.tables)).accounts if block.tables and block.device != NOWHERE else ():
            accounts[account] = accounts.get(account, 0) + 1
        whose = {table.accounts for table in block.tables} | ({block.accounts} if block.key is not None else set())
        if len(whose) > 1:
            raise RuntimeError(f"a block is shared by owners of other accounts: {block}")
    if accounts != manager.accounts:
        raise RuntimeError(f"accounts hold {accounts}, and are taken to hold {manager.accounts}")
    spare = {
        block
        for block in every
        if block.here and block.host != NOWHERE and not any(table.missing for table in block.tables)
    }
    leaving = sum(block.transfer == OFFLOAD and not block.stays for block in moving)
    gone = sum(table.missing - table.moving == len(table.blocks) for table in tables.values())
    partial = {table.owner for table in tables.values() if 0 < table.missing < len(table.blocks)}
    if (spare, leaving, gone, partial) != (
        set(manager._places.spare),
        manager.leaving,
        manager.gone,
        set(manager.partial),
    ):
        raise RuntimeError(
            f"{len(spare)} spare copies, {leaving} leaving blocks or {gone} absent owners: not as counted"
        )
    manager.cache.check_integrity()
