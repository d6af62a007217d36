"""What ranks tell each other, against NumPy. Ranks are threads here; test_mpi.py has processes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import each_rank, each_rank_well

from fastserve import _C

# (ranks, the machine of each): within one, and across several, in order and not
PLACES = [
    (1, None), (2, None), (3, None), (4, None), (7, None),
    (2, [0, 1]), (4, [0, 0, 1, 1]), (4, [0, 1, 0, 1]), (5, [1, 0, 0, 2, 1]), (3, [0, 1, 2]),
]  # fmt: skip
SLOT = 256 * 1024 // 4  # floats of one chunk

places = pytest.mark.parametrize(("size", "machines"), PLACES, ids=str)


def rank_ordered_sum(parts: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    total = parts[0].copy()
    for part in parts[1:]:
        total = total + part
    return total


def contributions(seed: int, size: int, count: int) -> npt.NDArray[np.float32]:
    """Values whose sum depends on the order it is made in."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((size, count)) * 10.0 ** rng.integers(-4, 5, (size, count))).astype(np.float32)


@places
@pytest.mark.parametrize(
    "count", [0, 1, 2, 3, 577, 4096, 8192, 8193, 12 * 1024 + 5, SLOT - 1, SLOT, SLOT + 1, 3 * SLOT + 7]
)
def test_sums_are_numpys_in_rank_order(size: int, machines: list[int] | None, count: int) -> None:
    parts = contributions(count, size, count)

    def body(world: _C.Communicator) -> bytes:
        values = parts[world.rank].copy()
        world.all_reduce_sum(values)
        return values.tobytes()

    assert set(each_rank_well(size, body, machines)) == {rank_ordered_sum(parts).tobytes()}


def test_the_order_is_what_the_sums_depend_on() -> None:
    parts = contributions(3, 4, 4096)
    assert rank_ordered_sum(parts).tobytes() != rank_ordered_sum(parts[::-1]).tobytes()


@places
def test_many_sums_in_a_row(size: int, machines: list[int] | None) -> None:
    """Slots are filled again while others may still read them."""
    rounds = [contributions(i, size, 1 + i * 97 % 700) for i in range(200)]

    def body(world: _C.Communicator) -> list[bytes]:
        results = []
        for parts in rounds:
            values = parts[world.rank].copy()
            world.all_reduce_sum(values)
            results.append(values.tobytes())
        return results

    expected = [rank_ordered_sum(parts).tobytes() for parts in rounds]
    assert all(result == expected for result in each_rank_well(size, body, machines))


@places
@pytest.mark.parametrize("scale", [0, 1, 13, 100_003])
def test_all_gather(size: int, machines: list[int] | None, scale: int) -> None:
    sizes = [scale * (rank + 1) % (5 * scale + 1) for rank in range(size)]
    parts = [np.random.default_rng(rank).integers(0, 256, length, np.uint8) for rank, length in enumerate(sizes)]

    def body(world: _C.Communicator) -> tuple[bytes, bytes]:
        uneven = world.all_gather(parts[world.rank], sizes).tobytes()
        return uneven, world.all_gather(np.full(scale, world.rank, np.int32)).tobytes()

    expected = b"".join(part.tobytes() for part in parts), np.repeat(np.arange(size, dtype=np.int32), scale).tobytes()
    assert set(each_rank_well(size, body, machines)) == {expected}


@places
@pytest.mark.parametrize("length", [0, 1, 4096, 262_144, 600_001])
def test_broadcast_from_every_rank(size: int, machines: list[int] | None, length: int) -> None:
    def said(root: int) -> npt.NDArray[np.uint8]:
        return np.random.default_rng(root).integers(0, 256, length, np.uint8)

    def body(world: _C.Communicator) -> list[bytes]:
        heard = []
        for root in range(world.size):
            data = said(root) if world.rank == root else np.zeros(length, np.uint8)
            world.broadcast(data, root)
            heard.append(data.tobytes())
        return heard

    expected = [said(root).tobytes() for root in range(size)]
    assert all(heard == expected for heard in each_rank_well(size, body, machines))


def test_collectives_of_every_kind_mixed() -> None:
    """Rounds of roots that run ahead and of meetings, in one order; slots and flags are shared by all."""
    rng = np.random.default_rng(5)
    calls = [(int(rng.integers(4)), int(rng.integers(3)), int(rng.integers(1, 5000))) for _ in range(400)]

    def body(world: _C.Communicator) -> list[float]:
        seen = []
        for kind, root, length in calls:
            data = np.full(length, world.rank + 1, np.float32)
            if kind == 0:
                world.all_reduce_sum(data)
            elif kind == 1:
                world.broadcast(data, root)
            elif kind == 2:
                data = world.all_gather(data).view(np.float32)
            else:
                world.barrier()
                data[:] = 0
            seen.append(float(data.sum()))
        return seen

    expected = [(6 * n, (root + 1) * n, 6 * n, 0)[kind] for kind, root, n in calls]
    assert each_rank_well(3, body) == [expected] * 3


@places
@settings(max_examples=5)
@given(data=st.data())
def test_messages_arrive_in_order(size: int, machines: list[int] | None, data: st.DataObject) -> None:
    """Every rank sends to every other; receives are begun late or early, long messages overtake nothing."""
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 7, 8, 4096, 262_136, 262_144, 700_001]), max_size=6))

    def content(source: int, to: int, index: int) -> bytes:
        return bytes([source * 16 + to, index]) * lengths[index]

    def body(world: _C.Communicator) -> bool:
        peers = [rank for rank in range(world.size) if rank != world.rank]
        requests, arrived = [], []
        for index, length in enumerate(lengths):
            for peer in peers:
                requests.append(world.send(content(world.rank, peer, index), peer))
            for peer in peers:
                memory = np.zeros(2 * length, np.uint8)
                requests.append(world.receive(memory, peer))
                arrived.append((memory, content(peer, world.rank, index)))
        for request in reversed(requests):
            request.wait()
            assert request.test()
        return all(memory.tobytes() == expected for memory, expected in arrived)

    assert all(each_rank_well(size, body, machines))


def test_a_message_that_fits_needs_no_receiver_to_be_done() -> None:
    def body(world: _C.Communicator) -> bool:
        done = True
        if world.rank == 0:
            done = world.send(b"activations" * 1000, 1).test()
        world.barrier()
        memory = bytearray(11_000)
        if world.rank == 1:
            world.receive(memory, 0).wait()
            done = memory == b"activations" * 1000
        return done

    assert each_rank_well(2, body) == [True, True]


@pytest.mark.parametrize("machines", [None, [0, 0, 0, 1, 1, 1]], ids=str)
def test_split(machines: list[int] | None) -> None:
    """A grid of two stages of three, and a rank in none."""

    def body(world: _C.Communicator) -> tuple[int, int, float, list[int]] | None:
        nobody = world.split(-1)
        assert nobody is None
        part = world.split(world.rank % 2, -world.rank)  # in reverse
        assert part is not None
        values = np.full(1000, 10.0**world.rank, np.float32)
        part.all_reduce_sum(values)
        again = part.split(part.rank // 2)
        assert again is not None
        members = [rank for rank, _, _ in again.members]
        result = part.rank, part.size, float(values[0]), members
        again.close()
        part.close()
        return result

    even, odd = 1.0 + 1e2 + 1e4, 1e1 + 1e3 + 1e5
    assert each_rank_well(6, body, machines) == [
        (2, 3, even, [0]),
        (2, 3, odd, [1]),
        (1, 3, even, [4, 2]),
        (1, 3, odd, [5, 3]),
        (0, 3, even, [4, 2]),
        (0, 3, odd, [5, 3]),
    ]


def test_one_rank_by_itself() -> None:
    world = _C.local_communicator("here")
    values = np.arange(5, dtype=np.float32)
    world.all_reduce_sum(values)
    assert values.tolist() == [0, 1, 2, 3, 4]
    assert world.all_gather(b"abc").tobytes() == b"abc"
    world.broadcast(values, 0)
    world.barrier()
    part = world.split(0)
    assert part is not None and (part.rank, part.size) == (0, 1)
    assert world.split(-1) is None
    assert world.members[0][::2] == (0, "here")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda world: world.broadcast(bytearray(1), 2), "rank 2 of 2 cannot broadcast"),
        (lambda world: world.send(b"", 0), "has no peer"),
        (lambda world: world.receive(bytearray(1), 5), "has no peer 5"),
        (lambda world: world.all_gather(b"abc", [3]), "takes 2 sizes, got 1"),
        (lambda world: world.all_gather(b"abc", [2, 2]), "gives 3 bytes of 2"),
        (lambda world: world.all_gather(b"", [-1, 0]), "cannot give -1 bytes"),
        (lambda world: world.broadcast(np.zeros((4, 4))[:, 1]), "contiguous"),
        (lambda world: world.set_timeout(0.0), "timeout must be a positive number"),
    ],
)
def test_a_call_that_cannot_be_is_refused_and_changes_nothing(call: object, message: str) -> None:
    def body(world: _C.Communicator) -> str:
        refused = ""
        if world.rank == 0:
            with pytest.raises(_C.Error, match=message) as caught:
                call(world)  # type: ignore[operator]
            refused = str(caught.value)
        world.barrier()
        return refused

    assert message in each_rank_well(2, body)[0]


def test_sums_are_of_float32_and_in_place() -> None:
    world = _C.local_communicator()
    with pytest.raises(TypeError):
        world.all_reduce_sum(np.zeros(3))  # type: ignore[arg-type]


def test_different_calls_at_one_time_are_told() -> None:
    def body(world: _C.Communicator) -> None:
        if world.rank == 0:
            world.all_reduce_sum(np.zeros(5, np.float32))
        else:
            world.broadcast(bytearray(16), 0)

    errors = [str(error) for error in each_rank(2, body)]
    assert any("calls all_reduce of 20 bytes" in text and "calls broadcast of 16 bytes" in text for text in errors)


def test_a_message_of_another_length_is_told() -> None:
    def body(world: _C.Communicator) -> None:
        if world.rank == 0:
            world.send(b"12345", 1).wait()
            world.barrier()
        else:
            world.receive(bytearray(4), 0).wait()

    errors = [str(error) for error in each_rank(2, body)]
    assert all("rank 0 on" in text and "sends 5 bytes where rank 1 on" in text for text in errors), errors
