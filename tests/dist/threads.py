"""Ranks as threads of one process: each joins the same shared memory, as processes would."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from fastserve import _C


def each_rank(
    size: int,
    body: Callable[[_C.Communicator], Any],
    machines: Sequence[int] | None = None,
    timeout: float = 60.0,
) -> list[Any]:
    """What `body` returns or raises on each rank. `machines`: as if rank r were on machine machines[r]."""
    memory = _C.SharedMemory(size)
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        try:
            communicator = _C.join_shared_memory(memory.path, rank, size, timeout=timeout)
            if machines is not None:
                communicator = _C.as_if_across_hosts(communicator, machines)
            results[rank] = body(communicator)
            communicator.close()
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def each_rank_well(
    size: int, body: Callable[[_C.Communicator], Any], machines: Sequence[int] | None = None
) -> list[Any]:
    """The same; raises what one of them raised."""
    results = each_rank(size, body, machines)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
