"""What a rank does when another is gone, has left, or does not come: an error that names it, never a hang."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from threads import each_rank

from fastserve import _C

PROGRAM = Path(__file__).parent / "programs" / "member.py"


def member(path: str, rank: int, size: int, *doing: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), path, str(rank), str(size), *doing]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("last_call", ["all_reduce", "receive", "barrier"])
def test_a_killed_process_is_named_by_all_others(last_call: str) -> None:
    """Ranks 0 and 2 wait for rank 1, which says that it is there and is killed."""
    memory = _C.SharedMemory(3)
    processes = [member(memory.path, rank, 3, last_call if rank != 1 else "hang") for rank in range(3)]
    assert processes[1].stdout is not None
    assert processes[1].stdout.readline() == "here\n"
    processes[1].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    for rank in (0, 2):
        _, errors = processes[rank].communicate(timeout=60)
        assert processes[rank].returncode == 1
        assert "rank 1 on " in errors and f"(process {processes[1].pid}) is gone" in errors, errors
    assert time.monotonic() - begin < 5
    processes[1].communicate()


def test_a_rank_that_has_left_is_missed_only_by_those_who_want_it() -> None:
    def body(world: _C.Communicator) -> str:
        if world.rank == 0:
            return "left"  # and closes
        other = 3 - world.rank
        sent = world.send(b"still here", other)
        memory = bytearray(10)
        world.receive(memory, other).wait()
        sent.wait()
        if world.rank == 2:
            return memory.decode()
        with pytest.raises(_C.Error, match=r"rank 0 on .* has left"):
            world.receive(bytearray(1), 0).wait()
        return memory.decode()

    assert each_rank(3, body) == ["left", "still here", "still here"]


def test_what_a_rank_said_before_it_left_still_arrives() -> None:
    left = threading.Event()

    def body(world: _C.Communicator) -> bytes:
        data = bytearray(b"goodbye")
        if world.rank == 0:
            world.broadcast(data)
            world.close()
            left.set()
            return bytes(data)
        data[:] = bytes(7)
        left.wait()
        world.broadcast(data)
        return bytes(data)

    assert each_rank(2, body) == [b"goodbye", b"goodbye"]


def test_a_hung_rank_is_named_when_the_time_is_up() -> None:
    """And all are told, the one that hung included."""
    late = threading.Event()

    def body(world: _C.Communicator) -> None:
        if world.rank == 1:
            late.wait()
        world.set_timeout(0.3)
        try:
            world.barrier()
        finally:
            late.set()

    errors = [str(error) for error in each_rank(2, body)]
    for error in errors:
        assert "rank 0 on " in error and " seconds for rank 1 on " in error, errors


def test_an_abort_is_the_last_thing_a_communicator_does() -> None:
    def body(world: _C.Communicator) -> None:
        if world.rank == 2:
            world.abort("rank 2 has no memory")
        for _ in range(2):
            with pytest.raises(_C.Error, match="rank 2 has no memory"):
                world.barrier()
        world.barrier()

    assert [str(error) for error in each_rank(3, body)] == ["rank 2 has no memory"] * 3


@pytest.mark.parametrize("machines", [None, [0, 0, 1]], ids=str)
def test_an_abort_reaches_other_hosts(machines: list[int] | None) -> None:
    def body(world: _C.Communicator) -> None:
        if world.rank == 0:
            world.abort("rank 0 has no memory")
        world.barrier()

    assert [str(error) for error in each_rank(3, body, machines)] == ["rank 0 has no memory"] * 3


def test_a_rank_that_does_not_come_is_named() -> None:
    memory = _C.SharedMemory(3)
    with pytest.raises(_C.Error, match=r"rank 1 of 3 on .* has not come within 0.3 seconds"):
        _C.join_shared_memory(memory.path, 0, 3, timeout=0.3)


def test_a_place_is_taken_once() -> None:
    memory = _C.SharedMemory(2)
    joined: list[_C.Communicator] = []
    other = threading.Thread(target=lambda: joined.append(_C.join_shared_memory(memory.path, 1, 2)))
    other.start()
    joined.append(_C.join_shared_memory(memory.path, 0, 2))
    other.join()
    with pytest.raises(_C.Error, match=r"rank 0 of this shared memory is taken"):
        _C.join_shared_memory(memory.path, 0, 2)


def test_memory_made_for_another_size_is_refused() -> None:
    memory = _C.SharedMemory(2)
    with pytest.raises(_C.Error, match="made for other ranks"):
        _C.join_shared_memory(memory.path, 0, 3)
    with pytest.raises(_C.Error, match="cannot open shared memory"):
        _C.join_shared_memory("/proc/self/fd/987", 0, 2)
    with pytest.raises(_C.Error, match="between 1 and 128 ranks"):
        _C.SharedMemory(129)


def test_closed_is_closed() -> None:
    world = _C.local_communicator()
    world.close()
    world.close()
    with pytest.raises(_C.Error, match="closed"):
        world.barrier()


def test_an_interrupt_ends_a_wait() -> None:
    memory = _C.SharedMemory(2)
    waiting, other = (member(memory.path, rank, 2, doing) for rank, doing in enumerate(("barrier", "hang")))
    assert waiting.stdout is not None and other.stdout is not None
    assert waiting.stdout.readline() == "here\n"
    waiting.send_signal(signal.SIGINT)
    _, errors = waiting.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    other.kill()
    other.communicate()


def test_nothing_is_left_in_dev_shm() -> None:
    folder = Path("/dev/shm")
    before = set(folder.iterdir())
    memory = _C.SharedMemory(2)
    processes = [member(memory.path, rank, 2, "hang") for rank in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        during = set(folder.iterdir())
        assert not {path for path in during - before if "fastserve" in path.name}
    for process in processes:
        process.kill()
        process.communicate()
    assert not {path for path in set(folder.iterdir()) - before if "fastserve" in path.name}
