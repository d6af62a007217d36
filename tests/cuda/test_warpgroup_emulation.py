"""The emulated machine reads shared memory by matrix descriptors as PTX says, and finds what compute capability 9.0
would not forgive: missing waits and fences, wrong layouts, barriers that nobody has made."""

from __future__ import annotations

import re
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest

DTYPES = ["bfloat16", "float16"]


@pytest.fixture(autouse=True)
def _emulated(kernels: ModuleType) -> None:
    if not hasattr(kernels, "simt"):
        pytest.skip("these kernels run on a GPU")


class Place(NamedTuple):
    """Where an operand lies in shared memory, as example_product() takes it; all in bytes."""

    offset: int
    step: int  # from 16 inputs to the next
    swizzle: int
    leading: int
    stride: int


def _bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Of numbers that the type holds exactly."""
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _swizzled(address: int, swizzle: int) -> int:
    """CuTe's Swizzle<log2(swizzle / 16), 4, 3> of a byte's address: so many bits from 4 on, by those from 7 on."""
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    return address ^ (address >> 7 & mask) << 4


def _lay(image: np.ndarray, matrix: np.ndarray, offset: int, swizzle: int) -> Place:
    """Puts 16-bit elements [rows, k] into shared memory in PTX's canonical K-major layout of a swizzle: ((8, m), (T,
    2k)) with strides ((1T, SBO), (1, LBO)) if there is none, else ((wT, SBO), (1, T)), T elements being 16 bytes and
    wT a row of the swizzle. Its place, with leading and stride offsets of the layout."""
    rows, k = matrix.shape
    if swizzle == 0:
        leading, stride = 8 * 16, k // 8 * 8 * 16  # core matrices of 8 rows one behind the other along k
        step = 2 * leading
    else:
        assert k * 2 <= swizzle  # one pattern wide
        leading, stride, step = 16, 8 * swizzle, 32
    data = np.ascontiguousarray(matrix).view(np.uint8).reshape(rows, k, 2)
    for row in range(rows):
        for column in range(k):
            if swizzle == 0:
                at = row // 8 * stride + row % 8 * 16 + column // 8 * leading + column % 8 * 2
            else:
                at = row // 8 * stride + row % 8 * swizzle + column * 2
            at = _swizzled(offset + at, swizzle)
            image[at : at + 2] = data[row, column]
    return Place(offset, step, swizzle, leading, stride)


class Case(NamedTuple):
    image: np.ndarray
    a: Place
    b: Place
    onto: np.ndarray
    product: np.ndarray
    steps: int


def _case(dtype: str, swizzles: tuple[int, int], columns: int = 16, steps: int | None = None) -> Case:
    rng = np.random.default_rng(sum(swizzles) + columns)
    narrow = min([swizzle for swizzle in swizzles if swizzle > 0], default=64)
    k = 16 * steps if steps is not None else narrow // 2
    left, right = (rng.integers(-4, 5, (rows, k)).astype(np.float32) for rows in (64, columns))
    onto = rng.integers(-9, 10, (64, columns)).astype(np.float32)
    image = np.zeros(16384 + columns * 128, np.uint8)
    a = _lay(image, _bits(left, dtype), 0, swizzles[0])
    b = _lay(image, _bits(right, dtype), 16384, swizzles[1])
    return Case(image, a, b, onto, onto + left @ right.T, k // 16)  # small integers: exact in whatever order


@pytest.mark.parametrize("swizzles", [(128, 128), (64, 64), (32, 32), (0, 0), (128, 0), (32, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_read_the_canonical_layouts(kernels: ModuleType, dtype: str, swizzles: tuple[int, int]) -> None:
    case = _case(dtype, swizzles)
    got = kernels.example_product("right", dtype, case.image, case.a, case.b, case.steps, case.onto)
    assert np.array_equal(got, case.product)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wide_product_has_its_sums_where_the_fragments_say(kernels: ModuleType, dtype: str) -> None:
    case = _case(dtype, (128, 128), columns=192)
    got = kernels.example_product("right", dtype, case.image, case.a, case.b, case.steps, case.onto)
    assert np.array_equal(got, case.product)


@pytest.mark.parametrize("operand", ["a", "b"])
@pytest.mark.parametrize(
    ("swizzle", "wrong"),
    [
        (128, {"swizzle": 64}),
        (128, {"swizzle": 32}),
        (128, {"swizzle": 0}),
        (128, {"stride": 512}),
        (128, {"stride": 128}),
        (64, {"swizzle": 128}),
        (64, {"stride": 1024}),
        (128, {"step": 16}),
        (128, {"step": 64}),
        (0, {"leading": 256}),
        (0, {"stride": 128}),
        (0, {"swizzle": 128}),
    ],
)
def test_a_wrong_layout_makes_a_wrong_product(
    kernels: ModuleType, operand: str, swizzle: int, wrong: dict[str, int]
) -> None:
    case = _case("bfloat16", (swizzle, swizzle))
    case = case._replace(**{operand: getattr(case, operand)._replace(**wrong)})
    try:
        got = kernels.example_product("right", "bfloat16", case.image, case.a, case.b, case.steps, case.onto)
    except kernels.Error as error:
        assert re.search(r"pattern does not begin at|reads out of the block's", str(error))
    else:
        assert not np.array_equal(got, case.product)


def test_what_is_not_used_of_a_descriptor_does_not_matter(kernels: ModuleType) -> None:
    case = _case("bfloat16", (128, 128))
    a = case.a._replace(leading=4096)  # of a swizzled layout
    got = kernels.example_product("right", "bfloat16", case.image, a, case.b, case.steps, case.onto)
    assert np.array_equal(got, case.product)


@pytest.mark.parametrize("how", ["no wait", "no commit", "overwritten"])
def test_a_missing_wait_makes_a_wrong_product(kernels: ModuleType, how: str) -> None:
    case = _case("bfloat16", (128, 128))
    got = kernels.example_product(how, "bfloat16", case.image, case.a, case.b, case.steps, case.onto)
    assert not np.array_equal(got, case.product)


PRODUCT_ERRORS = {
    "no fence": r"multiply_async without a fence since its sums were changed",
    "changed after the fence": r"multiply_async without a fence since its sums were changed",
    "changed under way": r"has changed sums that a product is under way to",
    "left": r"has exited before products that it began were done",
}


@pytest.mark.parametrize("how", PRODUCT_ERRORS)
def test_mistakes_with_products_are_told(kernels: ModuleType, how: str) -> None:
    case = _case("float16", (128, 128))
    with pytest.raises(kernels.Error, match=PRODUCT_ERRORS[how]):
        kernels.example_product(how, "float16", case.image, case.a, case.b, case.steps, case.onto)


def test_an_unaligned_pattern_is_told(kernels: ModuleType) -> None:
    case = _case("float16", (128, 128))
    a = case.a._replace(offset=128)
    with pytest.raises(kernels.Error, match="pattern does not begin at a multiple of 1024 bytes"):
        kernels.example_product("right", "float16", case.image, a, case.b, case.steps, case.onto)


# ---- copies of tiles


def _copied(matrix: np.ndarray, tiles: int) -> np.ndarray:
    padded = np.zeros((tiles * 16, 128), np.uint16)
    padded[: len(matrix)] = matrix[: tiles * 16]
    rows = padded.reshape(tiles, 16, 128)
    expected = np.zeros((tiles, 2, 16, 64), np.uint16)
    for block in range(2):
        expected[:, block, :8] = rows[:, :8, :64]
        expected[:, block, 8:] = rows[:, 8:, 64 * block : 64 * block + 64]
    return expected


MATRIX = np.random.default_rng(5).integers(1, 1 << 15, (44, 128)).astype(np.uint16)


@pytest.mark.parametrize("seed", range(5))
def test_tiles_come_to_both_blocks_with_zeros_beyond_the_matrix(kernels: ModuleType, seed: int) -> None:
    kernels.simt.configure("random", seed)
    assert np.array_equal(kernels.example_copies("right", MATRIX, 3), _copied(MATRIX, 3))


COPY_ERRORS = {
    "too few bytes": r"no thread can go on; .* waits in wait_barrier",
    "not published": r"copy_tile with a barrier that was not published|arrive_at a barrier that was not published",
    "no barrier yet": r"there is no barrier yet",
    "too many arrivals": r"more arrivals than the barrier expects",
}


@pytest.mark.parametrize("how", COPY_ERRORS)
def test_mistakes_with_barriers_are_told(kernels: ModuleType, how: str) -> None:
    for seed in range(4):
        kernels.simt.configure("random", seed)
        with pytest.raises(kernels.Error, match=COPY_ERRORS[how]):
            kernels.example_copies(how, MATRIX, 3)


@pytest.mark.parametrize("how", ["no wait", "reused", "gone"])
def test_shared_memory_that_others_use_shows(kernels: ModuleType, how: str) -> None:
    """A tile that is read before it is there, one that is copied over another which is still read, and a block that
    ends while its partner copies to it: mostly, since on the device too it is a matter of time."""
    shown = 0
    for seed in range(20):
        kernels.simt.configure("random", seed)
        try:
            shown += not np.array_equal(kernels.example_copies(how, MATRIX, 3), _copied(MATRIX, 3))
        except kernels.Error as error:
            assert re.search(r"has ended|another copy is going|no thread can go on|more arrivals", str(error))
            shown += 1
    assert shown > 10
