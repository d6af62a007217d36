"""What leaves the prefix cache first, and what a decision costs that looks at it."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from toy import VOCAB, Toy, piece

from fastserve.kv import Block, BlockManager, check_blocks
from fastserve.kv.cache import PrefixCache
from fastserve.types import BatchPlan, SamplingParams


def test_what_was_used_often_gives_way_in_time_though_nothing_was_thrown_away_meanwhile() -> None:
    cache = PrefixCache(places=8)
    old, other, new = (Block(place, ()) for place in range(3))
    for block, name in ((old, b"old"), (other, b"other"), (new, b"new")):
        assert cache.insert(block, name, name, None, cost=1.0)
    for _ in range(16):
        cache.touch([old], hit=True)
    for _ in range(200):  # as many as would have filled the memory 25 times
        cache.touch([other], hit=True)
    cache.touch([new])
    for block in (old, new):
        cache.rests(block)
    assert cache.coldest() is old


def cache_on_host(blocks: BlockManager, name: bytes, cost: float, keep: float) -> None:
    """Have a block in the cache that is on the host alone."""
    blocks.grow(1, 4)
    blocks.bequeath(1, [(name, name, cost)], keep)
    blocks.release(1)
    for copy, *_ in blocks.save(1):
        blocks.acknowledge(copy)
    blocks.grow(2, 4 * blocks.num_blocks)
    blocks.release(2)
    check_blocks(blocks)


def test_what_is_sure_to_be_wanted_leaves_the_host_last() -> None:
    for kept in (False, True):
        blocks = BlockManager(num_blocks=2, block_size=4, num_host_blocks=2)
        cache_on_host(blocks, b"agent", 1.0, keep=100.0 if kept else 0.0)
        cache_on_host(blocks, b"other", 50.0, keep=0.0)
        assert blocks.cached_host == 2
        blocks.grow(3, 4)
        blocks.offload(3, 1)
        assert (blocks.cache.find(b"agent", b"agent", None) is not None) is kept
        assert (blocks.cache.find(b"other", b"other", None) is not None) is not kept
        check_blocks(blocks)


def test_until_then_and_no_longer() -> None:
    blocks = BlockManager(num_blocks=2, block_size=4, num_host_blocks=2)
    cache_on_host(blocks, b"agent", 1.0, keep=100.0)
    cache_on_host(blocks, b"other", 50.0, keep=0.0)
    blocks.cache.expire(100.0)
    blocks.grow(3, 4)
    blocks.offload(3, 1)
    assert blocks.cache.find(b"agent", b"agent", None) is None
    check_blocks(blocks)


def test_thousands_may_have_a_block_and_leave_it_in_any_order() -> None:
    blocks = BlockManager(num_blocks=4, block_size=4)
    blocks.grow(0, 8)
    blocks.share(0, [(b"a", b"a", 1.0), (b"b", b"b", 1.0)])
    for owner in range(1, 3000):
        blocks.attach(owner, blocks.path(0))
    assert blocks.common(0) == 2 and blocks.leavable(0) == (0, 0)
    for owner in (*range(0, 3000, 2), *range(2999, 1, -2)):
        assert blocks.release(owner) == 2
        if owner % 500 == 0:
            check_blocks(blocks)
    assert (blocks.owners(), blocks.free_blocks, blocks.common(1)) == ({1}, 2, 0)
    blocks.release(1)
    assert blocks.cached == 2
    check_blocks(blocks)


def calls_of_a_decision(path: int) -> int:
    """Python's function calls in one that finds that a job has so many blocks in the cache and no room to start."""
    sizes = {"block_size": 4, "num_blocks": path + 24, "max_num_batched_tokens": 8 * path, "max_model_len": 8 * path}
    world = Toy(policy="fcfs", max_num_seqs=2, enable_prefix_caching=True, **sizes)

    def ask(name: str, prompt: list[int], output: int) -> None:
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        world.engine.add_job(name, prompt, params, seed=0, vocab_size=VOCAB)

    common = piece(0, 4 * path)
    ask("before", common, 1)
    world.run()
    ask("runs", piece(1, 32), 12)
    world.engine.step()
    ask("waits", common + piece(2, 80), 1)
    world.engine.step()
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    scheduler = world.engine.scheduler
    schedule = scheduler.schedule

    def counted(now: float) -> BatchPlan | None:
        sys.setprofile(count)
        try:
            return schedule(now)
        finally:
            sys.setprofile(None)

    scheduler.schedule = counted  # type: ignore[method-assign]
    scheduler.batches.changed()
    world.engine.step()
    (job,) = [job for job in world.engine.jobs if job.job_id == "waits"]
    assert job.cached == 4 * path and job.slot is None
    return calls


def test_a_job_that_waits_costs_a_decision_the_same_however_much_of_it_is_cached() -> None:
    assert calls_of_a_decision(512) < calls_of_a_decision(32) + 60
