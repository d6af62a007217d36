"""Matrix products on the device, against NumPy in float64; and that a row is the same in every one of the kernels."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import groups
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

GGUF_TYPES = list(groups.BYTES)
QUANTIZED = ["int8", *GGUF_TYPES]
DTYPES = ["float32", "bfloat16", "float16"]
# Half the distance of neighbouring numbers, relative.
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}
# Of a term of a sum: a GPU's matrix instructions cut off what a float32 has no room for, others round it.
SUM_UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-23, "float16": 2.0**-23}
KERNELS = ["rows8", "rows16", "split32", "split64", "split128", "wide64", "large128"]
PARTS, SLAB = 4, 64
PAIRS = [(dtype, format) for dtype in DTYPES for format in [dtype, *QUANTIZED]]


def _round(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return x
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def _random(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1)


def _source(format: str, n: int, k: int, seed: int = 0) -> tuple[str, np.ndarray, np.ndarray]:
    """The type and the bytes to load, and as float32 [n, k] what the matrix holds before it meets activations. int8:
    times its scales, as float64."""
    values = _random(n, k, seed)
    values[n // 2] = 0
    if format in GGUF_TYPES:
        data = groups.encode(values, format)
        return format, data.reshape(-1), groups.decode(data, format)
    if format == "int8":
        scale = np.abs(values).max(1, keepdims=True) / np.float32(127)
        levels = np.rint(values / np.where(scale == 0, 1, scale))
        return "f32", _bytes(values), levels.astype(np.float64) * scale
    return "f32", _bytes(values), _round(values, format)


def _matrix(kernels: ModuleType, dtype: str, format: str, n: int, k: int, seed: int = 0) -> tuple[Any, np.ndarray]:
    """A matrix and its weights as activations of a type meet them."""
    kind, data, held = _source(format, n, k, seed)
    matrix = kernels.Matrix(n, k, format)
    matrix.load_rows(kind, data)
    return matrix, held if format == "int8" else _round(held, dtype)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize(("n", "k"), [(1, 32), (75, 96), (130, 1056), (257, 320)])
@pytest.mark.parametrize(("dtype", "format"), PAIRS)
def test_a_product_is_that_of_the_rounded_factors(kernels: ModuleType, dtype: str, format: str, n: int, k: int) -> None:
    """Off by k additions and int8's scale at most."""
    matrix, weight = _matrix(kernels, dtype, format, n, k)
    for m in (1, 5, 16, 17, 70):
        x = _random(m, k, seed=m)
        rounded = _round(x, dtype).astype(np.float64)
        error = (k + PARTS + 1) * SUM_UNIT[dtype] * (np.abs(rounded) @ np.abs(weight.T.astype(np.float64)))
        exact = rounded @ weight.T.astype(np.float64)
        assert (np.abs(matrix.multiply(x, dtype) - exact) <= error).all()
        narrow = matrix.multiply(x, dtype, wide=False)
        assert _same(narrow, _round(matrix.multiply(x, dtype), dtype))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 31), (9, 65), (40, 2100)])
@pytest.mark.parametrize(("dtype", "format"), [*zip(DTYPES, DTYPES, strict=True), ("bfloat16", "int8")])
def test_without_groups_any_width_will_do(kernels: ModuleType, dtype: str, format: str, n: int, k: int) -> None:
    matrix, weight = _matrix(kernels, dtype, format, n, k)
    x = _random(19, k, seed=1)
    rounded = _round(x, dtype).astype(np.float64)
    error = (k + PARTS + 1) * SUM_UNIT[dtype] * (np.abs(rounded) @ np.abs(weight.T.astype(np.float64)))
    for kernel in KERNELS:
        result = matrix.multiply(x, dtype, kernel=kernel)
        assert (np.abs(result - rounded @ weight.T.astype(np.float64)) <= error).all()


@pytest.mark.parametrize("k", [64, 128, 320, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_have_the_order_that_the_header_promises(kernels: ModuleType, dtype: str, k: int) -> None:
    """Bit by bit: products of numbers this short are exact, so that a fused step is one addition. A GPU's matrix
    instructions add 16 products in an order of their own."""
    if dtype != "float32" and not hasattr(kernels, "simt"):
        pytest.skip("the order within a matrix instruction is the GPU's")
    n, m, padded = 21, 7, -(-k // SLAB) * SLAB
    source = _round(_random(n, k, seed=0), "bfloat16")
    matrix = kernels.Matrix(n, k, dtype)
    matrix.load_rows("f32", _bytes(source))
    x = _round(_random(m, k, seed=1), "bfloat16")
    a, b = np.zeros((m, padded), np.float32), np.zeros((n, padded), np.float32)
    a[:, :k], b[:, :k] = _round(x, dtype), _round(source, dtype)
    parts = []
    for part in range(PARTS):
        chain = np.zeros((m, n), np.float32)
        for i in range(padded // SLAB * part // PARTS * SLAB, padded // SLAB * (part + 1) // PARTS * SLAB):
            chain += a[:, i, None] * b[None, :, i]
        parts.append(chain)
    total = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    for kernel in KERNELS:
        assert _same(matrix.multiply(x, dtype, kernel=kernel), total), kernel


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pair=st.sampled_from(PAIRS),
    n=st.integers(1, 300),
    groups=st.integers(1, 20),
    m=st.integers(1, 140),
    window=st.tuples(st.integers(0, 139), st.integers(1, 140)),
    chosen=st.tuples(st.sampled_from([None, *KERNELS]), st.sampled_from([None, *KERNELS])),
    seed=st.integers(0, 2**31),
)
def test_a_row_is_the_same_in_every_batch_and_kernel(
    kernels: ModuleType,
    pair: tuple[str, str],
    n: int,
    groups: int,
    m: int,
    window: tuple[int, int],
    chosen: tuple[str | None, str | None],
    seed: int,
) -> None:
    dtype, format = pair
    matrix, _ = _matrix(kernels, dtype, format, n, groups * 32, seed)
    x = _random(m, groups * 32, seed + 1)
    first = window[0] % m
    part = x[first : first + window[1]]
    together = matrix.multiply(x, dtype, kernel=chosen[0])
    alone = matrix.multiply(part, dtype, kernel=chosen[1])
    assert _same(together[first : first + window[1]], alone)
    assert _same(matrix.multiply(part, dtype, workspace=False), alone)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "format"), PAIRS)
def test_every_kernel_gives_every_format_the_same_bits(
    kernels: ModuleType, dtype: str, format: str, kernel: str
) -> None:
    """With several tiles each way, and row tiles in more than one band."""
    n, k, m = 264, 352, 70
    matrix, _ = _matrix(kernels, dtype, format, n, k)
    x = _random(m, k, seed=3)
    alone = np.concatenate([matrix.multiply(x[i : i + 1], dtype) for i in (0, 33, 69)])
    assert _same(matrix.multiply(x, dtype, kernel=kernel)[[0, 33, 69]], alone)


def test_row_tiles_in_bands_cover_the_output_once(kernels: ModuleType) -> None:
    """Tiles of 64 and 128 rows in bands of 16: one band and a part of the next."""
    matrix, _ = _matrix(kernels, "bfloat16", "bfloat16", 300, 64)
    x = _random(64 * 16 + 70, 64, seed=4)
    result = matrix.multiply(x, "bfloat16", kernel="wide64")
    assert _same(result, matrix.multiply(x, "bfloat16", kernel="rows8"))
    assert _same(result, matrix.multiply(x, "bfloat16", kernel="split32"))


@pytest.mark.parametrize("m", [3, 70])
@pytest.mark.parametrize("kernel", [None, "rows16", "split64", "large128"])
@pytest.mark.parametrize(
    ("dtype", "format"), [("float32", "q4_0"), ("bfloat16", "bfloat16"), ("float16", "int8"), ("bfloat16", "q4_1")]
)
def test_bias_and_accumulation(kernels: ModuleType, dtype: str, format: str, kernel: str | None, m: int) -> None:
    matrix, _ = _matrix(kernels, dtype, format, 75, 96)
    x, bias, onto = _random(m, 96, seed=5), _random(1, 75, seed=6)[0], _random(m, 75, seed=7)
    plain = matrix.multiply(x, dtype, kernel=kernel)
    assert _same(matrix.multiply(x, dtype, kernel=kernel, bias=bias), plain + bias)
    assert _same(matrix.multiply(x, dtype, kernel=kernel, onto=onto), onto + plain)
    assert _same(matrix.multiply(x, dtype, kernel=kernel, bias=bias, onto=onto), onto + (plain + bias))
    narrow = matrix.multiply(x, dtype, kernel=kernel, bias=bias, wide=False)
    assert _same(narrow, _round(plain + bias, dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_stays_in_its_row(kernels: ModuleType, bad: float, kernel: str) -> None:
    matrix, _ = _matrix(kernels, "bfloat16", "bfloat16", 75, 96)
    x = _random(20, 96, seed=8)
    sound = matrix.multiply(x, "bfloat16", kernel=kernel)
    x[2, 50] = bad
    result = matrix.multiply(x, "bfloat16", kernel=kernel)
    assert not np.isfinite(np.delete(result[2], 75 // 2)).any()  # that column's weights are zero
    assert _same(np.delete(result, 2, 0), np.delete(sound, 2, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_int8_weight_that_is_not_a_number_spoils_its_output_only(kernels: ModuleType, dtype: str) -> None:
    values = np.ones((40, 64), np.float32)
    values[7, 3] = np.inf
    matrix = kernels.Matrix(40, 64, "int8")
    matrix.load_rows("f32", _bytes(values))
    result = matrix.multiply(np.ones((1, 64), np.float32), dtype)
    assert np.isnan(result[0]).nonzero()[0].tolist() == [7]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", GGUF_TYPES)
def test_every_value_that_a_file_may_hold(kernels: ModuleType, dtype: str, format: str) -> None:
    """All bytes and nibbles at all places of a group, by products with unit vectors, which are exact."""
    size = groups.BYTES[format]
    rng = np.random.default_rng(9)
    blocks = rng.integers(0, 256, (64, 4, size), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.1, (64, 4)).astype(np.float16) * rng.choice([-1, 1], (64, 4)).astype(np.float16)
    blocks[..., :2] = scales.view(np.uint8).reshape(64, 4, 2)
    if format == "q4_1":
        minima = rng.uniform(-1, 1, (64, 4)).astype(np.float16)
        blocks[..., 2:4] = minima.view(np.uint8).reshape(64, 4, 2)
    held = groups.decode(blocks.reshape(64, -1), format)
    matrix = kernels.Matrix(64, 128, format)
    matrix.load_rows(format, blocks.reshape(-1))
    assert np.array_equal(matrix.multiply(np.eye(128, dtype=np.float32), dtype), _round(held, dtype).T)


@pytest.mark.parametrize("format", [*DTYPES, *QUANTIZED])
def test_rows_may_come_in_pieces(kernels: ModuleType, format: str) -> None:
    """That cut the groups of eight outputs which share memory."""
    n, k, dtype = 45, 96, format if format in DTYPES else "bfloat16"
    kind, data, _ = _source(format, n, k)
    whole, pieces = kernels.Matrix(n, k, format), kernels.Matrix(n, k, format)
    whole.load_rows(kind, data)
    rows = data.reshape(n, -1)
    for first, last in [(9, 30), (0, 3), (3, 9), (30, 31), (31, 45)]:
        pieces.load_rows(kind, rows[first:last].reshape(-1), first)
    x = _random(4, k, seed=10)
    assert _same(pieces.multiply(x, dtype), whole.multiply(x, dtype))


@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q8_1", "q4_0", "q4_1"])
def test_rows_of_every_type_become_the_matrix_type(kernels: ModuleType, format: str, kind: str) -> None:
    n, k = 10, 96
    values = _random(n, k, seed=11)
    values[0, :4] = [65519, 65520, 6e-8, -1e-9]  # the largest of float16 and beyond, the smallest and below
    if kind == "q8_1":
        blocks = groups.encode(values, "q8_0").reshape(-1, 34)
        data = np.concatenate([blocks[:, :2], np.zeros((len(blocks), 2), np.uint8), blocks[:, 2:]], axis=1)
        held = groups.decode(blocks.reshape(n, -1), "q8_0")
    elif kind in GGUF_TYPES:
        data = groups.encode(values, kind)
        held = groups.decode(data, kind)
    else:
        held = _round(values, {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[kind])
        data = held.view(np.uint32) >> 16 if kind == "bf16" else held
        data = data.astype({"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[kind])
    matrix = kernels.Matrix(n, k, format)
    matrix.load_rows(kind, _bytes(data))
    unit = np.eye(k, dtype=np.float32)
    with np.errstate(invalid="ignore"):  # infinite weights, which there are, make the others of their row NaN
        expected = unit @ _round(held, format).T
    assert np.array_equal(matrix.multiply(unit, format), expected, equal_nan=True)


@pytest.mark.parametrize(("format", "bits"), [("bfloat16", 16), ("int8", 8), ("q8_0", 8.5), ("q4_0", 4.5), ("q4_1", 5)])
def test_bytes_are_those_of_the_file(kernels: ModuleType, format: str, bits: float) -> None:
    n, k = 512, 1024
    assert kernels.Matrix(n, k, format).bytes == n * k * bits / 8 + (4 * n if format == "int8" else 0)


@pytest.mark.parametrize(
    ("dtype", "format"),
    [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32"), ("float16", "bfloat16")],
)
def test_activations_and_weights_of_two_types_are_refused(kernels: ModuleType, dtype: str, format: str) -> None:
    matrix = kernels.Matrix(8, 64, format)
    with pytest.raises(kernels.Error, match=f"{dtype} activations cannot have {format} weights"):
        matrix.multiply(np.zeros((1, 64), np.float32), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_that_vectors_cannot_be_read_of_is_refused(kernels: ModuleType, dtype: str) -> None:
    matrix, _ = _matrix(kernels, dtype, dtype, 64, 64)
    x, bias = np.ones((1, 64), np.float32), np.ones(64, np.float32)
    matrix.multiply(x, dtype, bias=bias)
    with pytest.raises(kernels.Error, match="bias is not at a multiple of 16 bytes"):
        matrix.multiply(x, dtype, bias=bias, bias_at=1)


def test_accumulation_in_16_bits_is_refused(kernels: ModuleType) -> None:
    matrix = kernels.Matrix(8, 64, "bfloat16")
    x, onto = np.zeros((1, 64), np.float32), np.zeros((1, 8), np.float32)
    with pytest.raises(kernels.Error, match="accumulated in float32 only"):
        matrix.multiply(x, "bfloat16", wide=False, onto=onto)


@pytest.mark.parametrize("format", GGUF_TYPES)
def test_groups_take_their_own_type_and_whole_groups(kernels: ModuleType, format: str) -> None:
    with pytest.raises(kernels.Error, match="multiple of 32 inputs, not 33"):
        kernels.Matrix(4, 33, format)
    matrix = kernels.Matrix(4, 32, format)
    with pytest.raises(kernels.Error, match="rows of its own type"):
        matrix.load_rows("f32", np.zeros(4 * 32 * 4, np.uint8))
    with pytest.raises(kernels.Error, match=r"4 rows has no rows \[3, 5\)"):
        matrix.load_rows(format, np.zeros(2 * groups.BYTES[format], np.uint8), 3)


SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (576, 576), (1280, 8192)]


@pytest.mark.parametrize("format", ["bfloat16", *QUANTIZED])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_chosen_kernel_can_run(kernels: ModuleType, format: str, n: int, k: int) -> None:
    """On devices with little shared memory, and without a workspace."""
    assert sorted(KERNELS + kernels.WARPGROUP_KERNELS) == sorted(kernels.GEMM_KERNELS)
    for m in (1, 8, 16, 33, 64, 100, 256, 2048, 8192):
        for shared in (99 * 1024, 163 * 1024, 227 * 1024):
            kernel = kernels.choose_gemm(m, n, k, format, shared_bytes=shared)
            assert kernels.gemm_shared_bytes(kernel, format) <= shared
        assert kernels.choose_gemm(m, n, k, format, workspace=False) not in kernels.GEMM_SPLIT_KERNELS


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_few_rows_read_weights_once_and_many_keep_the_device_busy(kernels: ModuleType, n: int, k: int) -> None:
    assert kernels.choose_gemm(1, n, k, "bfloat16") == "rows8"
    if n >= 4096:
        assert kernels.choose_gemm(64, n, k, "bfloat16") in ("split64", "wide64")
        assert kernels.choose_gemm(2048, n, k, "bfloat16") == "large128"


def test_a_device_that_no_kernel_fits_is_named(kernels: ModuleType) -> None:
    with pytest.raises(kernels.Error, match="49152 bytes of shared memory"):
        kernels.choose_gemm(1, 64, 64, "bfloat16", shared_bytes=48 * 1024)


def test_a_kernel_is_allowed_its_shared_memory_once_on_each_device(kernels: ModuleType) -> None:
    if not hasattr(kernels, "simt"):
        pytest.skip("on the emulated device only")
    matrix, _ = _matrix(kernels, "bfloat16", "bfloat16", 16, 64)
    x = _random(3, 64, seed=1)
    assert kernels.gemm_shared_bytes("rows8", "bfloat16") > 48 * 1024
    first = matrix.multiply(x, "bfloat16", kernel="rows8")
    asked = kernels.simt.attributes_set()
    assert _same(matrix.multiply(x, "bfloat16", kernel="rows8"), first)
    assert kernels.simt.attributes_set() == asked
    kernels.set_device(1)
    try:  # where it has not been: the device would refuse the launch
        there, _ = _matrix(kernels, "bfloat16", "bfloat16", 16, 64)
        assert _same(there.multiply(x, "bfloat16", kernel="rows8"), first)
    finally:
        kernels.set_device(0)
