"""What iterations on a CUDA device take of its memory: all of it before the first one, and graphs that were recorded
know when it has moved. On the emulated device, which tells."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from machines import CUDA
from synthetic import VOCAB, SyntheticModel, llama_spec, plan

from fastserve import _C
from fastserve.config import RuntimeConfig
from fastserve.native import NativeRuntime
from fastserve.types import BatchPlan, InvalidRequest

BLOCK, BLOCKS = 16, 20  # tokens of a block, blocks of a job

pytestmark = pytest.mark.parametrize("device", [CUDA])


def _runtime(device: str, jobs: int = 4) -> NativeRuntime:
    config = RuntimeConfig(num_blocks=jobs * BLOCKS, max_num_batched_tokens=BLOCKS * BLOCK, device=device)
    return NativeRuntime(SyntheticModel(llama_spec(num_layers=1)), config)


def _do(runtime: NativeRuntime, batch: BatchPlan) -> list[int]:
    runtime.submit(batch)
    result = runtime.poll()
    assert result is not None
    return list(map(int, result.tokens))


def _prompt(slot: int, length: int) -> BatchPlan:
    """A whole prompt of a job that has blocks of its own."""
    tokens = [(7 * slot + 3 * i) % VOCAB for i in range(length)]
    table = [(slot, i, BLOCKS * slot + i) for i in range(BLOCKS)]
    return plan(0, [(slot, 0, length, 1)], tokens, opened=[(slot, length)], table=table)


def _decode(*rows: tuple[int, int]) -> BatchPlan:
    return plan(0, [(slot, position, 1, 1) for slot, position in rows], [-1] * len(rows))


def _penalized(slots: list[int], history: int) -> BatchPlan:
    """Jobs of one token and so many more that penalties look at."""
    batch = plan(
        0,
        [(slot, 0, 1, 1) for slot in slots],
        [(5 + 31 * slot) % VOCAB for slot in slots],
        opened=[(slot, 1) for slot in slots],
        table=[(slot, 0, BLOCKS * slot) for slot in slots],
    )
    batch.opened[:, 2] = history
    batch.opened_params[:, 3] = 3.0
    batch.history = np.arange(len(slots) * history, dtype=np.int32) % VOCAB
    return batch


ALLOCATES = pytest.mark.parametrize("call", [b"cudaMalloc", b"cudaHostAlloc"])


@ALLOCATES
def test_iterations_allocate_nothing(device: str, plugin: ctypes.CDLL, call: bytes) -> None:
    """Whatever they are: contexts of several segments, which blocks share, and jobs with penalties."""
    runtime = _runtime(device)
    assert runtime.free_bytes(3, BLOCKS * BLOCK)
    runtime.set_pools(4 * BLOCKS, 0)
    plugin.fastserve_simt_fail_call(call, 0)
    for slot in range(2):
        _do(runtime, _prompt(slot, 300))
    for step in range(3):
        _do(runtime, _decode((0, 300 + step), (1, 300 + step)))
    _do(runtime, plan(0, [], [], closed=[0, 1]))
    for _ in range(2):
        _do(runtime, _penalized([0, 1, 2], 40))
        _do(runtime, _decode((0, 1), (1, 1), (2, 1)))
        _do(runtime, plan(0, [], [], closed=[0, 1, 2]))


def test_nor_do_those_whose_rows_have_biases(device: str, plugin: ctypes.CDLL) -> None:
    """So many rows that without biases no byte of the sampler's workspace is left."""
    jobs, biases = 42, 128
    runtime = _runtime(device, jobs)
    runtime.free_bytes(jobs, BLOCK)
    plugin.fastserve_simt_fail_call(b"cudaMalloc", 0)
    batch = _penalized(list(range(jobs)), 0)
    batch.opened_params[:, 3] = 1.0
    batch.opened[:, 6] = biases
    batch.bias_tokens = np.tile(np.arange(biases, dtype=np.int32), jobs)
    batch.bias_values = np.full(jobs * biases, -100.0, np.float32)
    assert min(_do(runtime, batch)) >= biases


@ALLOCATES
def test_nor_do_those_of_many_rows(device: str, plugin: ctypes.CDLL, call: bytes) -> None:
    """Whose tables of blocks are longer than all else of a prompt; here they share all blocks but the last."""
    jobs = 160
    runtime = _runtime(device, 20)
    runtime.free_bytes(jobs, BLOCKS * BLOCK)
    runtime.set_pools(20 * BLOCKS, 0)
    plugin.fastserve_simt_fail_call(call, 0)
    last = (BLOCKS - 1) * BLOCK
    batch = plan(
        0,
        [(slot, last, 1, 1) for slot in range(jobs)],
        [slot % VOCAB for slot in range(jobs)],
        opened=[(slot, last + 1) for slot in range(jobs)],
        table=[(slot, i, i if i < BLOCKS - 1 else BLOCKS + slot) for slot in range(jobs) for i in range(BLOCKS)],
    )
    assert len(_do(runtime, batch)) == jobs


def test_whichever_thread_asks_the_runtimes_device_is_looked_at(device: str, plugin: ctypes.CDLL) -> None:
    runtime = _runtime(f"{device}:1", jobs=1)
    with ThreadPoolExecutor(1) as thread:
        free = thread.submit(runtime.free_bytes, 1, BLOCK).result()
    assert free == runtime.free_bytes(1, BLOCK)
    assert len(_do(runtime, _prompt(0, 3))) == 1


def test_an_iteration_too_large_for_the_device_is_told_in_one_line(device: str, plugin: ctypes.CDLL) -> None:
    runtime = _runtime(device)
    plugin.fastserve_simt_set_memory(0)  # what is used stays
    line = (
        r"^max_num_batched_tokens: must be lower: .* no room for an iteration of 320 tokens and 4 rows \(.*memory.*\)$"
    )
    with pytest.raises(InvalidRequest, match=line):
        runtime.free_bytes(4, BLOCKS * BLOCK)


def test_opening_jobs_waits_for_nothing(device: str, plugin: ctypes.CDLL) -> None:
    """However many have a past that penalties look at."""
    runtime = _runtime(device, jobs=6)
    runtime.free_bytes(6, BLOCKS * BLOCK)
    plugin.fastserve_simt_set_latency(1.0)  # from when work is queued until it is known to be over
    runtime.submit(_penalized(list(range(6)), 10))
    result = runtime.poll()
    assert result is not None
    assert result.seconds < 1.6


def test_jobs_take_turns_with_tables_of_penalties(device: str) -> None:
    """There are as many as a batch has rows: who was not in the last one may have lost its own, and gets it again."""
    prompts = {slot: _penalized([slot], 40 + slot) for slot in range(4)}

    def tokens(rows: int, together: list[list[int]]) -> dict[int, list[int]]:
        runtime = _runtime(device)
        runtime.free_bytes(rows, BLOCKS * BLOCK)
        told: dict[int, list[int]] = {slot: _do(runtime, prompt) for slot, prompt in prompts.items()}
        for slots in together:
            chosen = _do(runtime, _decode(*[(slot, len(told[slot])) for slot in slots]))
            for slot, token in zip(slots, chosen, strict=True):
                told[slot].append(token)
        return told

    alone = tokens(4, [[slot] for _ in range(5) for slot in range(4)])
    assert len({tuple(each) for each in alone.values()}) > 1
    turns = [[0, 1], [2, 3], [1, 2], [0, 3], [3, 1], [2, 0], [0, 1], [3, 2], [2, 0], [1, 3]]
    assert tokens(2, turns) == alone


def _replayed(runtime: NativeRuntime, slot: int, position: int) -> int:
    """The position after three iterations: as it is, recorded, replayed."""
    for _ in range(3):
        _do(runtime, _decode((slot, position)))
        position += 1
    return position


def test_a_larger_workspace_ends_what_was_recorded_with_the_smaller(device: str) -> None:
    runtime, other = _runtime(device, jobs=8), _runtime(device, jobs=8)
    for each in (runtime, other):
        _do(each, _penalized([4, 5, 6, 7], 1))  # as many rows, for which everything else is there then
        for slot in range(4):
            _do(each, _prompt(slot, 300))
    position = _replayed(runtime, 0, 300)
    for at in range(300, position):
        _do(other, _decode((0, at)))
    others = [(slot, 300) for slot in (1, 2, 3)]
    assert _do(runtime, _decode((0, position), *others)) == [
        *_do(other, _decode((0, position))),
        *(_do(other, _decode(row))[0] for row in others),
    ]
    assert _do(runtime, _decode((0, position + 1))) == _do(other, _decode((0, position + 1)))


def test_more_jobs_than_ever_end_what_was_recorded_with_fewer(device: str) -> None:
    """Their last tokens lie in one array, which moves when it grows."""
    runtime, other = _runtime(device), _runtime(device)
    position = 3
    for each in (runtime, other):
        _do(each, _prompt(0, position))
    position = _replayed(runtime, 0, position)
    for at in range(3, position):
        _do(other, _decode((0, at)))
    _do(runtime, plan(0, [], [], opened=[(slot, 1) for slot in range(1, 200)]))
    for _ in range(2):
        assert _do(runtime, _decode((0, position))) == _do(other, _decode((0, position)))
        position += 1


def test_contexts_that_more_blocks_share_are_recorded_by_themselves(device: str, plugin: ctypes.CDLL) -> None:
    runtime = _runtime(device)
    for slot in (1, 2):
        _do(runtime, _prompt(slot, 300))
    _do(runtime, _decode((1, 300), (2, 300)))  # for which there is as large a workspace
    _do(runtime, _prompt(0, 253))
    position = _replayed(runtime, 0, 253)
    assert position == 256
    _do(runtime, _decode((0, 256)))
    plugin.fastserve_simt_fail_call(b"cudaGraphInstantiate", 0)
    with pytest.raises(_C.Error, match="CUDA"):
        _do(runtime, _decode((0, 257)))
    _do(runtime, _decode((0, 257)))


def test_an_iteration_that_failed_is_not_recorded_the_next_time(device: str, plugin: ctypes.CDLL) -> None:
    """It may have been the first of its size, and stopped before all was there that later ones use."""
    runtime, other = _runtime(device), _runtime(device)
    first = _prompt(0, 1)
    plugin.fastserve_simt_fail_call(b"a launch", 1)  # behind the upload
    with pytest.raises(_C.Error, match="CUDA"):
        _do(runtime, first)
    again = plan(0, [(0, 0, 1, 1)], first.tokens)
    assert _do(runtime, again) == _do(other, first)
