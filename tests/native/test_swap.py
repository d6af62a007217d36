"""Copies between device and host: what moves, what is told of it and when, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from machines import DEVICES
from synthetic import VOCAB, SyntheticModel, gpt_spec, llama_spec, plan

from fastserve import _C
from fastserve.config import RuntimeConfig
from fastserve.loaders.spec import ModelSpec
from fastserve.native import NativeRuntime, block_bytes
from fastserve.profiler import measure_link
from fastserve.types import OFFLOAD, UPLOAD, BatchPlan, StepResult

SPEC = llama_spec(num_layers=1)
BLOCK = 4  # token slots
BYTES = block_bytes(SPEC, "float32", BLOCK)
OTHER = [i * 7 % VOCAB for i in range(16)]  # what another job's prompt writes over a block

Copy = tuple[int, int, Sequence[tuple[int, int]]]  # id, direction, (source, destination) blocks


def _runtime(
    blocks: int = 8,
    host_blocks: int = 8,
    bandwidth: int | None = None,
    spec: ModelSpec = SPEC,
    device: str = "cpu",
) -> NativeRuntime:
    return NativeRuntime(
        SyntheticModel(spec),
        RuntimeConfig(
            dtype="float32",
            device=device,
            block_size=BLOCK,
            num_blocks=blocks,
            num_host_blocks=host_blocks,
            swap_bandwidth=bandwidth,
            max_num_batched_tokens=max(64, blocks * BLOCK),
            threads=2,
        ),
    )


def _with_copies(base: BatchPlan, *copies: Copy) -> BatchPlan:
    rows = [(copy, direction, *pair) for copy, direction, pairs in copies for pair in pairs]
    base.copies = np.array(rows, np.int32).reshape(-1, 4)
    return base


def _copying(plan_id: int, *copies: Copy) -> BatchPlan:
    return _with_copies(plan(plan_id, [], []), *copies)


def _poll(runtime: NativeRuntime) -> StepResult:
    result = runtime.poll(60.0)
    assert result is not None, "a plan is stuck"
    return result


def _do(runtime: NativeRuntime, *copies: Copy) -> None:
    """Make copies and wait for all of them."""
    runtime.submit(_copying(0, *copies))
    waiting = {copy for copy, *_ in copies}
    while True:
        waiting -= set(_poll(runtime).copies.tolist())
        if not waiting:
            return
        runtime.submit(_copying(0))


def _fill(runtime: NativeRuntime, blocks: int) -> None:
    """One long prompt writes keys and values of its own into every block of the device."""
    count = blocks * BLOCK
    tokens = np.random.default_rng(blocks).integers(0, VOCAB, count).tolist()
    runtime.submit(
        plan(0, [(0, 0, count, 0)], tokens, opened=[(0, count)], table=[(0, block, block) for block in range(blocks)])
    )
    _poll(runtime)
    runtime.submit(plan(0, [], [], closed=[0]))
    _poll(runtime)


def _read(runtime: NativeRuntime, *, host: bool, block: int) -> bytes:
    return runtime._runtime.read_block(host, block)


def _job(runtime: NativeRuntime, *, swaps: bool) -> tuple[list[int], list[bytes]]:
    """Tokens and logits of a prompt and six outputs. Before the third it is offloaded, its blocks are overwritten by
    another job's, and it comes back to other blocks; before the fifth, into those it had first."""
    prompt = [(5 * i + 2) % VOCAB for i in range(10)]
    homes = ([6, 1, 3, 4], [2, 7, 5, 0])
    step = plan(0, [(0, 0, 10, 1)], prompt, opened=[(0, 10)], table=[(0, i, block) for i, block in enumerate(homes[0])])
    tokens, logits = [], []
    for output in range(6):
        if swaps and output in (2, 4):
            old, new = homes if output == 2 else homes[::-1]
            host = [3, 4, 0, 7]
            _do(runtime, (output, OFFLOAD, list(zip(old, host, strict=True))))
            over = [(1, i, block) for i, block in enumerate(old)]
            runtime.submit(plan(0, [(1, 0, 16, 0)], OTHER, opened=[(1, 16)], table=over))
            _poll(runtime)
            _do(
                runtime,
                (output, UPLOAD, list(zip(host[:1], new[:1], strict=True))),
                (9, UPLOAD, list(zip(host[1:], new[1:], strict=True))),
            )
            step.table = np.array([(0, i, block) for i, block in enumerate(new)], np.int32)
            step.closed = np.array([1], np.int32)
        result, step_logits = runtime.logits(step)
        tokens += result.tokens.tolist()
        logits.append(step_logits.tobytes())
        step = plan(0, [(0, 10 + output, 1, 1)], [-1])
    return tokens, logits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", [SPEC, gpt_spec()], ids=["llama", "gpt2"])
def test_a_job_whose_blocks_were_away_goes_on_as_if_they_had_not(spec: ModelSpec, device: str) -> None:
    swapped, kept = (_job(_runtime(spec=spec, device=device), swaps=swaps) for swaps in (True, False))
    assert swapped == kept


MOVES = st.tuples(st.permutations(range(8)), st.permutations(range(6)), st.integers(0, 6), st.integers(0, 6))


@settings(max_examples=60, deadline=None)
@given(rounds=st.lists(MOVES, min_size=1, max_size=5), pieces=st.randoms(use_true_random=False))
def test_blocks_move_as_in_a_model_of_two_arrays(pools: NativeRuntime, rounds: list[Any], pieces: Any) -> None:
    """Rounds of copies in both directions at once, cut at random, in two plans; acknowledged by whichever."""
    host = np.array([list(_read(pools, host=True, block=block)) for block in range(6)], np.uint8)
    device = np.array([list(_read(pools, host=False, block=block)) for block in range(8)], np.uint8)
    copy = 0
    for device_blocks, host_blocks, there, both in rounds:
        pairs = list(zip(device_blocks, host_blocks, strict=False))[:both]  # device with host
        offloads, uploads = pairs[:there], [(block, other) for other, block in pairs[there:]]
        before = device.copy(), host.copy()
        for source, destination in offloads:
            host[destination] = before[0][source]
        for source, destination in uploads:
            device[destination] = before[1][source]
        copies: list[Copy] = []
        for direction, moves in ((OFFLOAD, offloads), (UPLOAD, uploads)):
            while moves:
                size = pieces.randint(1, len(moves))
                copies.append((copy, direction, moves[:size]))
                moves, copy = moves[size:], copy + 1
        pieces.shuffle(copies)
        cut = pieces.randint(0, len(copies))
        event(f"copies in a round: {len(copies)}")
        pools.submit(_copying(0, *copies[:cut]))
        pools.submit(_copying(1, *copies[cut:]))
        acknowledged = _poll(pools).copies.tolist() + _poll(pools).copies.tolist()
        while len(acknowledged) < len(copies):
            pools.submit(_copying(2))
            acknowledged += _poll(pools).copies.tolist()
        assert sorted(acknowledged) == sorted(copy for copy, *_ in copies)
        assert b"".join(_read(pools, host=True, block=block) for block in range(6)) == host.tobytes()
        assert b"".join(_read(pools, host=False, block=block) for block in range(8)) == device.tobytes()


@pytest.fixture(scope="module", params=DEVICES)
def pools(request: pytest.FixtureRequest) -> NativeRuntime:
    """Eight device blocks, all different, and six empty host blocks."""
    runtime = _runtime(8, 6, device=request.param)
    _fill(runtime, 8)
    contents = {_read(runtime, host=False, block=block) for block in range(8)}
    size = block_bytes(SPEC, "float32", BLOCK, request.param)
    assert len(contents) == 8 and all(len(content) == size for content in contents)
    assert {_read(runtime, host=True, block=block) for block in range(6)} == {bytes(size)}
    return runtime


@given(
    pairs=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 12)),
        min_size=1,
        unique_by=(lambda pair: pair[0], lambda pair: pair[1]),
    )
)
def test_neighbours_that_move_to_neighbours_are_one_run(pairs: list[tuple[int, int]]) -> None:
    runs = _C.coalesce(pairs)
    moved = [(source + i, destination + i) for source, destination, count in runs for i in range(count)]
    assert sorted(moved) == sorted(pairs)
    # A run begins where the pair before it does not move: this many are needed, and no more.
    assert len(runs) == sum((source - 1, destination - 1) not in pairs for source, destination in pairs)


def test_a_row_plan_does_not_wait_for_a_slow_copy() -> None:
    """The copy takes about a second; plans submitted with it and after it come back first, and it comes with one that
    waits for it."""
    runtime = _runtime(bandwidth=BYTES)
    first = plan(0, [(0, 0, 3, 1)], [1, 2, 3], opened=[(0, 3)], table=[(0, 0, 1)])
    runtime.submit(_with_copies(first, (5, OFFLOAD, [(3, 3)])))
    runtime.submit(plan(1, [(0, 3, 1, 1)], [-1]))
    runtime.submit(plan(2, [], []))
    results = [_poll(runtime) for _ in range(3)]
    assert [len(result.tokens) for result in results] == [1, 1, 0]
    assert [result.copies.tolist() for result in results] == [[], [], [5]]
    assert results[2].copy_seconds.dtype == np.float32 and results[2].copy_seconds[0] > 0.999
    assert results[2].seconds > 0.1, "the wait is part of a plan without rows"


def test_plans_without_rows_end_with_the_next_copy_or_at_once() -> None:
    runtime = _runtime(bandwidth=20 * BYTES)
    copies: list[Copy] = [(7, OFFLOAD, [(0, 0)]), (8, OFFLOAD, [(1, 1)]), (9, OFFLOAD, [(2, 2)])]
    runtime.submit(_copying(0, *copies))
    for plan_id in range(1, 3):
        runtime.submit(_copying(plan_id))
    results = [_poll(runtime) for _ in range(3)]
    told = [result.copies.tolist() for result in results]
    assert [copy for copies in told for copy in copies] == [7, 8, 9], "a stream keeps its order"
    assert all(told) or told.index([]) == sum(map(bool, told)), "none waits while there is news"
    runtime.submit(_copying(3))
    assert _poll(runtime).copies.tolist() == []


def test_finished_copies_are_told_by_the_next_result_whatever_its_plan() -> None:
    runtime = _runtime()
    rows = plan(0, [(0, 0, 3, 1)], [1, 2, 3], opened=[(0, 3)], table=[(0, 0, 1)])
    runtime.submit(_with_copies(rows, (0, OFFLOAD, [(3, 3)]), (1, UPLOAD, [(4, 4)])))
    acknowledged = _poll(runtime).copies.tolist()
    for plan_id in range(1, 4):
        time.sleep(0.01)
        runtime.submit(plan(plan_id, [(0, 3, 1, 1)], [-1]))
        acknowledged += _poll(runtime).copies.tolist()
    while len(acknowledged) < 2:
        runtime.submit(_copying(4))
        acknowledged += _poll(runtime).copies.tolist()
    assert sorted(acknowledged) == [0, 1]


def test_a_failed_plan_leaves_its_copies_to_the_next_result() -> None:
    runtime = _runtime()
    _fill(runtime, 8)
    runtime.submit(_with_copies(plan(1, [], [], closed=[3]), (4, OFFLOAD, [(2, 5)])))
    with pytest.raises(_C.Error, match="closes slot 3"):
        runtime.poll()
    runtime.submit(_copying(2))
    assert _poll(runtime).copies.tolist() == [4]
    assert _read(runtime, host=True, block=5) == _read(runtime, host=False, block=2)


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ([(-1, OFFLOAD, [(0, 0)])], "copy -1 is negative"),
        ([(1, 2, [(0, 0)])], "copy 1 has the direction 2"),
        ([(1, -1, [(0, 0)])], "copy 1 has the direction -1"),
        ([(1, OFFLOAD, [(8, 0)])], "device block 8 of copy 1 is outside the pool of 8"),
        ([(1, OFFLOAD, [(0, 6)])], "host block 6 of copy 1 is outside the pool of 6"),
        ([(1, UPLOAD, [(6, 0)])], "host block 6 of copy 1 is outside"),
        ([(1, UPLOAD, [(0, 8)])], "device block 8 of copy 1 is outside"),
        ([(1, OFFLOAD, [(-1, 0)])], "device block -1 of copy 1 is outside"),
        ([(1, OFFLOAD, [(0, 0)]), (1, UPLOAD, [(1, 1)])], "copy 1 has two directions"),
        ([(1, OFFLOAD, [(0, 0)]), (2, OFFLOAD, [(1, 1)]), (1, OFFLOAD, [(2, 2)])], "copy 1 is .* in two places"),
        ([(1, OFFLOAD, [(0, 0), (0, 1)])], "device block 0 of copy 1 is being copied already"),
        ([(1, OFFLOAD, [(0, 0), (1, 0)])], "host block 0 of copy 1 is being copied already"),
        ([(1, OFFLOAD, [(0, 0)]), (2, UPLOAD, [(0, 1)])], "host block 0 of copy 2 is being copied already"),
        ([(1, OFFLOAD, [(0, 0)]), (2, UPLOAD, [(1, 0)])], "device block 0 of copy 2 is being copied already"),
        ([(7, OFFLOAD, [(0, 0)])], "copy 7 is .* under way already"),
        ([(1, OFFLOAD, [(5, 0)])], "device block 5 of copy 1 is being copied already"),
        ([(1, UPLOAD, [(3, 0)])], "host block 3 of copy 1 is being copied already"),
    ],
)
def test_an_illegal_copy_is_refused_at_submit_and_nothing_starts(copies: list[Copy], message: str) -> None:
    """While copy 7, from device block 5 to host block 3, is not acknowledged. What is refused leaves no claims."""
    runtime = _runtime(8, 6)
    runtime.submit(_with_copies(plan(0, [], [], closed=[3]), (7, OFFLOAD, [(5, 3)])))
    with pytest.raises(_C.Error, match="closes slot 3"):
        runtime.poll()  # tells nothing of the copy
    legal: Copy = (6, OFFLOAD, [(7, 5)])
    for attempt in ([legal, *copies], [*copies, legal]):
        with pytest.raises(_C.Error, match=message):
            runtime.submit(_copying(1, *attempt))
    assert runtime.poll(0.05) is None, "a refused plan has no result"
    runtime.submit(_copying(2))
    assert _poll(runtime).copies.tolist() == [7]
    _do(runtime, legal)
    _do(runtime, (7, OFFLOAD, [(5, 3)]))  # the id and the blocks are free once the result is there


def test_without_a_host_pool_every_copy_is_refused() -> None:
    runtime = _runtime(8, 0)
    for direction in (OFFLOAD, UPLOAD):
        with pytest.raises(_C.Error, match="host block 0 of copy 0 is outside the pool of 0"):
            runtime.submit(_copying(0, (0, direction, [(0, 0)])))
    runtime.submit(_copying(0))
    assert _poll(runtime).copies.tolist() == []


def test_wrong_arrays_of_copies_are_refused() -> None:
    bad = _copying(0)
    for copies in (np.zeros((0, 3), np.int32), np.zeros((1, 4), np.int64)):
        bad.copies = copies  # type: ignore[assignment]
        with pytest.raises(_C.Error, match=r"plan\.copies has the wrong"):
            _runtime().submit(bad)


def test_a_slowed_direction_keeps_its_pace() -> None:
    """Each copy takes the time its bytes take, counted from its turn: neither waiting nor idling changes it."""
    bandwidth = 100 * BYTES
    runtime = _runtime(bandwidth=bandwidth)
    acknowledged: dict[int, float] = {}
    copies: list[Copy] = [(0, OFFLOAD, [(0, 0), (3, 1)]), (1, OFFLOAD, [(1, 2)]), (2, UPLOAD, [(7, 7), (6, 6), (5, 5)])]
    sizes = {0: 2, 1: 1, 2: 3, 3: 2}
    runtime.submit(_copying(0, *copies))
    while len(acknowledged) < 3:
        result = _poll(runtime)
        acknowledged |= dict(zip(result.copies.tolist(), result.copy_seconds.tolist(), strict=True))
        runtime.submit(_copying(1))
    time.sleep(0.05)  # idle time is not saved up
    runtime.submit(_copying(2, (3, OFFLOAD, [(3, 3), (4, 4)])))
    for _ in range(2):
        result = _poll(runtime)
        acknowledged |= dict(zip(result.copies.tolist(), result.copy_seconds.tolist(), strict=True))
    assert acknowledged.keys() == sizes.keys()
    for copy, blocks in sizes.items():
        assert acknowledged[copy] > 0.999 * blocks * BYTES / bandwidth


def test_a_slowed_copy_uses_no_processor() -> None:
    runtime = _runtime(bandwidth=2 * BYTES)
    time.sleep(0.05)  # the threads have parked
    before = time.process_time()
    _do(runtime, (0, OFFLOAD, [(0, 0)]), (1, UPLOAD, [(1, 1)]))
    assert time.process_time() - before < 0.2, "half a second of sleep"


@pytest.mark.parametrize("waiting", [False, True])
def test_a_runtime_ends_while_copies_are_under_way(waiting: bool) -> None:
    """At a byte a second they would take hours; with `waiting`, a plan waits for one of them."""
    runtime = _runtime(9, 8, bandwidth=1)
    copies: list[Copy] = [(i, i % 2, [(i, i)]) for i in range(8)]
    if waiting:
        runtime.submit(_copying(0, *copies))
    else:
        rows = plan(0, [(0, 0, 3, 1)], [1, 2, 3], opened=[(0, 3)], table=[(0, 0, 8)])
        runtime.submit(_with_copies(rows, *copies))
    if waiting:
        assert runtime.poll(0.05) is None
    else:
        assert len(_poll(runtime).tokens) == 1
    begin = time.monotonic()
    del runtime
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bandwidth", [None, 1000 * BYTES])
def test_the_link_is_measured_and_left_as_it_was(bandwidth: int | None, device: str) -> None:
    runtime = _runtime(bandwidth=bandwidth, device=device)
    _fill(runtime, 8)
    before = [_read(runtime, host=False, block=block) for block in range(8)]
    link = measure_link(runtime, 8, 8)
    assert link is not None and link.offload_block > 0 and link.upload_block > 0
    if bandwidth is not None:
        for seconds in (link.offload_seconds(1), link.upload_seconds(1)):
            assert 0.0005 < seconds < 0.1
    runtime.submit(_copying(0))
    assert _poll(runtime).copies.tolist() == [], "nothing is under way"
    assert [_read(runtime, host=False, block=block) for block in range(8)] == before
    assert measure_link(_runtime(8, 0, device=device), 8, 0) is None
