"""Embedding, norms, rotation, activations and sums on the device, against float64 NumPy.

Tolerances follow from the arithmetic: eps is float32's unit roundoff, 2^-24; a sum that is a tree of depth n is within
n · eps of the sum of its terms' magnitudes; what is rounded to an element type gets half a unit of that type on top.
"""

from __future__ import annotations

import math
from typing import Any

import elements
import groups
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

EPS = 2.0**-24
POISON = 7.5  # what outputs hold before: exact in every type


def _random(seed: int, *shape: int, spread: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float32)


def _pad(width: int) -> int:
    return -(-width // 64) * 64


def _padded(x: np.ndarray, ld: int) -> np.ndarray:
    result = np.zeros((x.shape[0], ld), np.float32)
    result[:, : x.shape[1]] = x
    return result


# ---- embedding


def _table(format: str, n: int, k: int) -> tuple[str, np.ndarray, np.ndarray]:
    """The type of the rows that a table in this format is made of, these rows, and the numbers that they are."""
    x = _random(n, n, k)
    if format in ("q8_0", "q4_0", "q4_1"):
        blocks = groups.encode(x, format)
        return format, blocks, groups.decode(blocks, format)
    if format == "int8":  # a scale for each row, of which the largest magnitude is 127
        scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
        return "f32", x, np.rint(x / scale).astype(np.float32) * scale
    data = elements.encode(x, format)
    return {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[format], data, elements.decode(data, format)


@pytest.mark.parametrize(
    ("format", "k"),
    [(f, k) for f in ("float32", "bfloat16", "float16", "int8") for k in (1, 8, 50, 64, 2100)]
    + [(f, k) for f in ("q8_0", "q4_0", "q4_1") for k in (32, 96, 2080)],
)
@pytest.mark.parametrize("accumulate", [False, True])
def test_embedding_rows_are_the_tables(kernels: Any, format: str, k: int, accumulate: bool) -> None:
    n, ld = 9, _pad(k) + 64
    type, data, rows = _table(format, n, k)
    ids = np.array([3, 11, 2, -1, 12, -3, 3, -2], np.int32)  # the table's first row is that of 3, its last of 11
    sampled = np.array([5, 100, 10], np.int32)
    before = _padded(_random(2, len(ids), k), ld)
    output = kernels.embed(
        format=format,
        type=type,
        data=data,
        n=n,
        k=k,
        ids=ids,
        last_sampled=sampled,
        first=3,
        output=before,
        accumulate=accumulate,
    )
    expected = before[:, :k] if accumulate else np.zeros((len(ids), k), np.float32)
    for i, row in enumerate([0, 8, None, 2, None, 7, 0, None]):
        if row is not None:
            expected[i] += rows[row]
    # Quantized numbers are a product and perhaps a sum, which gguf rounds apart and the device together.
    exact = format in ("float32", "bfloat16", "float16", "q8_0", "q4_0")
    tolerance = 0.0 if exact else 4 * EPS * float(np.abs(rows).max() + np.abs(expected).max())
    np.testing.assert_allclose(output[:, :k], expected, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(output[:, k:], 0)


def test_a_negative_id_without_sampled_tokens_is_a_row_of_zeros(kernels: Any) -> None:
    output = kernels.embed(
        format="float32",
        type="f32",
        data=_random(1, 4, 64),
        n=4,
        k=64,
        ids=np.array([-1, 2], np.int32),
        last_sampled=None,
        first=0,
        output=np.full((2, 64), POISON, np.float32),
        accumulate=False,
    )
    np.testing.assert_array_equal(output, [np.zeros(64, np.float32), _random(1, 4, 64)[2]])


# ---- norms


def _norm_error(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """The exact norm of rows, and a bound on what float32 makes of it."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    center = np.zeros((len(x), 1)) if bias is None else x.mean(1, keepdims=True)
    # The tree is as deep as its threads' chain and two warp reductions.
    depth = 32 + 5 + 5
    center_error = 0.0 if bias is None else depth * EPS * np.abs(x).mean(1, keepdims=True)
    d = x - center
    d_error = EPS * np.abs(d) + center_error
    variance = (d**2).mean(1, keepdims=True) + eps
    variance_error = (2 * np.abs(d) * d_error + d_error**2).mean(1, keepdims=True) + (depth + 3) * EPS * variance
    inverse = 1 / np.sqrt(variance)
    relative = variance_error / variance / 2 * 1.01 + 3 * EPS
    exact = d * inverse * weight + (0 if bias is None else bias.astype(np.float64))
    error = np.abs(weight) * inverse * (d_error + np.abs(d) * (relative + 2 * EPS)) * 1.01 + EPS * np.abs(exact)
    return exact, error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("width", [1, 3, 50, 64, 127, 768, 1030, 2560])
def test_norms_equal_float64(kernels: Any, dtype: str, centered: bool, width: int) -> None:
    rows, ld = 5, _pad(width) + 64
    x = _random(width, rows, width, spread=3.0) + np.float32(0.5)
    weight, bias = _random(1, width), _random(2, width) if centered else None
    before = elements.encode(np.full((rows, ld), POISON, np.float32), dtype)
    padded = _padded(x, ld)
    padded[:, _pad(width) :] = np.nan  # zeros are promised up to there
    actual = kernels.norm(dtype=dtype, input=padded, order=None, output=before, weight=weight, bias=bias, eps=1e-5)
    exact, error = _norm_error(x, weight, bias, 1e-5)
    values = elements.decode(actual, dtype)
    assert (np.abs(values[:, :width] - exact) <= error + elements.half_unit(exact, error, dtype)).all()
    np.testing.assert_array_equal(values[:, width:], POISON)


@pytest.mark.parametrize("width", [8196, 16390])
def test_wide_rows_are_kept_in_registers_too(kernels: Any, width: int) -> None:
    x, weight = _random(1, 1, width), _random(2, width)
    output = np.zeros((1, _pad(width)), np.float32)
    actual = kernels.norm(
        dtype="float32", input=_padded(x, _pad(width)), order=None, output=output, weight=weight, bias=None, eps=1e-6
    )
    exact, error = _norm_error(x, weight, None, 1e-6)
    assert (np.abs(actual[:, :width] - exact) <= error).all()


def test_a_row_that_no_block_can_hold_is_refused(kernels: Any) -> None:
    x = np.zeros((1, 32832), np.float32)
    with pytest.raises(RuntimeError, match="32832 is wider than 32768"):
        kernels.norm(dtype="float32", input=x, order=None, output=x, weight=x[0], bias=None, eps=1e-6)


def test_norms_of_chosen_rows_are_the_same_bits_as_of_all(kernels: Any) -> None:
    x, weight, bias = _random(3, 7, 128), _random(4, 128), _random(5, 128)
    everything = kernels.norm(
        dtype="bfloat16", input=x, order=None, output=np.zeros((7, 128), np.uint16), weight=weight, bias=bias, eps=1e-5
    )
    order = np.array([6, 0, 6, 3], np.int32)
    chosen = kernels.norm(
        dtype="bfloat16", input=x, order=order, output=np.zeros((4, 128), np.uint16), weight=weight, bias=bias, eps=1e-5
    )
    np.testing.assert_array_equal(chosen, everything[order])


# ---- rotation


def test_rotation_table_is_cosines_and_sines_of_float32_angles(kernels: Any) -> None:
    positions = np.array([0, 1, 7, 4095, 131071], np.int32)
    inv_freq = (10000.0 ** -(np.arange(20) / 20)).astype(np.float32)
    actual = kernels.rotation_table(positions=positions, inv_freq=inv_freq, scale=1.25)
    angles = (positions[:, None].astype(np.float32) * inv_freq).astype(np.float64)
    expected = 1.25 * np.stack([np.cos(angles), np.sin(angles)], 1)
    # Within 2 units of the last place (CUDA's guide) of numbers up to 1, and the product with the scale.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1.25 * 6 * EPS)


class Heads:
    """Heads of a few jobs' tokens, and what rope_and_store should make of them, in float64."""

    def __init__(
        self, seed: int, dtype: str, heads: int, kv_heads: int, head_dim: int, block_size: int, half: int, norm: bool
    ) -> None:
        rng = np.random.default_rng(seed)
        self.dtype, self.heads, self.kv_heads, self.head_dim = dtype, heads, kv_heads, head_dim
        self.block_size, self.half = block_size, half
        lengths, self.starts = [1, 3, 1, block_size + 2], [5, 0, block_size - 1, 2]
        self.fillers = 2
        tokens = sum(lengths)
        self.rows, tables, self.places = [], [], []
        free = list(rng.permutation(64))
        for row, (length, start) in enumerate(zip(lengths, self.starts, strict=True)):
            blocks = [int(free.pop()) for _ in range(-(-(start + length) // block_size))]
            self.rows.append([len(self.places), length, start, len(tables)])
            tables += blocks
            for i in range(length):
                self.places.append((row, blocks[(start + i) // block_size], (start + i) % block_size))
        self.rows.append([tokens, 0, 0, 0])
        self.tables = np.array(tables, np.int32)
        self.token_rows = np.array([p[0] for p in self.places] + [-1] * self.fillers, np.int32)
        width = (heads + 2 * kv_heads) * head_dim
        self.qkv = elements.encode(_padded(_random(seed, tokens + self.fillers, width), _pad(width)), dtype)
        self.cos_sin = None
        if half:
            angles = rng.uniform(0, 7, (tokens + self.fillers, half))
            self.cos_sin = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
        self.q_norm = _random(seed + 1, head_dim) if norm else None
        self.k_norm = _random(seed + 2, head_dim) if norm else None
        self.padded = -(-head_dim // 16) * 16
        self.pool = elements.encode(np.full((64, 2, kv_heads, 2, block_size, self.padded), POISON, np.float32), dtype)

    def run(self, kernels: Any) -> tuple[np.ndarray, np.ndarray]:
        qkv, pool = kernels.rope_and_store(
            dtype=self.dtype,
            qkv=self.qkv,
            cos_sin=self.cos_sin,
            rotary_half=self.half,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=1e-6,
            num_heads=self.heads,
            pool=self.pool,
            num_layers=2,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            layer=1,
            rows=np.array(self.rows, np.int32),
            tables=self.tables,
            token_rows=self.token_rows,
        )
        return elements.decode(qkv, self.dtype), elements.decode(pool, self.dtype)

    def expected(self, token: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """A head as it should be, and a bound on the error before it is rounded."""
        x = elements.decode(self.qkv, self.dtype)[token, head * self.head_dim :][: self.head_dim].astype(np.float64)
        if head >= self.heads + self.kv_heads:
            return x, np.zeros_like(x)
        error = np.zeros_like(x)
        norm = self.q_norm if head < self.heads else self.k_norm
        if norm is not None:
            exact, bound = _norm_error(x[None].astype(np.float32), norm, None, 1e-6)
            x, error = exact[0], bound[0]
        if self.cos_sin is not None:
            half = self.half
            c, s = self.cos_sin[token].astype(np.float64)
            a, b = x[:half].copy(), x[half : 2 * half].copy()
            ea, eb = error[:half].copy(), error[half : 2 * half].copy()
            x[:half], x[half : 2 * half] = a * c - b * s, b * c + a * s
            error[:half] = np.abs(c) * ea + np.abs(s) * eb + 3 * EPS * (np.abs(a * c) + np.abs(b * s))
            error[half : 2 * half] = np.abs(c) * eb + np.abs(s) * ea + 3 * EPS * (np.abs(b * c) + np.abs(a * s))
        return x, error

    def check(self, kernels: Any) -> None:
        qkv, pool = self.run(kernels)
        before = elements.decode(self.qkv, self.dtype)
        rest = elements.decode(self.pool, self.dtype).copy()
        expected_qkv = before.copy()
        for token, (_, block, slot) in enumerate(self.places):
            for head in range(self.heads + 2 * self.kv_heads):
                exact, error = self.expected(token, head)
                bound = error + elements.half_unit(exact, error, self.dtype)
                if head < self.heads:
                    columns = slice(head * self.head_dim, (head + 1) * self.head_dim)
                    actual = qkv[token, columns]
                    expected_qkv[token, columns] = actual
                else:
                    kv = head - self.heads
                    stored = pool[block, 1, kv % self.kv_heads, kv // self.kv_heads, slot]
                    actual = stored[: self.head_dim]
                    np.testing.assert_array_equal(stored[self.head_dim :], 0)
                    rest[block, 1, kv % self.kv_heads, kv // self.kv_heads, slot] = stored
                assert (np.abs(actual - exact) <= bound).all(), (token, head)
        np.testing.assert_array_equal(qkv, expected_qkv)  # keys, values and tokens that fill up stay as they were
        np.testing.assert_array_equal(pool, rest)  # and so do other slots and layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "half", "norm"),
    [
        (4, 2, 16, 8, False),
        (6, 2, 64, 32, False),
        (3, 3, 80, 40, True),
        (7, 1, 96, 12, False),  # part of a head is rotated, by steps of less than 16 bytes
        (2, 2, 80, 8, True),
        (8, 1, 128, 64, True),
        (2, 1, 128, 0, False),  # learned positions
        (2, 1, 20, 5, True),
        (3, 1, 25, 9, False),
        (3, 1, 25, 9, True),  # what is not rotated is odd, by elements
        (2, 1, 24, 8, True),  # and by 16 bytes
    ],
)
def test_heads_are_rotated_and_stored(
    kernels: Any, dtype: str, heads: int, kv_heads: int, head_dim: int, half: int, norm: bool
) -> None:
    Heads(head_dim, dtype, heads, kv_heads, head_dim, 4, half, norm).check(kernels)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_heads_are_rotated_and_stored(kernels: Any, data: st.DataObject) -> None:
    head_dim = data.draw(st.integers(1, 12)) * data.draw(st.sampled_from([2, 8, 16]))
    half = data.draw(st.integers(0, head_dim // 2))
    kv_heads = data.draw(st.integers(1, 3))
    Heads(
        data.draw(st.integers(0, 1000)),
        data.draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        kv_heads * data.draw(st.integers(1, 4)),
        kv_heads,
        head_dim,
        data.draw(st.sampled_from([1, 3, 16])),
        half,
        data.draw(st.booleans()),
    ).check(kernels)


# ---- activations and sums


def _activation(kind: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact, and a bound on float32's error. Of x · sigmoid(v) = n / d: a power by 2 units in the last place and 2 |v|
    roundings, in n, and in d by half as much; d, the reciprocal's unit, n and the result: 12 + 3 |v|; and v itself may
    be off by 6 roundings. A power below 2^-126 is zero."""
    if kind == "relu":
        return np.maximum(x, 0), np.zeros_like(x)
    if kind == "gelu":
        erf = np.vectorize(math.erf)(x / math.sqrt(2))
        return 0.5 * x * (1 + erf), np.abs(x) * 8 * EPS  # the sum of 1 and erf keeps erf's absolute error
    v = x if kind == "silu" else 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    sigmoid = np.exp(-np.logaddexp(0, -v))
    return x * sigmoid, np.abs(x * sigmoid) * (12 + 9 * np.abs(v)) * EPS + (1 + np.abs(x)) * 2.0**-126


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [1, 63, 64, 300])
def test_activations_equal_float64(kernels: Any, dtype: str, kind: str, gated: bool, width: int) -> None:
    rows, pad = 3, _pad(width)
    value, gate = _random(width, rows, width, spread=4.0), _random(width + 1, rows, width)
    value[0, : min(width, 6)] = [0, 30, -30, 100, -100, -0.001][: min(width, 6)]
    before = np.concatenate([_padded(value, pad), _padded(gate, pad)], 1)
    x = elements.encode(before, dtype)
    actual = elements.decode(kernels.activate(dtype=dtype, kind=kind, gated=gated, x=x, width=width), dtype)
    inputs = elements.decode(x, dtype)
    exact, error = _activation(kind, inputs[:, :width].astype(np.float64))
    if gated:
        by = inputs[:, pad : pad + width].astype(np.float64)
        exact, error = exact * by, error * np.abs(by) + EPS * np.abs(exact * by)
    assert (np.abs(actual[:, :width] - exact) <= error + elements.half_unit(exact, error, dtype)).all()
    np.testing.assert_array_equal(actual[:, width:pad], 0)
    np.testing.assert_array_equal(actual[:, pad:], inputs[:, pad:])


@pytest.mark.parametrize("count", [1, 3, 4, 5, 1027, 2048])
def test_words_reach_the_device_and_come_back(kernels: Any, count: int) -> None:
    words = np.random.default_rng(count).integers(0, 2**32, count, np.uint32)
    np.testing.assert_array_equal(kernels.copy_there_and_back(words=words), words)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 1027, 2048])
def test_sums_are_float32_sums(kernels: Any, count: int) -> None:
    a, b = _random(1, count), _random(2, count)
    np.testing.assert_array_equal(kernels.add(input=a, output=b), a + b)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_parts_are_summed_in_rank_order(kernels: Any, ranks: int) -> None:
    """To the bit: another order would give other bits for numbers of such different sizes."""
    generator = np.random.default_rng(ranks)
    count = 64 * 21  # more than a block's, and not a multiple of it
    parts = (generator.standard_normal((ranks, count)) * 10.0 ** generator.integers(-3, 4, (ranks, count))).astype(
        np.float32
    )
    expected = parts[0].copy()
    for part in parts[1:]:
        expected += part
    np.testing.assert_array_equal(kernels.sum_parts(parts), expected)
