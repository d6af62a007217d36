"""Products by cuBLASLt, where it is installed: here by a stand-in, which knows an algorithm whose bits depend on the
number of rows, one that cannot do every number of rows, and a right one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
from elements import decode, encode, half_unit

ROWS = [1, 3, 100, 2048]  # the last of which is chosen for


@pytest.fixture
def library(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    if not hasattr(kernels, "simt"):
        pytest.skip("on the emulated device only")
    assert kernels.__file__ is not None
    monkeypatch.setenv("FASTSERVE_CUBLASLT", kernels.__file__)
    library = ctypes.CDLL(kernels.__file__)
    yield library
    assert library.fastserve_simt_cublaslt_live() == 0, "handles of the library are left"


def test_what_is_not_to_be_used_is_not_looked_for(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_CUBLASLT", "0")
    assert not kernels.has_cublaslt()
    monkeypatch.setenv("FASTSERVE_CUBLASLT", "/nowhere/cublas")
    with pytest.raises(kernels.Error, match="FASTSERVE_CUBLASLT names '/nowhere/cublas', which is not cuBLASLt"):
        kernels.has_cublaslt()


@pytest.mark.parametrize(
    ("dtype", "wide", "accumulate", "with_bias"),
    [
        ("bfloat16", False, False, False),
        ("float16", False, False, True),
        ("bfloat16", True, False, False),
        ("float16", True, True, True),
    ],
)
def test_rows_are_the_same_in_every_product(
    kernels: ModuleType, library: ctypes.CDLL, dtype: str, wide: bool, accumulate: bool, with_bias: bool
) -> None:
    k = 256
    for n in (40, 48, 56):  # by time it is chosen, once a shape: where others use the processor, ours may be quicker
        products = kernels.CublasProducts(dtype, n, k, wide, finished=with_bias)
        if products.text is not None:
            break
    assert products.text is not None
    rng = np.random.default_rng(7)
    weight, input = (encode(rng.standard_normal((rows, k)), dtype) for rows in (n, max(ROWS)))
    bias = rng.standard_normal(64).astype(np.float32)
    onto = rng.standard_normal((max(ROWS), 64)).astype(np.float32)
    asked = library.fastserve_simt_cublaslt_proposals()
    verdicts = {part.split(" (")[0].rsplit(" id ", 1)[1][0]: part for part in products.text.split("; ")[2:]}
    assert "its bits are not ours" in verdicts["7"]
    assert "cannot do every number of rows" in verdicts["8"]
    assert "taken" in verdicts["9"]

    kernels.CublasProducts(dtype, n, k, wide, finished=with_bias)  # which another model has as well
    assert library.fastserve_simt_cublaslt_proposals() == asked
    results = {}
    for m in ROWS:
        output = onto[:m] if wide else encode(onto[:m], dtype)
        result = products.multiply(input[:m], weight, bias if with_bias else None, output, accumulate)
        if result is not None:
            results[m] = result
    assert library.fastserve_simt_cublaslt_proposals() == asked
    assert not with_bias or "whole" not in products.text, "an algorithm that leaves no place for a bias was tried"
    x, w = decode(input, dtype).astype(np.float64), decode(weight, dtype).astype(np.float64)
    exact = x @ w.T + (bias[:n] if with_bias else 0) + (onto[:, :n] if accumulate else 0)
    terms = np.abs(x) @ np.abs(w).T + np.abs(bias[:n]) + np.abs(onto[:, :n])
    error = (k + 8) * 2.0**-24 * terms
    for m, result in results.items():
        assert np.array_equal(result[:, :n], results[max(ROWS)][:m, :n])
        got = result[:, :n] if wide else decode(np.ascontiguousarray(result[:, :n]), dtype)
        allowed = error[:m] + (0 if wide else half_unit(exact[:m], error[:m], dtype))
        assert (np.abs(got - exact[:m]) <= allowed).all()


def test_gate_and_up_meet_as_in_our_products(kernels: ModuleType, library: ctypes.CDLL) -> None:
    k, dtype = 256, "bfloat16"
    for n in (80, 96, 112):
        products = kernels.CublasProducts(dtype, n, k, wide=False, finished=True)
        if products.text is not None:
            break
    assert products.text is not None and "whole" not in products.text
    rng = np.random.default_rng(8)
    weight, input = (encode(rng.standard_normal((rows, k)), dtype) for rows in (n, max(ROWS)))
    ours = kernels.Matrix(n // 2, k, dtype, paired=True)
    for half, first in enumerate([0, 64]):
        ours.load_rows("bf16", np.ascontiguousarray(weight[half::2]).view(np.uint8).reshape(-1), first)
    output = encode(np.zeros((max(ROWS), 64)), dtype)
    theirs = products.multiply(input, weight, None, output, False, gated=True)
    assert theirs is not None
    expected = ours.multiply(decode(input, dtype), dtype, wide=False, gated=True)
    assert np.array_equal(theirs[:, : n // 2], encode(expected, dtype)) and not theirs[:, n // 2 :].any()
    with pytest.raises(kernels.Error, match="is for other products"):
        products.multiply(input, weight, None, encode(np.zeros((max(ROWS), 128)), dtype), False)


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", True), ("float16", True), ("bfloat16", False)])
def test_sums_are_finished_piece_by_piece(kernels: ModuleType, dtype: str, wide: bool) -> None:
    """More columns than a block has, then the rest of the output; what lies beside the sums belongs to nobody."""
    m, n = 3, 1239
    rng = np.random.default_rng(3)
    sums, onto = (rng.standard_normal((m, 1280)).astype(np.float32) for _ in range(2))
    bias = rng.standard_normal(n).astype(np.float32)
    output = onto if wide else encode(onto, dtype)
    for first, columns in [(0, 1088), (1088, n - 1088)]:
        piece = np.full((m, -(-columns // 64) * 64 + 64), np.nan, np.float32)
        piece[:, :columns] = sums[:, first : first + columns]
        output = kernels.finish_product(
            dtype=dtype, sums=piece, first=first, columns=columns, n=n, bias=bias, output=output, accumulate=wide
        )
    expected = sums[:, :n] + bias
    if wide:
        assert np.array_equal(output, np.concatenate([onto[:, :n] + expected, onto[:, n:]], axis=1))
    else:
        assert np.array_equal(output, np.concatenate([encode(expected, dtype), encode(onto, dtype)[:, n:]], axis=1))
