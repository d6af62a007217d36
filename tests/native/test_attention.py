"""Attention by itself, for every type of KV cache and instruction set, against NumPy in float64."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from fastserve import _C
from fastserve.native import instruction_sets

KV_DTYPES = ["float32", "bfloat16", "int8"]
SEGMENT = 256
HEADS, KV_HEADS = 6, 2
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-9}
CASES = [(10, 3, (300,)), (64, 16, (1, 40, 530)), (33, 32, (257, 5)), (128, 5, (90,))]  # head_dim, block_size, tokens
Case = tuple[int, int, tuple[int, ...]]


class Sequences:
    """Random queries, keys and values of several jobs. Some dimensions and some tokens are much larger than others."""

    def __init__(self, head_dim: int, block_size: int, lengths: tuple[int, ...], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.head_dim, self.block_size, self.lengths = head_dim, block_size, lengths
        tokens = sum(lengths)
        width = (HEADS + 2 * KV_HEADS) * head_dim
        qkv = rng.standard_normal((tokens, width)) * 10.0 ** rng.uniform(-0.7, 0.7, (tokens, 1))
        qkv[:, HEADS * head_dim :: 7] *= 4
        qkv[:, : HEADS * head_dim] /= head_dim
        self.qkv = qkv.astype(np.float32)
        blocks = [-(-length // block_size) for length in lengths]
        order = rng.permutation(sum(blocks)).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in blocks]

    def native(self, kv_dtype: str) -> _C.Attention:
        blocks = sum(map(len, self.tables))
        return _C.Attention(HEADS, KV_HEADS, self.head_dim, kv_dtype, self.block_size, blocks, threads=2)

    def run(self, kv_dtype: str) -> np.ndarray:
        rows = [(length, 0, table) for length, table in zip(self.lengths, self.tables, strict=True)]
        return self.native(kv_dtype).run(self.qkv, rows)

    def split(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each job and head: q, k and v as float64 [tokens, head_dim]."""
        heads = self.qkv.astype(np.float64).reshape(len(self.qkv), -1, self.head_dim)
        found, first = [], 0
        for length in self.lengths:
            for head in range(HEADS):
                kv = HEADS + head // (HEADS // KV_HEADS)
                found.append(tuple(heads[first : first + length, h] for h in (head, kv, kv + KV_HEADS)))
            first += length
        return found  # type: ignore[return-value]

    def heads_of(self, output: np.ndarray) -> list[np.ndarray]:
        """The output, in the order of split()."""
        heads = output.astype(np.float64).reshape(len(output), HEADS, self.head_dim)
        edges = np.cumsum([0, *self.lengths])
        return [heads[a:b, h] for a, b in pairwise(edges) for h in range(HEADS)]


def _held(x: np.ndarray, kv_dtype: str) -> np.ndarray:
    """K or V as the cache has it."""
    if kv_dtype == "float32":
        return x
    if kv_dtype == "bfloat16":
        bits = x.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32).astype(np.float64)
    largest = np.abs(x).max(1, keepdims=True).astype(np.float32)
    levels = np.rint(x.astype(np.float32) * (np.float32(127) / largest))
    return levels.astype(np.float64) * (largest / np.float32(127)).astype(np.float64)


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shares of the tokens, [tokens, tokens], and the outputs."""
    scores = q @ k.T
    scores[np.triu_indices(len(q), 1)] = -np.inf
    shares = np.exp(scores - scores.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return shares, shares @ v


def _moved(scores: np.ndarray, weights: float, shares: np.ndarray, v: np.ndarray, output: np.ndarray) -> np.ndarray:
    """How far outputs may move when scores do by up to `scores` [tokens, tokens] and weights by a share `weights`."""
    growth = np.exp(2 * np.where(shares > 0, scores, 0).max(1, keepdims=True))
    off = np.abs(v[None] - output[:, None])  # [query, token, dimension]
    return growth * np.einsum("qt,qtd->qd", shares * (scores + weights), off)


def _kernel_error(kv_dtype: str, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """What rounding the query and the weights may do, K and V being what the cache holds."""
    shares, output = _attention(q, k, v)
    products = np.abs(q) @ np.abs(k).T
    # Products, sums and the exponential, whose argument may be as large as a score.
    scores = (len(q[0]) + 8) * UNIT["float32"] * products + 4 * UNIT["float32"] * np.abs(q @ k.T).max()
    if kv_dtype == "float32":
        return _moved(scores, 300 * UNIT["float32"], shares, v, output) + 600 * UNIT["float32"] * np.abs(v).max()
    if kv_dtype == "bfloat16":
        scores += UNIT["bfloat16"] * products
        weights = UNIT["bfloat16"] + 1e-4
        return _moved(scores, weights, shares, v, output) + 600 * UNIT["float32"] * np.abs(v).max()
    # Queries and weights are rounded to 1 / 16319 of the largest, a weight's being that of weight times V's largest.
    scores += 0.5 / 16319 * np.abs(q).max(1, keepdims=True) @ np.abs(k).sum(1)[None]
    largest = shares * np.abs(v).max(1)
    rounded = sum(
        largest[:, first : first + SEGMENT].max(1) * min(SEGMENT, len(q) - first) for first in range(0, len(q), SEGMENT)
    )
    return (
        _moved(scores, 1e-4, shares, v, output)
        + 0.5 / 16319 * np.asarray(rounded)[:, None]
        + 20 * UNIT["float32"] * np.abs(v).max()
    )


@cache
def _over_what_is_held(case: Case, kv_dtype: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each job and head, the output and how far the kernel's may be from it."""
    answers = []
    for q, k, v in Sequences(*case).split():
        k, v = _held(k, kv_dtype), _held(v, kv_dtype)
        answers.append((_attention(q, k, v)[1], _kernel_error(kv_dtype, q, k, v)))
    return answers


@cache
def _over_exact(case: Case) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same, where int8 was to hold the exact K and V.

    An element is off by half a level, 1/254 of its token's largest, at most. Errors of the elements are independent and
    spread evenly over a level, so that a score's has the deviation level · |q| / √12, and the largest of many is hardly
    beyond six of them."""
    answers = []
    for q, k, v in Sequences(*case).split():
        shares, output = _attention(q, k, v)
        level = np.abs(k).max(1) / 127
        scores = 6 / np.sqrt(12) * np.linalg.norm(q, axis=1)[:, None] * level[None]
        bound = _moved(scores, 0, shares, v, output)
        bound += (shares @ (np.abs(v).max(1) / 254))[:, None] * np.exp(2 * scores.max(1, keepdims=True))
        answers.append((output, bound + 2 * _kernel_error("int8", q, k, v)))
    return answers


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_over_what_the_cache_holds(
    case: Case, kv_dtype: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSERVE_ISA", isa)
    given = Sequences(*case)
    answers = _over_what_is_held(case, kv_dtype), _over_exact(case)
    for got, held, exact in zip(given.heads_of(given.run(kv_dtype)), *answers, strict=True):
        for what, (output, bound) in {"held": held, **({"exact": exact} if kv_dtype == "int8" else {})}.items():
            worst = (np.abs(got - output) / bound).max()
            assert worst <= 1, f"{what}: up to {worst:.2f} × the bound"


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_decode_is_prefill(kv_dtype: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens one by one, and cut by segment or not, as one piece: the same bits."""
    monkeypatch.setenv("FASTSERVE_ISA", isa)
    given = Sequences(20, 7, (530,))
    whole, attention = given.run(kv_dtype), given.native(kv_dtype)
    pieces = [1] * 30 + [200, 1, 1, 47, 1, 200, 25] + [1] * 25
    position = 0
    for count in pieces:
        got = attention.run(given.qkv[position : position + count], [(count, position, given.tables[0])])
        assert np.array_equal(got, whole[position : position + count])
        position += count
    assert position == 530


def test_int8_takes_half_of_bfloat16_and_its_scales() -> None:
    for head_dim, block_size in [(64, 16), (128, 16), (64, 48)]:
        held = {kv: _C.Attention(HEADS, KV_HEADS, head_dim, kv, block_size, 1).block_bytes for kv in KV_DTYPES}
        assert held["float32"] == 2 * held["bfloat16"]
        assert held["int8"] == held["bfloat16"] / 2 + 2 * 4 * KV_HEADS * block_size


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1e-38])
def test_tokens_that_int8_has_no_levels_for(value: float, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN or an infinity is still one for those who see it, and for nobody else; nothing is still nothing."""
    monkeypatch.setenv("FASTSERVE_ISA", isa)
    for part in (HEADS, HEADS + KV_HEADS):  # K, V
        given = Sequences(16, 16, (70,))
        columns = slice(part * 16, (part + 1) * 16)  # of KV head 0
        expected = given.run("int8")
        given.qkv[50, columns] = value
        got = given.run("int8")
        assert np.array_equal(got[:50], expected[:50])
        assert np.array_equal(got[:, 3 * 16 :], expected[:, 3 * 16 :])
        seen = got[50:, : 3 * 16]
        assert np.isfinite(seen).all() if abs(value) < 1 else not np.isfinite(seen).any()
        if part > HEADS and abs(value) < 1:
            given.qkv[50, columns] = 0
            assert np.array_equal(seen, given.run("int8")[50:, : 3 * 16])


def test_unknown_types_are_named() -> None:
    with pytest.raises(_C.Error, match="a KV cache type must be float32, bfloat16, float16 or int8, got 'half'"):
        _C.Attention(HEADS, KV_HEADS, 16, "half", 16, 1)
