"""The fake CUDA runtime: streams do what they are told as late as they may, and work that nothing orders is a race."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest

COUNT = 100
ONES, RAMP = np.ones(COUNT, np.float32), np.arange(COUNT, dtype=np.float32)


@pytest.fixture(autouse=True, params=["lazy", "random", "eager"])
def cuda(kernels: ModuleType, request: pytest.FixtureRequest) -> ModuleType:
    if not hasattr(kernels, "simt"):
        pytest.skip("these kernels run on a GPU")
    kernels.simt.configure(request.param, 7)
    return kernels


def device(cuda: ModuleType, values: np.ndarray | None = None) -> object:
    memory = cuda.Memory(False, 4 * COUNT)
    if values is not None:
        memory.write(values)
    return memory


def pinned(cuda: ModuleType, values: np.ndarray | None = None) -> object:
    memory = cuda.Memory(True, 4 * COUNT)
    if values is not None:
        memory.write(values)
    return memory


def test_a_stream_does_things_in_order(cuda: ModuleType) -> None:
    stream, a, host, back = cuda.Stream(), device(cuda), pinned(cuda, RAMP), pinned(cuda)
    cuda.copy(a, 0, host, 0, 4 * COUNT, stream)
    cuda.add(a, a, a, stream)
    cuda.copy(back, 0, a, 0, 4 * COUNT, stream)
    stream.synchronize()
    assert np.array_equal(back.read(), 2 * RAMP)


def test_nothing_is_done_before_it_must_be(cuda: ModuleType) -> None:
    cuda.simt.configure("lazy", 0)
    stream, a, host, done = cuda.Stream(), device(cuda), pinned(cuda, RAMP), []
    cuda.copy(a, 0, host, 0, 4 * COUNT, stream)
    cuda.host_function(stream, lambda: done.append(1))
    assert not done
    stream.synchronize()
    assert done == [1]


def test_streams_that_nothing_orders_race(cuda: ModuleType) -> None:
    first, second, a, host, back = cuda.Stream(), cuda.Stream(), device(cuda), pinned(cuda, RAMP), pinned(cuda)
    cuda.copy(a, 0, host, 0, 4 * COUNT, first)
    with pytest.raises(cuda.Error, match=r"race: cudaMemcpyAsync of 400 bytes.*stream \d+\) writes and .* reads"):
        cuda.copy(back, 0, a, 0, 4 * COUNT, second)


def test_a_write_from_pageable_memory_may_still_be_on_its_way(cuda: ModuleType) -> None:
    """The default stream has to be waited for: other streams do not wait for it."""
    stream, a, values, back = cuda.Stream(), device(cuda), RAMP.copy(), pinned(cuda)
    a.begin_write(values)
    values[:] = 0  # taken over already
    assert np.array_equal(a.read(), RAMP)
    a.begin_write(ONES)
    with pytest.raises(cuda.Error, match=r"race: cudaMemcpy of 400 bytes.* writes and .* reads"):
        cuda.copy(back, 0, a, 0, 4 * COUNT, stream)


def test_an_event_orders_streams(cuda: ModuleType) -> None:
    first, second, event = cuda.Stream(), cuda.Stream(), cuda.Event()
    a, host, back = device(cuda), pinned(cuda, RAMP), pinned(cuda)
    cuda.copy(a, 0, host, 0, 4 * COUNT, first)
    event.record(first)
    second.wait(event)
    cuda.copy(back, 0, a, 0, 4 * COUNT, second)
    second.synchronize()
    assert np.array_equal(back.read(), RAMP)


def test_an_event_recorded_too_early_does_not(cuda: ModuleType) -> None:
    first, second, event = cuda.Stream(), cuda.Stream(), cuda.Event()
    a, host, back = device(cuda), pinned(cuda, RAMP), pinned(cuda)
    event.record(first)
    cuda.copy(a, 0, host, 0, 4 * COUNT, first)
    second.wait(event)
    with pytest.raises(cuda.Error, match="race"):
        cuda.copy(back, 0, a, 0, 4 * COUNT, second)


def test_order_is_passed_on(cuda: ModuleType) -> None:
    streams, events = [cuda.Stream() for _ in range(3)], [cuda.Event() for _ in range(2)]
    a, host = device(cuda), pinned(cuda, RAMP)
    cuda.copy(a, 0, host, 0, 4 * COUNT, streams[0])
    for i, event in enumerate(events):
        event.record(streams[i])
        streams[i + 1].wait(event)
    cuda.clear(a, streams[2])
    streams[2].synchronize()
    assert not a.read().any()


@pytest.mark.parametrize("wait", ["stream", "event", "device", "query"])
def test_what_the_host_waited_for_comes_before_what_it_does_next(cuda: ModuleType, wait: str) -> None:
    first, second, event = cuda.Stream(), cuda.Stream(), cuda.Event()
    a, host, back = device(cuda), pinned(cuda, RAMP), pinned(cuda)
    cuda.copy(a, 0, host, 0, 4 * COUNT, first)
    event.record(first)
    if wait == "stream":
        first.synchronize()
    elif wait == "event":
        event.synchronize()
    elif wait == "device":
        cuda.synchronize()
    else:
        while not event.query():
            pass
    cuda.copy(back, 0, a, 0, 4 * COUNT, second)
    second.synchronize()
    assert np.array_equal(back.read(), RAMP)


def test_the_hosts_own_copies_race_too(cuda: ModuleType) -> None:
    stream, a, host = cuda.Stream(), device(cuda), pinned(cuda, RAMP)
    cuda.copy(a, 0, host, 0, 4 * COUNT, stream)
    with pytest.raises(cuda.Error, match="race"):
        host.write(ONES)  # what the copy has yet to read


def test_reads_do_not_race_and_neither_do_different_bytes(cuda: ModuleType) -> None:
    first, second, a, host, back = cuda.Stream(), cuda.Stream(), device(cuda, RAMP), pinned(cuda, ONES), pinned(cuda)
    cuda.copy(back, 0, a, 0, 200, first)
    cuda.copy(back, 200, a, 0, 200, second)
    cuda.copy(a, 200, host, 0, 100, first)
    cuda.copy(a, 300, host, 0, 100, second)
    with pytest.raises(cuda.Error, match="race"):
        cuda.copy(a, 199, host, 0, 1, second)


def test_kernels_race_with_copies(cuda: ModuleType) -> None:
    first, second, a, b, c = cuda.Stream(), cuda.Stream(), device(cuda, RAMP), device(cuda, ONES), device(cuda)
    host = pinned(cuda, ONES)
    cuda.add(a, b, c, first)
    with pytest.raises(cuda.Error, match=r"race: the kernel launched at tests/simt/examples/add.cu:\d+"):
        cuda.copy(a, 0, host, 0, 4, second)


def test_memory_is_not_freed_while_it_is_used(cuda: ModuleType) -> None:
    stream, a, b, c = cuda.Stream(), device(cuda, RAMP), device(cuda, ONES), device(cuda)
    cuda.add(a, b, c, stream)
    b.free()
    with pytest.raises(cuda.Error, match=r"cudaFree of memory that is still used by the kernel launched at"):
        stream.synchronize()


def test_freeing_after_synchronizing_is_right(cuda: ModuleType) -> None:
    stream, a, b, c = cuda.Stream(), device(cuda, RAMP), device(cuda, ONES), device(cuda)
    cuda.add(a, b, c, stream)
    stream.synchronize()
    b.free()
    assert np.array_equal(c.read(), RAMP + 1)


def test_events_must_have_been_recorded(cuda: ModuleType) -> None:
    stream, event = cuda.Stream(), cuda.Event()
    for wait in (lambda: stream.wait(event), event.synchronize, event.query):
        with pytest.raises(cuda.Error, match="the event has never been recorded"):
            wait()


def test_memory_that_is_not_pinned_is_not_copied_asynchronously(cuda: ModuleType) -> None:
    stream, a = cuda.Stream(), device(cuda)
    with pytest.raises(cuda.Error, match="not pinned"):
        cuda.copy_unpinned(a, RAMP, stream)


def test_copies_stay_within_allocations(cuda: ModuleType) -> None:
    stream, a, host = cuda.Stream(), device(cuda), cuda.Memory(True, 4 * COUNT + 4)
    with pytest.raises(cuda.Error, match="from byte 0 to byte 404 of an allocation of 400 bytes"):
        cuda.copy(a, 0, host, 0, 4 * COUNT + 4, stream)


def test_host_functions_do_not_use_cuda(cuda: ModuleType) -> None:
    stream, messages = cuda.Stream(), []

    def wrong() -> None:
        try:
            cuda.memory_info()
        except cuda.Error as error:
            messages.append(str(error))

    cuda.host_function(stream, wrong)
    stream.synchronize()
    assert messages == ["cudaMemGetInfo is called by a host function, which must not use CUDA"]


# ---- graphs


def capture_fork(cuda: ModuleType, join: bool) -> tuple[object, ...]:
    """b = a + a on one stream and c = a + a on another, then d = b + c."""
    first, second, fork, joined = cuda.Stream(), cuda.Stream(), cuda.Event(), cuda.Event()
    a, b, c, d = (device(cuda) for _ in range(4))
    first.begin_capture()
    fork.record(first)
    second.wait(fork)
    cuda.add(a, a, b, first)
    cuda.add(a, a, c, second)
    joined.record(second)
    if join:
        first.wait(joined)
        cuda.add(b, c, d, first)
    return first, second, a, b, c, d


def test_a_graph_is_done_whenever_it_is_launched(cuda: ModuleType) -> None:
    stream, _, a, b, c, d = capture_fork(cuda, join=True)
    graph = stream.end_capture()
    assert not any(memory.read().any() for memory in (b, c, d))  # capturing does nothing
    host = pinned(cuda)
    for values in (ONES, RAMP):
        host.write(values)
        cuda.copy(a, 0, host, 0, 4 * COUNT, stream)
        graph.launch(stream)
        stream.synchronize()
        assert np.array_equal(d.read(), 4 * values)


def test_a_branch_of_a_capture_must_be_joined(cuda: ModuleType) -> None:
    stream, *_others = capture_fork(cuda, join=False)  # which live on
    with pytest.raises(cuda.Error, match="was captured too and has not been joined again"):
        stream.end_capture()


def test_branches_of_a_graph_race(cuda: ModuleType) -> None:
    first, second, fork, joined = cuda.Stream(), cuda.Stream(), cuda.Event(), cuda.Event()
    a, b = device(cuda), device(cuda)
    first.begin_capture()
    fork.record(first)
    second.wait(fork)
    cuda.add(a, a, b, first)
    cuda.add(b, a, a, second)
    joined.record(second)
    first.wait(joined)
    graph = first.end_capture()
    with pytest.raises(cuda.Error, match="race"):
        graph.launch(first)


def test_graphs_race_with_other_streams(cuda: ModuleType) -> None:
    first, second, a, host = cuda.Stream(), cuda.Stream(), device(cuda), pinned(cuda)
    first.begin_capture()
    cuda.add(a, a, a, first)
    graph = first.end_capture()
    cuda.copy(a, 0, host, 0, 4, second)
    with pytest.raises(cuda.Error, match="race"):
        graph.launch(first)


def test_a_graph_does_not_outlive_the_memory_it_uses(cuda: ModuleType) -> None:
    stream, a = cuda.Stream(), device(cuda)
    stream.begin_capture()
    cuda.add(a, a, a, stream)
    graph = stream.end_capture()
    a.free()
    others = [device(cuda) for _ in range(3)]  # which may lie where it lay
    with pytest.raises(cuda.Error, match=r"cudaGraphLaunch: the kernel launched at .* uses memory that was freed"):
        graph.launch(stream)
    assert len(others) == 3


def test_captures_wait_for_nothing_outside(cuda: ModuleType) -> None:
    stream, other, event = cuda.Stream(), cuda.Stream(), cuda.Event()
    event.record(other)
    stream.begin_capture()
    with pytest.raises(cuda.Error, match="outside of the capture"):
        stream.wait(event)


@pytest.mark.parametrize("call", ["allocate", "synchronize stream", "synchronize device", "read"])
def test_captures_allow_no_waiting_and_no_allocating(cuda: ModuleType, call: str) -> None:
    stream, a = cuda.Stream(), device(cuda)
    calls = {
        "allocate": lambda: device(cuda),
        "synchronize stream": stream.synchronize,
        "synchronize device": cuda.synchronize,
        "read": a.read,
    }
    stream.begin_capture()
    with pytest.raises(cuda.Error, match="is captured"):
        calls[call]()


# ---- two devices


@pytest.fixture
def second_device(cuda: ModuleType) -> Iterator[None]:
    """What is made from here on is of the second device, as long as the thread does not turn to another."""
    cuda.set_device(1)
    yield
    cuda.set_device(0)


def test_threads_are_on_the_first_device_until_they_say_otherwise(cuda: ModuleType) -> None:
    cuda.set_device(1)
    memory = cuda.Memory(False, 4096)
    free = cuda.memory_info()[0]
    cuda.set_device(0)
    assert cuda.memory_info()[0] == free + 4096
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(cuda.memory_info).result()[0] == free + 4096
    memory.free()  # from any device
    cuda.set_device(1)
    assert cuda.memory_info()[0] == free + 4096
    cuda.set_device(0)
    with pytest.raises(cuda.Error, match="cudaErrorInvalidDevice"):
        cuda.set_device(2)


def test_a_device_uses_no_memory_of_the_other(cuda: ModuleType, second_device: None) -> None:
    stream, there = cuda.Stream(), device(cuda)
    cuda.set_device(0)
    here, pinned_host = device(cuda), pinned(cuda, RAMP)
    for wrong in (
        lambda: cuda.copy(here, 0, pinned_host, 0, 4 * COUNT, stream),
        lambda: cuda.copy(there, 0, here, 0, 4 * COUNT, stream),
        lambda: cuda.clear(here, stream),
        lambda: cuda.add(there, there, there, cuda.Stream()),
    ):
        with pytest.raises(cuda.Error, match=r"on device [01] uses memory of device [10]"):
            wrong()
    cuda.copy(there, 0, pinned_host, 0, 4 * COUNT, stream)
    stream.synchronize()
    cuda.set_device(1)
    assert np.array_equal(there.read(), RAMP)


def test_kernels_are_launched_by_threads_that_are_on_the_streams_device(cuda: ModuleType, second_device: None) -> None:
    stream, a, event = cuda.Stream(), device(cuda, RAMP), cuda.Event()
    cuda.set_device(0)
    with pytest.raises(cuda.Error, match="goes to a stream of device 1, and the thread is on device 0"):
        cuda.add(a, a, a, stream)
    with pytest.raises(cuda.Error, match="cudaErrorInvalidResourceHandle"):
        event.record(cuda.Stream())
    cuda.set_device(1)
    cuda.add(a, a, a, stream)
    stream.synchronize()
    assert np.array_equal(a.read(), 2 * RAMP)


# ---- the rest


def test_host_threads_share_the_device(cuda: ModuleType) -> None:
    assert cuda.hammer(4, 50)


def test_memory_runs_out(cuda: ModuleType) -> None:
    free, total = cuda.memory_info()
    assert 0 < free <= total
    memory = cuda.Memory(False, free - 1000)
    assert cuda.memory_info()[0] == 1000
    with pytest.raises(cuda.Error, match=r"out of memory \(cudaErrorMemoryAllocation\)"):
        cuda.Memory(False, 1001)
    memory.free()
    assert cuda.memory_info() == (free, total)
