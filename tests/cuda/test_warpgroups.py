"""Products by warpgroups, compute capability 9.0's own: that they have the other kernels' bits, on emulated or real
devices, and are not chosen where they do not."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

KERNELS = ["warpgroup128", "warpgroup192"]
DTYPES = ["bfloat16", "float16"]
PARTS = 4
# Of a term of a sum: a GPU's matrix instructions cut off what a float32 has no room for.
SUM_UNIT = 2.0**-23


@pytest.fixture(autouse=True)
def _there(kernels: ModuleType) -> None:
    if not kernels.has_warpgroups():
        pytest.skip("the device has no products by warpgroups")


def _random(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def _round(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def _matrix(kernels: ModuleType, dtype: str, n: int, k: int, seed: int = 0) -> tuple[Any, np.ndarray]:
    values = _random(n, k, seed)
    matrix = kernels.Matrix(n, k, dtype)
    matrix.load_rows("f32", values.view(np.uint8).reshape(-1))
    return matrix, _round(values, dtype)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (75, 96), (193, 608), (391, 100)])
def test_a_product_is_that_of_the_rounded_factors(kernels: ModuleType, dtype: str, kernel: str, n: int, k: int) -> None:
    """Against float64, off by k additions at most; the parts of few inputs are empty."""
    matrix, weight = _matrix(kernels, dtype, n, k)
    x = _random(70, k, seed=1)
    rounded = _round(x, dtype).astype(np.float64)
    error = (k + PARTS) * SUM_UNIT * (np.abs(rounded) @ np.abs(weight.T.astype(np.float64)))
    result = matrix.multiply(x, dtype, kernel=kernel)
    assert (np.abs(result - rounded @ weight.T.astype(np.float64)) <= error).all()
    assert _same(matrix.multiply(x, dtype, kernel=kernel, wide=False), _round(result, dtype))


@pytest.mark.parametrize("m", [1, 16, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 513])
@pytest.mark.parametrize("kernel", KERNELS)
def test_bits_are_the_other_kernels_at_every_edge_of_a_tile(kernels: ModuleType, kernel: str, m: int) -> None:
    dtype = DTYPES[m % 2]
    matrix, _ = _matrix(kernels, dtype, 200, 320)
    x = _random(m, 320, seed=2)
    assert _same(matrix.multiply(x, dtype, kernel=kernel), matrix.multiply(x, dtype, kernel="large128"))


@pytest.mark.parametrize("n", [8, 127, 128, 129, 191, 192, 193, 385])
@pytest.mark.parametrize("kernel", KERNELS)
def test_bits_are_the_other_kernels_at_every_edge_of_the_columns(kernels: ModuleType, kernel: str, n: int) -> None:
    matrix, _ = _matrix(kernels, "bfloat16", n, 192)
    x = _random(130, 192, seed=3)
    expected = matrix.multiply(x, "bfloat16", kernel="split64")
    assert _same(matrix.multiply(x, "bfloat16", kernel=kernel), expected)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    kernel=st.sampled_from(KERNELS),
    n=st.integers(1, 400),
    k=st.integers(1, 700),
    m=st.integers(1, 300),
    processors=st.sampled_from([0, 1, 2, 3, 4]),
    seed=st.integers(0, 2**31),
)
def test_bits_are_the_other_kernels(
    kernels: ModuleType, dtype: str, kernel: str, n: int, k: int, m: int, processors: int, seed: int
) -> None:
    """Whatever the shape, and however many tiles a cluster takes one after the other."""
    matrix, _ = _matrix(kernels, dtype, n, k, seed)
    x = _random(m, k, seed + 1)
    expected = matrix.multiply(x, dtype, kernel="split64")
    assert _same(matrix.multiply(x, dtype, kernel=kernel, processors=processors), expected)


def test_tiles_in_bands_cover_the_output_once(kernels: ModuleType) -> None:
    """Tiles of 256 rows in bands of 8: one band and a part of the next, by two clusters."""
    matrix, _ = _matrix(kernels, "bfloat16", 300, 64)
    x = _random(256 * 8 + 300, 64, seed=4)
    expected = matrix.multiply(x, "bfloat16", kernel="rows8")
    assert _same(matrix.multiply(x, "bfloat16", kernel="warpgroup128", processors=4), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_bias_and_accumulation(kernels: ModuleType, dtype: str, kernel: str) -> None:
    m, n = 140, 75
    matrix, _ = _matrix(kernels, dtype, n, 96)
    x, bias, onto = _random(m, 96, seed=5), _random(1, n, seed=6)[0], _random(m, n, seed=7)
    plain = matrix.multiply(x, dtype, kernel="large128")
    assert _same(matrix.multiply(x, dtype, kernel=kernel, bias=bias), plain + bias)
    assert _same(matrix.multiply(x, dtype, kernel=kernel, onto=onto), onto + plain)
    assert _same(matrix.multiply(x, dtype, kernel=kernel, bias=bias, onto=onto), onto + (plain + bias))
    narrow = matrix.multiply(x, dtype, kernel=kernel, bias=bias, wide=False)
    assert _same(narrow, _round(plain + bias, dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_stays_in_its_row(kernels: ModuleType, bad: float, kernel: str) -> None:
    matrix, _ = _matrix(kernels, "bfloat16", 75, 96)
    x = _random(130, 96, seed=8)
    sound = matrix.multiply(x, "bfloat16", kernel=kernel)
    x[2, 50] = bad
    result = matrix.multiply(x, "bfloat16", kernel=kernel)
    assert not np.isfinite(result[2]).any()
    assert _same(np.delete(result, 2, 0), np.delete(sound, 2, 0))


@pytest.mark.parametrize("format", ["int8", "q8_0", "q4_0"])
def test_quantized_weights_are_refused(kernels: ModuleType, format: str) -> None:
    matrix = kernels.Matrix(64, 64, format)
    with pytest.raises(kernels.Error, match="the kernel warpgroup128 cannot run a product"):
        matrix.multiply(_random(130, 64, seed=0), "bfloat16", kernel="warpgroup128")


# ---- which is chosen

LLAMA = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]


@pytest.mark.parametrize(("n", "k"), LLAMA)
def test_a_prompt_of_2048_tokens_is_the_warpgroups_where_they_are_admitted(kernels: ModuleType, n: int, k: int) -> None:
    assert kernels.choose_gemm(2048, n, k, "bfloat16", warpgroups=True) in KERNELS
    assert kernels.choose_gemm(2048, n, k, "bfloat16", warpgroups=False) == "large128"
    assert kernels.choose_gemm(2048, n, k, "q8_0", warpgroups=True) not in KERNELS
    assert kernels.choose_gemm(2048, n, k, "bfloat16", warpgroups=True, shared_bytes=163 * 1024) not in KERNELS


@pytest.mark.parametrize(("n", "k"), LLAMA)
@pytest.mark.parametrize("m", [1, 8, 16, 32, 64])
def test_few_rows_are_others(kernels: ModuleType, n: int, k: int, m: int) -> None:
    assert kernels.choose_gemm(m, n, k, "bfloat16", warpgroups=True) not in KERNELS


# ---- whether they are admitted


def test_the_trial_admits_them_where_all_bits_agree(kernels: ModuleType) -> None:
    """On a real device, of which this says whether they do; the emulated one's trial is below."""
    if hasattr(kernels, "simt"):
        pytest.skip("seconds, for what the next test tries anyway")
    admitted, verdict = kernels.compare_warpgroups("bfloat16", "right")
    assert admitted
    assert verdict.startswith("admitted")


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("one bit", "warpgroup192 has other bits for 257 rows by [200, 320]"),  # in the last row of many
        ("onto", "warpgroup128 has other bits for 1 rows by [200, 320]"),  # only of what is added to
        ("cannot", "warpgroup128 has other bits for 257 rows"),
        ("refused", "CUDA: invalid argument"),
    ],
)
def test_the_trial_refuses_them_where_they_do_not(kernels: ModuleType, kind: str, verdict: str) -> None:
    if kind == "refused" and not hasattr(kernels, "simt"):
        pytest.skip("on the emulated device only")
    admitted, found = kernels.compare_warpgroups("bfloat16", kind)
    assert not admitted
    assert found.startswith("not used: ")
    assert verdict in found


def test_before_the_trial_gemm_takes_other_kernels(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """And after it, these, with the same bits; on another device not yet."""
    if not hasattr(kernels, "simt"):
        pytest.skip("on the emulated device only")
    n, k, m = 512, 64, 300
    matrix, _ = _matrix(kernels, "float16", n, k)
    x = _random(m, k, seed=9)
    asked = kernels.choose_gemm(m, n, k, "float16", warpgroups=True)
    assert asked in KERNELS
    assert not kernels.warpgroups_admitted("float16")
    before = matrix.multiply(x, "float16")
    clusters = kernels.simt.cluster_launches()
    assert kernels.try_warpgroups("float16") == (True, "admitted: all bits are those of the other kernels")
    assert kernels.simt.cluster_launches() > clusters
    assert kernels.warpgroups_admitted("float16")
    clusters = kernels.simt.cluster_launches()
    after = matrix.multiply(x, "float16")
    assert kernels.simt.cluster_launches() == clusters + 1
    assert _same(before, after)
    matrix.multiply(x[:100], "float16")
    assert kernels.simt.cluster_launches() == clusters + 1
    kernels.set_device(1)
    try:
        assert not kernels.warpgroups_admitted("float16")
    finally:
        kernels.set_device(0)


def test_who_does_not_want_them_says_so(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_WGMMA", "0")
    kernels.set_device(1) if hasattr(kernels, "simt") else pytest.skip("on the emulated device only")
    try:
        assert kernels.try_warpgroups("bfloat16") == (False, "not used: FASTSERVE_WGMMA is 0")
        assert not kernels.warpgroups_admitted("bfloat16")
    finally:
        kernels.set_device(0)


def test_a_device_lost_in_the_trial_says_what_to_set(kernels: ModuleType) -> None:
    if not hasattr(kernels, "simt"):
        pytest.skip("on the emulated device only")
    kernels.set_device(1)
    try:
        kernels.simt.lose_device("a launch", 0)
        with pytest.raises(kernels.Error, match=r"unspecified launch failure .*start again with FASTSERVE_WGMMA=0"):
            kernels.try_warpgroups("float16")
        assert not kernels.warpgroups_admitted("float16")
    finally:
        kernels.simt.revive()
        kernels.set_device(0)
