"""The KV pool's size when nobody says, and when somebody does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastserve import sizing
from fastserve.sizing import available_memory, pool_blocks
from fastserve.types import InvalidRequest

LIMITS = {"block_size": 16, "max_num_seqs": 4, "max_model_len": 100}  # 4 jobs of 7 blocks


def test_the_default_holds_every_context_within_a_quarter_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory, blocks in ((10**6, 28), (28_000 * 4, 28), (28_000 * 4 - 1, 27), (1000, 1), (None, 28)):
        monkeypatch.setattr(sizing, "available_memory", lambda memory=memory: memory)
        assert pool_blocks(None, 1000, **LIMITS) == blocks


def test_a_given_size_is_rounded_down_to_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_memory", lambda: 2**20)
    assert pool_blocks("64K", 1000, **LIMITS) == pool_blocks(65536, 1000, **LIMITS) == 65
    for size in (999, "2M", "0", "-1", "four", 65536.0, True, "9" * 400 + "T"):
        with pytest.raises(InvalidRequest, match="kv_cache_memory"):
            pool_blocks(size, 1000, **LIMITS)


def test_memory_that_holds_no_block_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_memory", lambda: 999)
    for size in (None, 1000):
        with pytest.raises(InvalidRequest, match="block_size: must be smaller than 16: one KV block takes 1000 bytes"):
            pool_blocks(size, 1000, **LIMITS)


def test_available_memory_is_within_the_machines() -> None:
    memory = available_memory()
    assert memory is not None
    total = re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert total is not None and 0 < memory <= 1024 * int(total[1])
