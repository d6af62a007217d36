"""The emulated CUDA machine does what PTX says, and finds what a GPU would not forgive."""

from __future__ import annotations

import re
from types import ModuleType

import numpy as np
import pytest

LANES = np.arange(32)


@pytest.fixture(autouse=True)
def _emulated(kernels: ModuleType) -> None:
    if not hasattr(kernels, "simt"):
        pytest.skip("these kernels run on a GPU")


@pytest.mark.parametrize("count", [1, 63, 64, 1000])
def test_kernels_run_on_the_cpu(kernels: ModuleType, count: int) -> None:
    a, b = np.arange(count, dtype=np.float32), np.full(count, 0.5, np.float32)
    assert np.array_equal(kernels.example_add("float32", a, b), a + b)


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """Bits of numbers that the type holds exactly."""
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


# ---- warps. What a lane gets, by the CUDA C++ Programming Guide, "Warp Shuffle Functions".
SOURCES = {
    "shfl": LANES * 7 % 32,
    "shfl 8": LANES // 8 * 8 + LANES * 7 % 8,
    "xor": LANES ^ 5,
    # A lane of an earlier group may be read, one of a later group may not: then a lane gets its own.
    "xor 4": np.where((LANES ^ 6) < LANES // 4 * 4 + 4, LANES ^ 6, LANES),
    "up": np.where(LANES >= 3, LANES - 3, LANES),
    "up 8": np.where(LANES % 8 >= 3, LANES - 3, LANES),
    "down": np.where(LANES < 29, LANES + 3, LANES),
    "down 8": np.where(LANES % 8 < 5, LANES + 3, LANES),
    "halves": LANES ^ 1,
}


@pytest.mark.parametrize("name", SOURCES)
def test_shuffles(kernels: ModuleType, name: str) -> None:
    values = np.random.default_rng(1).integers(0, 1 << 30, 32, dtype=np.int32)
    assert np.array_equal(kernels.example_collective(name, values), values[SOURCES[name]])


def test_votes(kernels: ModuleType) -> None:
    values = np.random.default_rng(2).integers(0, 1000, 32, dtype=np.int32)
    ballot = np.array([sum(int(value & 1) << lane for lane, value in enumerate(values))], np.uint32).view(np.int32)
    assert np.array_equal(kernels.example_collective("ballot", values), np.repeat(ballot, 32))
    assert not kernels.example_collective("any", values).any()
    assert kernels.example_collective("all", values).all()
    values[17] = 1001
    assert kernels.example_collective("any", values).all()
    values[3] = -1
    assert not kernels.example_collective("all", values).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrix_products_follow_the_fragments(kernels: ModuleType, dtype: str) -> None:
    random = np.random.default_rng(3)
    a, b = random.integers(-8, 9, (16, 16)).astype(np.float32), random.integers(-8, 9, (16, 8)).astype(np.float32)
    d = random.integers(-100, 101, (16, 8)).astype(np.float32)
    got = kernels.example_multiply(dtype, narrow(a, dtype), narrow(b, dtype), d)
    assert np.array_equal(got, d + a @ b)  # small integers: exact in whatever order
    wrong = kernels.example_multiply(dtype, narrow(a, dtype), narrow(b, dtype), d, swapped=True)
    assert not np.array_equal(wrong, d + a @ b)


def test_matrix_products_sum_in_float32_one_by_one(kernels: ModuleType) -> None:
    a, b = np.zeros((16, 16), np.float32), np.ones((16, 8), np.float32)
    a[0, :3] = 2.0**24, 1, -(2.0**24)  # the 1 is lost
    a[1, :3] = 2.0**24, -(2.0**24), 1
    got = kernels.example_multiply(
        "bfloat16", narrow(a, "bfloat16"), narrow(b, "bfloat16"), np.zeros((16, 8), np.float32)
    )
    assert (got[0] == 0).all() and (got[1] == 1).all() and (got[2:] == 0).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_loads(kernels: ModuleType, transposed: bool) -> None:
    rows = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    got = kernels.example_load_matrices(rows, transposed)
    g, t = LANES // 4, LANES % 4
    for m in range(4):
        matrix = rows[8 * m : 8 * m + 8]
        matrix = matrix.T if transposed else matrix
        assert np.array_equal(got[:, m, 0], matrix[g, 2 * t])
        assert np.array_equal(got[:, m, 1], matrix[g, 2 * t + 1])


# ---- order
VALUES = np.arange(256, dtype=np.float32)


def outcomes(kernels: ModuleType, name: str, count: int = 10) -> list[np.ndarray]:
    got = []
    for seed in range(count):
        kernels.simt.configure("random", seed)
        got.append(kernels.example_planted(name, VALUES))
    return got


def test_right_kernels_come_out_the_same_in_every_order(kernels: ModuleType) -> None:
    rotated = VALUES.copy()
    rotated[:64] = np.roll(VALUES[:64], -3)
    in_warps = VALUES.copy()
    in_warps[:64] = np.roll(VALUES[:64].reshape(2, 32), -1, axis=1).ravel()
    rows = VALUES.reshape(2, 32, 4)[:, ::-1]
    matrices = np.stack([rows[:, 8 * m + LANES // 4, LANES % 4] for m in range(4)], axis=2).ravel()
    handed_over = VALUES.copy()
    handed_over[32:64] = VALUES[:32]
    for name, expected in [
        ("rotate", rotated),
        ("rotate in warp", in_warps),
        ("matrices", matrices),
        ("copies", VALUES),
        ("early", VALUES),
        ("early, constants before the wait", VALUES),
        ("hand over", handed_over),
    ]:
        for got in outcomes(kernels, name):
            assert np.array_equal(got, expected), name


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("rotate, no first barrier", "rotate"),
        ("rotate, no second barrier", "rotate"),
        ("rotate in warp, not synchronized", "rotate in warp"),
        ("matrices, not synchronized", "matrices"),
        ("copies, not waited for", "copies"),
        ("copies, not committed", "copies"),
    ],
)
def test_a_missing_wait_shows_at_once(kernels: ModuleType, wrong: str, right: str) -> None:
    (expected, *_) = outcomes(kernels, right)
    for got in outcomes(kernels, wrong):
        assert not np.array_equal(got, expected)


def test_a_warp_may_be_later_than_any_other(kernels: ModuleType) -> None:
    (expected, *_) = outcomes(kernels, "hand over")
    right = [np.array_equal(got, expected) for got in outcomes(kernels, "hand over, not synchronized", 40)]
    assert any(right) and not all(right)


def test_shared_memory_is_not_a_number_at_first(kernels: ModuleType) -> None:
    assert np.isnan(kernels.example_planted("uninitialized", VALUES)[:64]).all()


# ---- what is an error, and how it is told
ERRORS = {
    "barrier in one branch": r"waits for it in __syncthreads|waits in __syncthreads at .* which has exited",
    "two barriers": r"is in __syncthreads at \S+:\d+ while thread \(\d+, 0, 0\) is in __syncthreads at \S+:\d+",
    "early return": r"thread \(5, 0, 0\).*exited",
    "early return in warp": r"lane 5|thread \(5, 0, 0\): has exited",
    "barrier against shuffle": r"no thread can go on; .* waits in __shfl_xor_sync .*; .* waits in __syncthreads",
    "two shuffles": r"is in __shfl_xor_sync at \S+:\d+ .* while .* is in __shfl_xor_sync at \S+:\d+",
    "mask without self": r"has a mask without this lane, 0xffff",
    "lane outside mask": r"reads lane 20, which is not in the mask",
    "shared overrun": r"shared memory of 256 bytes was written out of bounds, at byte 256",
    "shared underrun": r"shared memory of 256 bytes was written out of bounds, at byte -4",
    "global overrun": r"byte 1024 of an allocation of 1024 bytes was written",
    "global overrun by sums": r"byte 102\d of an allocation of 1024 bytes was written",
    "wild address": r"accesses memory that is not there|accesses .* one that cannot be",
    "null address": r"accesses memory that is not there, at 0",
    "misaligned vector": r"wants an address that is a multiple of 16",
    "misaligned pair": r"wants an address that is a multiple of 8",
    "misaligned copy": r"copy_async wants an address that is a multiple of 16",
    "copy from nowhere": r"copy_async of 16 bytes at \w+, which are not the device's",
    "copy out of shared memory": r"copy_async is out of the block's 256 bytes of shared memory, at byte \d+",
    "register array overrun": r"has an index out of an array's bounds at tests/simt/examples/planted.cu:\d+",
    "long shift": r"shifts by more bits than there are",
    "division by zero": r"divides an integer by zero",
    "early, in one branch": r"shared_memory before let_next_begin, in a kernel that begins early",
    "early, too late": r"shared_memory before let_next_begin, in a kernel that begins early",
    "early, never": r"has exited without wait_for_predecessor, in a kernel that begins early",
    "early, a copy before the wait": r"copy_async before wait_for_predecessor, in a kernel that begins early",
    "early, a barrier before the wait": r"__syncthreads before wait_for_predecessor, in a kernel that begins early",
    "early, a shuffle before the wait": r"__shfl_xor_sync before wait_for_predecessor, in a kernel that begins early",
    "early, alone": r"wait_for_predecessor before let_next_begin, in a kernel that begins early",
    "too much shared memory": r"invalid argument",  # to the call that would allow the kernel so much
}


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_are_told(kernels: ModuleType, name: str) -> None:
    for seed in range(4):
        kernels.simt.configure("random", seed)
        with pytest.raises(kernels.Error) as raised:
            kernels.example_planted(name, VALUES * 0)
        text = str(raised.value)
        assert re.search(ERRORS[name], text), text
        launched = name != "too much shared memory"  # which is refused before
        assert ("kernel launched at tests/simt/examples/planted.cu:" in text) == launched


def test_every_planted_mistake_is_tested(kernels: ModuleType) -> None:
    wrong = {name for name in kernels.planted_names() if name in ERRORS}
    others = set(kernels.planted_names()) - wrong
    assert wrong == set(ERRORS)
    rest = {"rotate", "rotate in warp", "matrices", "copies", "hand over", "uninitialized", "early"}
    assert {name.split(",")[0] for name in others} == rest
