"""What sizes mean: how many KV blocks fit in the memory given, or when nobody says, and how fast they may move."""

from __future__ import annotations

import os
from pathlib import Path

from .config import MAX_BLOCKS, parse_size
from .types import InvalidRequest

_MEMORY_SHARE = 4  # a default pool takes at most one part in this many of the memory that is free
_SWAP_SPACE = 4 * 2**30  # bytes of the host pool when nobody says
_DEVICE_RESERVE = 20  # of a device's free memory, one part in so many stays free, for graphs and libraries, ...
_DEVICE_LEAST_RESERVE = 512 * 2**20  # ... and at least so many bytes, unless that is more than half
_SLOWEST_LINK = 2**20  # bytes a second: below, a block takes seconds


def pool_blocks(
    kv_cache_memory: str | int | None,
    block_bytes: int,
    *,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int,
    host_share: int = 1,
    ranks: int = 1,
) -> int:
    """Blocks of a KV pool of `kv_cache_memory` bytes (or `512M`, `4G`), rounded down to whole blocks.

    None: as many as `max_num_seqs` jobs of `max_model_len` tokens can fill, within a quarter of the memory available,
    though at least one; where so many share the host (`host_share`), within each one's part of that. A size that is
    given is that of each of the `ranks` of an engine on this host, which come together. Raises
    InvalidRequest when not even one block fits in the size given or in the memory available, or when the size is more
    than the memory available or than MAX_BLOCKS.
    """
    available = available_memory()
    if available is not None and block_bytes > available:
        raise InvalidRequest(
            "block_size",
            f"must be smaller than {block_size}: one KV block takes {block_bytes} bytes, and {available} are available",
        )
    if kv_cache_memory is not None:
        size = pool_size(kv_cache_memory, block_bytes)
        if available is not None and size * ranks > available:
            raise InvalidRequest(
                "kv_cache_memory",
                f"must fit in the memory available, {available // 2**20}M{_each(ranks)}, got {kv_cache_memory!r}",
            )
        return _checked_blocks("kv_cache_memory", size, block_bytes)
    useful = min(max_num_seqs * -(-max_model_len // block_size), MAX_BLOCKS)
    if available is None:
        return useful
    return max(1, min(useful, available // _MEMORY_SHARE // host_share // block_bytes))


def pool_size(kv_cache_memory: str | int, block_bytes: int) -> int:
    """Bytes of a KV pool of that size. Raises InvalidRequest when not even one block fits in it."""
    size = parse_size("kv_cache_memory", kv_cache_memory)
    if size < block_bytes:
        raise InvalidRequest(
            "kv_cache_memory", f"must hold at least one KV block of {block_bytes} bytes, got {kv_cache_memory!r}"
        )
    return size


def device_blocks(kv_cache_memory: str | int | None, block_bytes: int, *, free: int) -> int:
    """Blocks of a KV pool of `kv_cache_memory` bytes in a device's own memory, of which `free` bytes are left.

    None: as many as fit in what is left, less a part that the device may still need. Raises InvalidRequest when the
    size given, or one block, is more than is left, or when the size is more than MAX_BLOCKS.
    """
    usable = free - max(free // _DEVICE_RESERVE, min(free // 2, _DEVICE_LEAST_RESERVE))
    if usable < block_bytes:
        raise InvalidRequest(
            "kv_cache_memory",
            f"has no room: one KV block takes {block_bytes} bytes, and the device has {free // 2**20}M left",
        )
    if kv_cache_memory is None:
        return min(usable // block_bytes, MAX_BLOCKS)
    size = pool_size(kv_cache_memory, block_bytes)
    if size > usable:
        raise InvalidRequest(
            "kv_cache_memory",
            f"must fit in the {usable // 2**20}M that the device has left, got {kv_cache_memory!r}",
        )
    return _checked_blocks("kv_cache_memory", size, block_bytes)


def _each(ranks: int) -> str:
    return f" for {ranks} ranks" if ranks > 1 else ""


def host_blocks(
    swap_space: str | int | None, block_bytes: int, *, promised: int = 0, host_share: int = 1, ranks: int = 1
) -> int:
    """Blocks of a host pool of `swap_space` bytes (or `512M`, `4G`), rounded down to whole blocks; 0 for no such pool.

    None: 4 GiB, within a quarter of the memory available. `promised` bytes of that memory are somebody else's, though
    not yet touched: on a CPU, the device's pool; so much is of each of the engines that share the host (`host_share`),
    and so is its part of the quarter. Raises InvalidRequest when the size is more than what is left or than
    MAX_BLOCKS, or neither 0 nor enough for one block.
    """
    available = available_memory()
    left = None if available is None else max(0, available - promised * ranks)
    if swap_space is None:
        shared = None if available is None else max(0, available - promised * host_share)
        size = _SWAP_SPACE if shared is None else min(_SWAP_SPACE, shared // _MEMORY_SHARE // host_share)
        return min(size // block_bytes, MAX_BLOCKS)
    size = parse_size("swap_space", swap_space, zero=True)
    if 0 < size < block_bytes:
        raise InvalidRequest(
            "swap_space", f"must be 0 or hold at least one KV block of {block_bytes} bytes, got {swap_space!r}"
        )
    if left is not None and size * ranks > left:
        beside = f", beside the KV pool of {promised // 2**20}M" if promised else ""
        raise InvalidRequest(
            "swap_space",
            f"must fit in the memory available, {left // 2**20}M{_each(ranks)}{beside}, got {swap_space!r}",
        )
    return _checked_blocks("swap_space", size, block_bytes)


def _checked_blocks(option: str, size: int, block_bytes: int) -> int:
    """Whole blocks in `size` bytes. Raises InvalidRequest where they are more than are kept track of."""
    if size // block_bytes > MAX_BLOCKS:
        raise InvalidRequest(
            option,
            f"must be at most {MAX_BLOCKS * block_bytes} bytes, {MAX_BLOCKS} KV blocks of {block_bytes}; got {size}",
        )
    return size // block_bytes


def link_bandwidth(swap_bandwidth: str | int | None) -> int | None:
    """Bytes a second of `200M` or a plain number; None for a link that is not slowed down.

    Raises InvalidRequest below 1 MiB a second.
    """
    if swap_bandwidth is None:
        return None
    rate = parse_size("swap_bandwidth", swap_bandwidth)
    if rate < _SLOWEST_LINK:
        raise InvalidRequest("swap_bandwidth", f"must be at least 1M, in bytes a second, got {swap_bandwidth!r}")
    return rate


def available_memory() -> int | None:
    """Bytes this process could still take without swapping: what the machine has, within the container's limit.

    None where the system does not tell.
    """
    limits = [limit for limit in (_machine_memory(), _cgroup_memory()) if limit is not None]
    return max(0, min(limits)) if limits else None


def _machine_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _cgroup_memory() -> int | None:
    """What a container's limit leaves, in cgroup v2 or v1; None without a limit."""
    for folder, limit, used in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            return int((folder / limit).read_text()) - int((folder / used).read_text())
        except (OSError, ValueError):  # no such file, or the limit reads "max"
            continue
    return None
