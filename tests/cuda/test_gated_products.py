"""Products whose columns meet in pairs: silu(gate) · up, in the epilogue, with the bits of two kernels one after the
other."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import elements
import groups
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

PAD = 64
DTYPES = ["bfloat16", "float16"]
PAIRS = [(dtype, format) for dtype in DTYPES for format in [dtype, "int8", *groups.BYTES]]


def _random(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def _bytes(values: np.ndarray, format: str) -> np.ndarray:
    if format in groups.BYTES:
        return groups.encode(values, format).reshape(len(values), -1)
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


class Block:
    """Gate and up [width, k]: in one matrix of pairs, and one below the other as the CPU has them."""

    def __init__(self, kernels: ModuleType, format: str, width: int, k: int, seed: int = 0) -> None:
        self.kernels, self.width, self.pad = kernels, width, -(-width // PAD) * PAD
        self.kind = format if format in groups.BYTES else "f32"
        self.gate, self.up = (_bytes(_random(width, k, seed + i), format) for i in range(2))
        self.pairs = kernels.Matrix(width, k, format, paired=True)
        self.apart = kernels.Matrix(self.pad + width, k, format)
        self.load(self.pairs, 0, self.gate)
        self.load(self.pairs, self.pad, self.up)
        self.load(self.apart, 0, self.gate)
        self.load(self.apart, self.pad, self.up)

    def load(self, matrix: Any, first: int, rows: np.ndarray) -> None:
        matrix.load_rows(self.kind, rows.reshape(-1), first)

    def expected(self, x: np.ndarray, dtype: str) -> np.ndarray:
        """By a product and a kernel that activates."""
        product = self.apart.multiply(x, dtype, wide=False)
        return activated(self.kernels, product[:, : self.width], product[:, self.pad :], dtype)


def activated(kernels: ModuleType, gate: np.ndarray, up: np.ndarray, dtype: str) -> np.ndarray:
    """silu(gate) · up [rows, width], by the kernel of its own."""
    rows, width = gate.shape
    pad = -(-width // PAD) * PAD
    x = np.zeros((rows, 2 * pad), np.float32)
    x[:, :width], x[:, pad : pad + width] = gate, up
    return elements.decode(
        kernels.activate(dtype=dtype, kind="silu", gated=True, x=elements.encode(x, dtype), width=width), dtype
    )[:, :width]


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def _able(kernels: ModuleType, dtype: str, format: str) -> list[str]:
    refused = [] if format == dtype and kernels.has_warpgroups() else kernels.WARPGROUP_KERNELS
    return [kernel for kernel in kernels.GEMM_KERNELS if kernel not in refused]


@pytest.mark.parametrize(("width", "k"), [(1, 32), (4, 64), (37, 96), (132, 320)])
@pytest.mark.parametrize(("dtype", "format"), PAIRS)
def test_bits_are_those_of_two_kernels(kernels: ModuleType, dtype: str, format: str, width: int, k: int) -> None:
    """Whichever kernel multiplies, at every width: of a vector, of less, across tiles."""
    block = Block(kernels, format, width, k)
    for m in (1, 9, 70):
        x = 3 * _random(m, k, seed=m)
        expected = block.expected(x, dtype)
        for kernel in _able(kernels, dtype, format):
            assert _same(block.pairs.multiply(x, dtype, wide=False, gated=True, kernel=kernel), expected), kernel


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    pair=st.sampled_from(PAIRS),
    width=st.integers(1, 200),
    groups=st.integers(1, 10),
    m=st.integers(1, 140),
    seed=st.integers(0, 2**31),
)
def test_the_chosen_kernel_has_them_too(
    kernels: ModuleType, pair: tuple[str, str], width: int, groups: int, m: int, seed: int
) -> None:
    dtype, format = pair
    block = Block(kernels, format, width, 32 * groups, seed)
    x = _random(m, 32 * groups, seed + 2)
    assert _same(block.pairs.multiply(x, dtype, wide=False, gated=True), block.expected(x, dtype))


@pytest.mark.parametrize(("dtype", "format"), PAIRS)
def test_what_is_not_gated_has_gate_and_up_side_by_side(kernels: ModuleType, dtype: str, format: str) -> None:
    block = Block(kernels, format, 37, 96)
    x = _random(5, 96, seed=7)
    apart, pairs = block.apart.multiply(x, dtype), block.pairs.multiply(x, dtype)
    assert _same(pairs[:, ::2], apart[:, : block.width]) and _same(pairs[:, 1::2], apart[:, block.pad :])


@pytest.mark.parametrize("format", ["bfloat16", "int8", *groups.BYTES])
def test_rows_may_come_in_pieces(kernels: ModuleType, format: str) -> None:
    """In any order, and across what lies between gate and up, which counts for nothing."""
    block = Block(kernels, format, 45, 96)
    pieces = kernels.Matrix(45, 96, format, paired=True)
    assert pieces.rows == block.pad + 45
    between = np.full((block.pad - 45, block.gate.shape[1]), 60, np.uint8)
    rows = np.concatenate([block.gate, between, block.up])
    for first, last in [(30, 70), (0, 3), (100, 109), (3, 30), (70, 100)]:
        block.load(pieces, first, rows[first:last])
    x = _random(4, 96, seed=10)
    assert _same(pieces.multiply(x, "bfloat16"), block.pairs.multiply(x, "bfloat16"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_another_library_meet_piece_by_piece(kernels: ModuleType, dtype: str) -> None:
    """cuBLASLt's, more columns than a block has and then the rest. What lies beside the output stays."""
    m, n = 3, 1238
    sums = _random(m, 1280, seed=3)
    before = elements.encode(_random(m, 640, seed=5), dtype)
    output = before
    for first, columns in [(0, 1088), (1088, n - 1088)]:
        piece = np.full((m, -(-columns // 64) * 64), np.nan, np.float32)
        piece[:, :columns] = sums[:, first : first + columns]
        output = kernels.finish_product(
            dtype=dtype, sums=piece, first=first, columns=columns, n=n, bias=None, output=output, accumulate=False,
            gated=True,
        )  # fmt: skip
    expected = activated(kernels, sums[:, :n:2], sums[:, 1:n:2], dtype)
    assert np.array_equal(output[:, : n // 2], elements.encode(expected, dtype))
    assert np.array_equal(output[:, n // 2 :], before[:, n // 2 :])


def test_what_does_not_meet_is_refused(kernels: ModuleType) -> None:
    x = _random(2, 64, seed=1)
    pairs = kernels.Matrix(64, 64, "bfloat16", paired=True)
    for matrix, dtype, more in [
        (kernels.Matrix(64, 64, "bfloat16"), "bfloat16", {"wide": False}),
        (kernels.Matrix(64, 64, "float32", paired=True), "float32", {"wide": False}),
        (pairs, "bfloat16", {"wide": True}),
        (pairs, "bfloat16", {"wide": False, "bias": np.zeros(128, np.float32)}),
    ]:
        with pytest.raises(kernels.Error, match="of paired weights, in 16 bits, without a bias"):
            matrix.multiply(x, dtype, gated=True, **more)
