"""Products with float32 and bfloat16 weights on every instruction set, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from fastserve import _C
from fastserve.native import instruction_sets

UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-9}


def _round(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return x
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def _random(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def _matrix(dtype: str, n: int, k: int, threads: int = 1) -> tuple[_C.Matrix, np.ndarray]:
    weight = _random(n, k, seed=1)
    matrix = _C.Matrix(n, k, dtype, threads=threads)
    matrix.load("f32", weight.view(np.uint8).reshape(-1))
    return matrix, _round(weight, dtype)


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTSERVE_ISA", request.param)
    return str(request.param)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 31), (75, 65), (128, 576), (40, 2100)])
@pytest.mark.parametrize("dtype", UNIT)
def test_a_product_is_that_of_the_rounded_factors(dtype: str, n: int, k: int, isa: str) -> None:
    """The error of k additions in float32, each of a relative 2^-24 of what is summed so far."""
    matrix, weight = _matrix(dtype, n, k)
    assert np.array_equal(matrix.rows(list(range(n))), weight)
    for m in (1, 2, 7, 16, 17, 33):
        x = _random(m, k, seed=m)
        rounded = _round(x, dtype).astype(np.float64)
        error = (k + 2) * 2.0**-24 * (np.abs(rounded) @ np.abs(weight.T))
        assert (np.abs(matrix.multiply(x) - rounded @ weight.T.astype(np.float64)) <= error).all()


@pytest.mark.parametrize(("n", "k", "most"), [(107, 330, 40), (40, 2080, 600), (33, 8200, 290)])
@pytest.mark.parametrize("dtype", UNIT)
def test_a_row_does_not_depend_on_how_many_share_the_call(dtype: str, n: int, k: int, most: int, isa: str) -> None:
    """The larger ones are cut by rows and by inputs where a kernel asks for that."""
    matrix, _ = _matrix(dtype, n, k, threads=2)
    x = _random(most, k, seed=2)
    few = min(most, 40)
    alone = np.concatenate([matrix.multiply(row[None]) for row in x[:few]])
    for m in [*range(1, few + 1), 100, 257, most] if most > few else range(1, few + 1):
        product = matrix.multiply(x[:m])
        assert np.array_equal(product[:few], alone[:m]), m
    # From another place of the call: in the last rows of all, and behind others.
    assert np.array_equal(matrix.multiply(x[::-1])[::-1][:few], alone)


@pytest.mark.parametrize(("k", "m"), [(65, 3), (65, 16), (96, 35), (8200, 270)])
@pytest.mark.parametrize("dtype", UNIT)
def test_bias_and_accumulation(dtype: str, k: int, m: int, isa: str) -> None:
    matrix, _ = _matrix(dtype, 75, k)
    x, bias, onto = _random(m, k, seed=3), _random(1, 75, seed=4)[0], _random(m, 75, seed=5)
    plain = matrix.multiply(x)
    assert np.array_equal(matrix.multiply(x, bias=bias), plain + bias)
    assert np.array_equal(matrix.multiply(x, onto=onto), plain + onto)
    assert np.array_equal(matrix.multiply(x, bias=bias, onto=onto), plain + bias + onto)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", UNIT)
def test_what_is_not_a_number_stays_in_its_row(dtype: str, bad: float, isa: str) -> None:
    matrix, _ = _matrix(dtype, 75, 96)
    x = _random(20, 96, seed=6)
    sound = matrix.multiply(x)
    spoilt = x.copy()
    spoilt[2, 50] = bad
    result = matrix.multiply(spoilt)
    assert not np.isfinite(result[2]).any()
    assert np.array_equal(np.delete(result, 2, 0), np.delete(sound, 2, 0))


@pytest.mark.skipif("amx_emulated" not in instruction_sets(), reason="emulating AMX takes AVX-512 with bfloat16")
@pytest.mark.parametrize(("m", "k"), [(1, 32), (5, 100), (37, 2080), (300, 2080)])
def test_tiles_are_added_up_as_the_manual_says(m: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit: products of bfloat16 are exact in float32, so that a fused step is one addition."""
    monkeypatch.setenv("FASTSERVE_ISA", "amx_emulated")
    matrix, weight = _matrix("bfloat16", 40, k)
    x = _random(m, k, seed=7)
    padded = -(-k // 32) * 32
    a, b = np.zeros((m, padded), np.float32), np.zeros((40, padded), np.float32)
    a[:, :k], b[:, :k] = _round(x, "bfloat16"), weight
    total = np.zeros((m, 40), np.float32)
    for tile in range(0, padded, 32):
        chains = np.zeros((2, m, 40), np.float32)
        for pair in range(tile, tile + 32, 2):
            for odd in range(2):
                chains[odd] += a[:, pair + odd, None] * b[None, :, pair + odd]
        total += chains[0] + chains[1]
    assert np.array_equal(matrix.multiply(x), total)


@pytest.mark.skipif("amx_emulated" not in instruction_sets(), reason="emulating AMX takes AVX-512 with bfloat16")
def test_what_is_asked_of_a_machine_with_tiles_is_answered_rightly_by_the_emulation() -> None:
    assert _C.emulated_amx_works()
    assert instruction_sets()[0] != "amx_emulated"  # which is never what one gets unasked
