"""The KV pools' sizes when nobody says, and when somebody does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastserve import sizing
from fastserve.sizing import available_memory, host_blocks, link_bandwidth, pool_blocks
from fastserve.types import InvalidRequest

LIMITS = {"block_size": 16, "max_num_seqs": 4, "max_model_len": 100}  # 4 jobs of 7 blocks


def test_the_default_holds_every_context_within_a_quarter_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory, blocks in ((10**6, 28), (28_000 * 4, 28), (28_000 * 4 - 1, 27), (1000, 1), (None, 28)):
        monkeypatch.setattr(sizing, "available_memory", lambda memory=memory: memory)
        assert pool_blocks(None, 1000, **LIMITS) == blocks


def test_engines_that_share_a_host_have_a_part_of_it_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_memory", lambda: 28_000 * 4)
    assert pool_blocks(None, 1000, **LIMITS, host_share=2) == 14
    assert pool_blocks("20K", 1000, **LIMITS, host_share=2) == 20, "what is given is of each"
    monkeypatch.setattr(sizing, "available_memory", lambda: 40_000)
    # What is left of 40,000 when each of two has its 4,000 is 32,000, of which a quarter is for both.
    assert host_blocks(None, 1000, promised=4000, host_share=2) == 4
    assert host_blocks("20K", 1000, promised=4000, host_share=2) == 20


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


def test_the_default_swap_space_is_four_gibibytes_within_a_quarter_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    four = 4 * 2**30
    for memory, promised, size in (
        (None, 10**12, four),
        (100 * 2**30, 0, four),
        (100 * 2**30, 92 * 2**30, 2 * 2**30),
        (8000, 0, 2000),
        (8000, 9000, 0),
    ):
        monkeypatch.setattr(sizing, "available_memory", lambda memory=memory: memory)
        assert host_blocks(None, 1000, promised=promised) == size // 1000


def test_a_given_swap_space_is_honoured_to_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_memory", lambda: 2**20)
    assert host_blocks("64K", 1000) == host_blocks(65536, 1000) == 65
    assert [host_blocks(size, 1000) for size in (1000, 1999, 2000, "1M", 2**20)] == [1, 1, 2, 1048, 1048]
    assert host_blocks("1M", 1000, promised=0) == host_blocks("512K", 500, promised=2**19) == 1048
    for none in (0, "0", "0G"):
        assert host_blocks(none, 1000) == host_blocks(none, 2**40, promised=2**40) == 0


def test_a_swap_space_that_cannot_be_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_memory", lambda: 2**20)
    for size in (1, 999, 2**20 + 1, "2M", "-1", -1, "four", 65536.0, True, "9" * 400 + "T"):
        with pytest.raises(InvalidRequest, match="swap_space: must"):
            host_blocks(size, 1000)
    with pytest.raises(InvalidRequest, match="memory available, 0M, beside the KV pool of 1M, got '1M'"):
        host_blocks("1M", 1000, promised=2**20)
    monkeypatch.setattr(sizing, "available_memory", lambda: None)
    assert host_blocks("1T", 2**30) == 1024


def test_no_size_makes_more_blocks_than_are_kept_track_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_memory", lambda: 2**40)
    many = {"block_size": 1, "max_num_seqs": 2**16, "max_model_len": 2**20}
    assert pool_blocks(None, 100, **many) == pool_blocks(2**24 * 100 + 99, 100, **many) == 2**24
    assert host_blocks(None, 100) == host_blocks(2**24 * 100 + 99, 100) == 2**24
    with pytest.raises(InvalidRequest, match="kv_cache_memory: must be at most 1677721600 bytes, 16777216 KV blocks"):
        pool_blocks("1.6G", 100, **many)
    with pytest.raises(InvalidRequest, match="swap_space: must be at most 1677721600 bytes, 16777216 KV blocks of 100"):
        host_blocks("1.6G", 100)


def test_a_throttle_is_a_size_of_at_least_a_mebibyte_a_second() -> None:
    assert [link_bandwidth(rate) for rate in (None, "1M", 2**20, "1.5G")] == [None, 2**20, 2**20, 3 * 2**29]
    for rate in (0, "0", 2**20 - 1, "1023K", "fast", 2.0**30):
        with pytest.raises(InvalidRequest, match="swap_bandwidth: must be"):
            link_bandwidth(rate)  # type: ignore[arg-type]


def test_available_memory_is_within_the_machines() -> None:
    memory = available_memory()
    assert memory is not None
    total = re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert total is not None and 0 < memory <= 1024 * int(total[1])
