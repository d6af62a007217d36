"""How the host waits for a device, and what is left of an iteration that failed on its way there: on the emulated
device, which can be told to be slow, and to fail."""

from __future__ import annotations

import ctypes
import time

import numpy as np
import pytest
from machines import CUDA
from synthetic import SyntheticModel, llama_spec, plan

from fastserve import _C
from fastserve.config import RuntimeConfig
from fastserve.native import NativeRuntime
from fastserve.types import OFFLOAD, BatchPlan

LATENCY = 1.0  # seconds from when work is queued until it is known to be over

pytestmark = pytest.mark.parametrize("device", [CUDA])


def _runtime(device: str) -> NativeRuntime:
    config = RuntimeConfig(dtype="float32", num_blocks=4, max_num_batched_tokens=40, device=device)
    return NativeRuntime(SyntheticModel(llama_spec(num_layers=1)), config)


def _first(runtime: NativeRuntime) -> None:
    """An iteration, so that what happens once has happened."""
    runtime.submit(plan(0, [(9, 0, 1, 1)], [1], opened=[(9, 1)], table=[(9, 0, 3)]))
    runtime.poll()
    runtime.submit(plan(1, [], [], closed=[9]))
    runtime.poll()


def _token(runtime: NativeRuntime, batch: BatchPlan) -> int:
    runtime.submit(batch)
    result = runtime.poll()
    assert result is not None
    return int(result.tokens[0])


@pytest.mark.parametrize("plans", [1, 2])
def test_no_core_is_busy_with_waiting(device: str, plugin: ctypes.CDLL, plans: int) -> None:
    """For one iteration, behind which another might be launched, or for the first of as many as there may be."""
    runtime = _runtime(device)
    _first(runtime)
    plugin.fastserve_simt_set_latency(LATENCY)
    begin, busy = time.monotonic(), time.process_time()
    for i in range(plans):
        runtime.submit(plan(2 + i, [(i, 0, 1, 1)], [5], opened=[(i, 1)], table=[(i, 0, i)]))
    for _ in range(plans):
        assert runtime.poll() is not None
    assert time.monotonic() - begin >= LATENCY
    assert time.process_time() - busy < LATENCY / 2


def test_a_plan_that_comes_while_another_runs_is_launched_behind_it(device: str, plugin: ctypes.CDLL) -> None:
    runtime = _runtime(device)
    _first(runtime)
    plugin.fastserve_simt_set_latency(LATENCY)
    runtime.submit(plan(2, [(0, 0, 1, 1)], [5], opened=[(0, 1)], table=[(0, 0, 0)]))
    assert runtime.poll(timeout=LATENCY / 10) is None  # the worker sleeps by now
    runtime.submit(plan(3, [(0, 1, 1, 1)], [-1]))
    first, second = runtime.poll(), runtime.poll()
    assert first is not None and second is not None
    assert first.seconds >= LATENCY
    assert second.seconds < 0.6 * LATENCY  # from the end of the first on: a tenth, and what the device takes


def test_a_copy_that_fails_is_the_failure_of_a_plan(device: str, plugin: ctypes.CDLL) -> None:
    """Of whichever asks next for copies that are done, and of all that follow."""
    config = RuntimeConfig(dtype="float32", num_blocks=4, num_host_blocks=4, max_num_batched_tokens=40, device=device)
    runtime = NativeRuntime(SyntheticModel(llama_spec(num_layers=1)), config)
    _first(runtime)
    plugin.fastserve_simt_fail_call(b"cudaMemcpyAsync", 0)
    offload = plan(2, [], [])
    offload.copies = np.array([(0, OFFLOAD, 0, 0)], np.int32)
    runtime.submit(offload)
    with pytest.raises(_C.Error, match="CUDA: unknown error"):
        runtime.poll()
    runtime.submit(plan(3, [(0, 0, 1, 1)], [5], opened=[(0, 1)], table=[(0, 0, 1)]))
    with pytest.raises(_C.Error, match="CUDA: unknown error"):
        runtime.poll()


def test_a_launch_that_fails_leaves_no_sample_behind(device: str, plugin: ctypes.CDLL) -> None:
    """Whichever mark in the stream cannot be made: the last one is that of the batch's end, when its tokens are being
    chosen."""
    runtime, alone = _runtime(device), _runtime(device)
    failing = plan(0, [(0, 0, 5, 1)], [3, 1, 4, 1, 5], opened=[(0, 5)], table=[(0, 0, 0)])
    good = plan(1, [(1, 0, 3, 1)], [9, 2, 6], opened=[(1, 3)], table=[(1, 0, 1)])
    one, other = (_token(alone, each) for each in (failing, good))
    assert one != other
    failures = 0
    while True:
        plugin.fastserve_simt_fail_call(b"cudaEventRecord", failures)
        try:
            assert _token(runtime, failing) == one
            break
        except _C.Error as error:
            assert "CUDA" in str(error)
        failures += 1
        plugin.fastserve_simt_fail_call(None, 0)
        assert _token(runtime, good) == other
        runtime.submit(plan(2, [], [], closed=[0, 1]))
        runtime.poll()
    assert failures > 2
