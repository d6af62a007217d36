"""Weights that stay quantized: products on every instruction set against NumPy, and whole models."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from fastserve import _C
from fastserve.native import instruction_sets

BLOCKS = {"q8_0": Type.Q8_0, "q4_0": Type.Q4_0, "q4_1": Type.Q4_1}
FORMATS = ["int8", *BLOCKS]
GROUP = 32
EPS = np.finfo(np.float32).eps


def _weights(format: str, n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, str]:
    """What the matrix holds as float64 [n, k], what is loaded into it, and its type."""
    values = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    values[n // 2] = 0
    if format != "int8":
        data = gguf.quants.quantize(values, BLOCKS[format])
        return gguf.quants.dequantize(data, BLOCKS[format]).astype(np.float64), data.reshape(-1), format
    scale = np.abs(values).max(1, keepdims=True) / np.float32(127)
    held = np.rint(values / np.where(scale == 0, 1, scale)).astype(np.float64) * scale.astype(np.float64)
    return held, values.view(np.uint8).reshape(-1), "f32"


def _matrix(format: str, n: int, k: int, **options: int) -> tuple[_C.Matrix, np.ndarray]:
    held, data, kind = _weights(format, n, k)
    matrix = _C.Matrix(n, k, format, **options)
    matrix.load(kind, data)
    return matrix, held


def _quantized(x: np.ndarray, group: int) -> np.ndarray:
    """What becomes of activations: each group to 255 levels of its own. As float64."""
    m, k = x.shape
    padded = np.zeros((m, -(-k // group), group), np.float32)
    padded.reshape(m, -1)[:, :k] = x
    largest = np.abs(padded).max(-1, keepdims=True)
    with np.errstate(all="ignore"):
        levels = np.rint(padded * (np.float32(127) / largest))
    levels = np.where(largest < 2.0**-100, 0, levels)
    scale = np.where(largest < 2.0**-100, 0, largest / np.float32(127))
    return (levels.astype(np.float64) * scale).reshape(m, -1)[:, :k]


def _activations(m: int, k: int, seed: int = 1) -> np.ndarray:
    """Rows of outliers, tiny ones, zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)) * 10.0 ** rng.integers(-3, 3, (m, 1))
    x[:, 5] *= 50
    x[0] = 0
    x[1] *= 1e-36
    return x.astype(np.float32)


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTSERVE_ISA", request.param)
    return str(request.param)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_come_back_as_stored(format: str, isa: str) -> None:
    matrix, held = _matrix(format, 75, 96)
    ids = [74, 0, 33, 37, 74]
    np.testing.assert_allclose(matrix.rows(ids), held[ids], rtol=2 * EPS, atol=EPS)


@pytest.mark.parametrize(("n", "k"), [(75, 96), (1, 32), (64, 576), (130, 1056)])
@pytest.mark.parametrize("format", FORMATS)
def test_a_product_is_that_of_the_quantized_factors(format: str, n: int, k: int, isa: str) -> None:
    """Exact up to the rounding of one float32 addition and four multiplications a group."""
    matrix, held = _matrix(format, n, k)
    x = _activations(9, k)
    rounded = _quantized(x, GROUP)
    error = (2 * k / GROUP + 8) * EPS * (np.abs(rounded) @ np.abs(held).T)
    if format == "q4_1":  # its minima cancel most of what its nibbles add up to
        error *= 16
    assert (np.abs(matrix.multiply(x) - rounded @ held.T) <= error).all()
    # And the activations' rounding is bounded by half a level each.
    m, levels = len(x), np.zeros((len(x), -(-k // GROUP), GROUP))
    levels.reshape(m, -1)[:, :k] = np.abs(x)
    half = np.repeat(levels.max(-1) / 254, GROUP, axis=1)[:, :k]
    assert (np.abs(matrix.multiply(x) - x.astype(np.float64) @ held.T) <= half @ np.abs(held).T + error + 1e-30).all()


@pytest.mark.parametrize("k", [4, 10, 63, 65, 130])
def test_int8_takes_any_width(k: int, isa: str) -> None:
    matrix, held = _matrix("int8", 40, k)
    x = _activations(5, k + 6)[:, :k]
    rounded = _quantized(x, GROUP)
    error = (2 * k / GROUP + 8) * EPS * (np.abs(rounded) @ np.abs(held).T)
    assert (np.abs(matrix.multiply(np.ascontiguousarray(x)) - rounded @ held.T) <= error).all()


@pytest.mark.parametrize("format", FORMATS)
def test_extreme_weights(format: str, isa: str) -> None:
    """The largest of every value at once: no sum may saturate."""
    n, k = 36, 256
    for sign in (1, -1):
        matrix = _C.Matrix(n, k, format)
        if format == "int8":
            held = np.full((n, k), sign * 127.0)
            matrix.load("f32", held.astype(np.float32).view(np.uint8).reshape(-1))
        else:
            size = gguf.GGML_QUANT_SIZES[BLOCKS[format]][1]
            blocks = np.full((n, k // 32, size), {1: 0xFF, -1: 0x00}[sign], np.uint8)
            if format == "q8_0":
                blocks[:] = {1: 0x7F, -1: 0x80}[sign]  # -128 is in no file of llama.cpp's, but may be in one
            blocks[..., :2] = np.frombuffer(np.float16(1.0).tobytes(), np.uint8)
            if format == "q4_1":
                blocks[..., 2:4] = np.frombuffer(np.float16(-3.0).tobytes(), np.uint8)
            held = gguf.quants.dequantize(blocks.reshape(n, -1), BLOCKS[format]).astype(np.float64)
            matrix.load(format, blocks.reshape(-1))
        for x in (np.ones((20, k), np.float32), -np.ones((20, k), np.float32)):
            np.testing.assert_allclose(matrix.multiply(x), x @ held.T, rtol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_how_many_share_the_call(format: str, isa: str) -> None:
    n, k = 107, 320
    matrix, _ = _matrix(format, n, k, threads=2)
    x = _activations(40, k)
    alone = np.concatenate([matrix.multiply(row[None]) for row in x])
    for m in range(1, 41):
        assert np.array_equal(matrix.multiply(x[40 - m :]), alone[40 - m :]), m
    assert np.array_equal(matrix.multiply(np.tile(x, (7, 1))[:275]), np.tile(alone, (7, 1))[:275])


@pytest.mark.parametrize("m", [3, 275])
@pytest.mark.parametrize("format", FORMATS)
def test_bias_and_accumulation(format: str, m: int, isa: str) -> None:
    matrix, _ = _matrix(format, 75, 96)
    x, rng = _activations(m, 96), np.random.default_rng(2)
    bias, onto = rng.standard_normal(75).astype(np.float32), rng.standard_normal((m, 75)).astype(np.float32)
    plain = matrix.multiply(x)
    assert np.array_equal(matrix.multiply(x, bias=bias), plain + bias)
    assert np.array_equal(matrix.multiply(x, bias=bias, onto=onto), plain + bias + onto)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_a_number_stays_visible(format: str, bad: float, isa: str) -> None:
    matrix, _ = _matrix(format, 75, 96)
    x = _activations(4, 96)
    sound = matrix.multiply(x)
    for place in (0, 50, 95):
        spoilt = x.copy()
        spoilt[2, place] = bad
        result = matrix.multiply(spoilt)
        assert np.isnan(result[2]).all()
        assert np.array_equal(np.delete(result, 2, 0), np.delete(sound, 2, 0))


def test_a_weight_that_is_not_a_number_spoils_its_output_only() -> None:
    values = np.ones((40, 64), np.float32)
    values[7, 3] = np.inf
    matrix = _C.Matrix(40, 64, "int8")
    matrix.load("f32", values.view(np.uint8).reshape(-1))
    assert np.isnan(matrix.multiply(np.ones((1, 64), np.float32))[0]).nonzero()[0].tolist() == [7]


@pytest.mark.parametrize("format", BLOCKS)
def test_blocks_take_their_own_type_and_whole_blocks(format: str) -> None:
    with pytest.raises(_C.Error, match="multiple of 32 inputs, not 33"):
        _C.Matrix(4, 33, format)
    matrix = _C.Matrix(4, 32, format)
    with pytest.raises(_C.Error, match="rows of its own type"):
        matrix.load("f32", np.zeros(4 * 32 * 4, np.uint8))


@pytest.mark.parametrize(("format", "bits"), [("int8", 8), ("q8_0", 8.5), ("q4_0", 4.5), ("q4_1", 5)])
def test_bytes_are_those_of_the_file(format: str, bits: float) -> None:
    n, k = 512, 2048
    scales = 4 * n if format == "int8" else 0
    assert _C.Matrix(n, k, format).bytes == n * k * bits / 8 + scales


def test_q8_1_is_q8_0_with_a_redundant_sum() -> None:
    _, data, _ = _weights("q8_0", 40, 64)
    blocks = data.reshape(-1, 34)
    with_sum = np.concatenate([blocks[:, :2], np.zeros((len(blocks), 2), np.uint8), blocks[:, 2:]], axis=1)
    both = [_C.Matrix(40, 64, "q8_0") for _ in range(2)]
    both[0].load("q8_0", data)
    both[1].load("q8_1", np.ascontiguousarray(with_sum).reshape(-1))
    x = _activations(3, 64)
    assert np.array_equal(both[0].multiply(x), both[1].multiply(x))
    stored = with_sum.reshape(-1)
    assert np.array_equal(_C.dequantize("q8_1", stored, 40 * 64), _C.dequantize("q8_0", data, 40 * 64))
