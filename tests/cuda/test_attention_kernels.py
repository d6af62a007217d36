"""Paged attention on the CUDA machine: against NumPy in float64, and bitwise the same whoever computes a token.

What a pool has besides the positions that a batch may see is NaN: blocks and slots of nobody, the positions after a
row's last token, the other layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from elements import decode, encode
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = ["float32", "bfloat16", "float16"]
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SUM = 2.0**-22  # what an addition of a matrix unit may lose, which rounds in its own way
LAYER, LAYERS = 1, 2
SEGMENT = 256


@dataclass(frozen=True)
class Shape:
    head_dim: int
    block_size: int
    kv_heads: int
    group: int
    lengths: tuple[int, ...]
    query_offset: int = 0
    dropped: int = 0  # query heads of the last KV head that another shard has

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group - self.query_offset - self.dropped

    def kv_head(self, head: int) -> int:
        return (head + self.query_offset) // self.group


@dataclass(frozen=True)
class Part:
    """Tokens [start, start + tokens) of a job."""

    job: int
    start: int
    tokens: int


@dataclass
class Jobs:
    """Random queries, keys and values, some of which are much larger than others."""

    kernels: ModuleType
    shape: Shape
    dtype: str
    seed: int = 0
    q: list[np.ndarray] = field(init=False)  # for each job [tokens, heads, head_dim], as bits
    k: list[np.ndarray] = field(init=False)  # [tokens, KV heads, head_dim]
    v: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        shape, rng = self.shape, np.random.default_rng(self.seed)
        self.q, self.k, self.v = [], [], []
        for length in shape.lengths:
            for to, heads in ((self.q, shape.heads), (self.k, shape.kv_heads), (self.v, shape.kv_heads)):
                x = rng.standard_normal((length, heads, shape.head_dim))
                x *= 10.0 ** rng.uniform(-0.5, 0.5, (length, 1, 1))
                to.append(encode(x, self.dtype))
        blocks = [-(-length // shape.block_size) for length in shape.lengths]
        self.blocks = sum(blocks) + 2
        order = rng.permutation(self.blocks)[: sum(blocks)].tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in blocks]

    @property
    def scale(self) -> float:
        return float(np.float32(self.shape.head_dim**-0.5))

    def pool(self, contexts: dict[int, int]) -> np.ndarray:
        """With the first so many positions of some jobs, all else being NaN."""
        shape = self.shape
        padded = -(-shape.head_dim // 16) * 16
        pool = encode(np.full((self.blocks, LAYERS, shape.kv_heads, 2, shape.block_size, padded), np.nan), self.dtype)
        for job, context in contexts.items():
            for position in range(context):
                block = self.tables[job][position // shape.block_size]
                slot = pool[block, LAYER, :, :, position % shape.block_size]
                slot[..., shape.head_dim :] = 0
                slot[:, 0, : shape.head_dim] = self.k[job][position]
                slot[:, 1, : shape.head_dim] = self.v[job][position]
        return pool

    def attention(self, pool: np.ndarray, decodes: int, segments: int) -> Any:
        shape = self.shape
        return self.kernels.PagedAttention(
            self.dtype, pool, LAYERS, shape.kv_heads, shape.head_dim, shape.block_size, LAYER, shape.heads,
            shape.group, shape.query_offset, self.scale, decodes, segments,
        )  # fmt: skip

    def run(
        self,
        parts: list[Part],
        *,
        block_warps: int = 0,
        splits: int = 0,
        fill_up: int = 0,
        spare: int = 0,
        again: int = 0,
    ) -> list[np.ndarray]:
        """The outputs of the parts, [tokens, heads, head_dim], in one batch, with rows and tokens that only fill up and
        a largest context that is `spare` beyond the real one. Run `again` so often."""
        shape = self.shape
        given = sum(part.tokens for part in parts)
        tokens = given + fill_up
        width = shape.heads * shape.head_dim
        # Keys and values follow in a row of qkv; nobody reads them there.
        ld = -(-(width + 2 * shape.kv_heads * shape.head_dim) // 64) * 64
        qkv = encode(np.full((tokens, ld), np.nan), self.dtype)
        rows, tables, token_rows, decode_rows, tiles = [], [], np.full(tokens, -1, np.int32), [], []
        first, longest, first_segments, all_segments = 0, 0, [], 0
        for r, part in enumerate(parts):
            rows.append((first, part.tokens, part.start, len(tables)))
            tables += self.tables[part.job][: -(-(part.start + part.tokens) // shape.block_size)]
            queries = self.q[part.job][part.start : part.start + part.tokens]
            qkv[first : first + part.tokens, :width] = queries.reshape(part.tokens, width)
            token_rows[first : first + part.tokens] = r
            if part.tokens == 1:
                decode_rows.append(r)
                first_segments.append(all_segments)
                segments = -(-(part.start + 1) // SEGMENT)
                all_segments += segments if segments > 1 else 0
                longest = max(longest, part.start + 1)
            else:
                step = self.kernels.PREFILL_TILE
                tiles += [(r, first + done) for done in range(0, part.tokens, step)]
            first += part.tokens
        if fill_up:
            decode_rows += range(len(rows), len(rows) + fill_up)
            first_segments += [0] * fill_up
            rows += [(0, 0, 0, 0)] * fill_up
        longest = max(longest, 1) + spare
        untouched = encode(np.full((tokens, -(-width // 64) * 64), 7.0), self.dtype)
        contexts = {part.job: part.start + part.tokens for part in sorted(parts, key=lambda part: part.start)}
        attention = self.attention(self.pool(contexts), len(decode_rows), all_segments)
        outputs = [
            attention.run(
                qkv, untouched, np.asarray(rows, np.int32).reshape(-1, 4), np.asarray(tables, np.int32), token_rows,
                np.asarray(decode_rows, np.int32), np.asarray(first_segments, np.int32),
                np.asarray(tiles, np.int32).reshape(-1, 2), longest, block_warps, splits,
            )
            for _ in range(again + 1)
        ]  # fmt: skip
        for output in outputs:
            assert np.array_equal(output, outputs[0])
            assert np.array_equal(output[given:], untouched[given:])
            assert np.array_equal(output[:, width:], untouched[:, width:])
        edges = np.cumsum([part.tokens for part in parts])[:-1]
        return np.split(outputs[0][:given, :width].reshape(given, shape.heads, shape.head_dim), edges)

    @cached_property
    def whole(self) -> list[np.ndarray]:
        """Every job's outputs, as one prefill."""
        return self.run([Part(job, 0, length) for job, length in enumerate(self.shape.lengths)])


@cache
def jobs_of(kernels: ModuleType, shape: Shape, dtype: str) -> Jobs:
    return Jobs(kernels, shape, dtype)


def softmax_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [tokens, head_dim] of one head, and how far the kernel's may be from them."""
    tokens, head_dim = q.shape
    scores = scale * q @ k.T
    scores[np.triu_indices(tokens, 1)] = -np.inf
    shares = np.exp(scores - scores.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    output = shares @ v
    unit = UNIT[dtype]
    # How far scores may be off: the sum over dimensions, the exponent's rounding (which may be twice the largest score)
    # and its power of 2; a segment's and a tile's rescaling each add a power of 2 and a product.
    products = scale * np.abs(q) @ np.abs(k).T
    largest = np.abs(np.where(shares > 0, scores, 0)).max(1, keepdims=True)
    rescaled = 2 * (tokens / 64 + 2)
    off = (head_dim + 2) * SUM * products + 4 * UNIT["float32"] * largest + (rescaled + 2) * 2.0**-22
    weights = off + (unit * 1.01 if dtype != "float32" else 0)
    away = np.abs(v[None] - output[:, None])
    growth = np.exp(2 * np.where(shares > 0, weights, 0).max(1, keepdims=True))
    bound = growth * np.einsum("qt,qtd->qd", shares * weights, away)
    # The sums over positions; the output's rounding; weights and outputs that are too small for float16.
    bound += (tokens + 8) * SUM * (shares @ np.abs(v)) + unit * np.abs(output)
    if dtype == "float16":
        bound += 2.0**-25 * (np.abs(v).sum(0) + tokens * np.abs(output) + 1)
    return output, bound


def assert_is_softmax_attention(jobs: Jobs, outputs: list[np.ndarray]) -> None:
    dtype = jobs.dtype
    for q, k, v, got in zip(jobs.q, jobs.k, jobs.v, outputs, strict=True):
        for head in range(jobs.shape.heads):
            kv = jobs.shape.kv_head(head)
            arguments = [decode(x, dtype).astype(np.float64) for x in (q[:, head], k[:, kv], v[:, kv])]
            expected, bound = softmax_attention(*arguments, jobs.scale, dtype)
            off = np.abs(decode(got[:, head], dtype).astype(np.float64) - expected)
            assert (off <= bound).all(), f"head {head}: up to {np.nanmax(off / bound)} × the bound"


SHAPES = [
    Shape(128, 16, 1, 4, (1, 63, 70)),
    Shape(64, 16, 2, 1, (300, 2)),
    Shape(80, 3, 1, 3, (65,)),
    Shape(16, 1, 1, 8, (17, 130)),
    Shape(96, 32, 1, 7, (33,)),
    Shape(20, 7, 1, 20, (40,)),
    Shape(33, 4, 2, 2, (9, 66)),
    Shape(256, 24, 1, 2, (80,)),
    Shape(144, 8, 1, 1, (70,)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_is_softmax_attention(kernels: ModuleType, shape: Shape, dtype: str) -> None:
    jobs = jobs_of(kernels, shape, dtype)
    assert_is_softmax_attention(jobs, jobs.whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_is_prefill(kernels: ModuleType, shape: Shape, dtype: str) -> None:
    """Every token as a row of its own: the same bits."""
    jobs = jobs_of(kernels, shape, dtype)
    for job, length in enumerate(shape.lengths):
        for position in range(length):
            (got,) = jobs.run([Part(job, position, 1)])
            assert np.array_equal(got, jobs.whole[job][position : position + 1])


# Tokens at both sides of the edges of tiles and segments.
LONG = Shape(64, 16, 1, 3, (700,))
EDGES = [0, 63, 64, 127, 128, 255, 256, 257, 319, 320, 511, 512, 513, 699]


@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_merge(kernels: ModuleType, dtype: str) -> None:
    jobs = jobs_of(kernels, LONG, dtype)
    assert_is_softmax_attention(jobs, jobs.whole)
    # However many blocks share the segments of a row, and some find none. Counters are as before after each run.
    for splits in (0, 1, 2, 3, 99):
        for spare in (0, 1000):
            for position in EDGES:
                (got,) = jobs.run([Part(0, position, 1)], splits=splits, block_warps=4, spare=spare, again=1)
                assert np.array_equal(got, jobs.whole[0][position : position + 1]), (splits, spare, position)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_warps", [4, 8])
@pytest.mark.parametrize(
    ("values", "expected"),
    [((2.0**-10, 2.0**15, -(2.0**15)), 0.0), ((2.0**15, -(2.0**15), 2.0**-10), 2.0**-10 / 3)],
    ids=["lost", "kept"],
)
def test_segments_merge_in_ascending_order(
    kernels: ModuleType, values: tuple[float, ...], expected: float, block_warps: int, dtype: str
) -> None:
    """All positions weigh the same. One segment's small values are lost where the large ones of another come on top."""
    jobs = Jobs(kernels, Shape(64, 16, 1, 2, (768,)), dtype)
    jobs.k[0][:] = encode(np.zeros(1), dtype)
    jobs.v[0][:] = encode(np.repeat(values, 256), dtype)[:, None, None]
    output = decode(encode(np.array([expected]), dtype), dtype)
    for splits in (1, 2, 3):
        (got,) = jobs.run([Part(0, 767, 1)], splits=splits, block_warps=block_warps)
        assert (decode(got, dtype) == output).all()
    (got,) = jobs.run([Part(0, 700, 68)], splits=1, block_warps=block_warps)
    assert (decode(got[-1], dtype) == output).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_segments_of_large_heads_merge(kernels: ModuleType, head_dim: int, dtype: str) -> None:
    jobs = jobs_of(kernels, Shape(head_dim, 16, 1, 2, (520,)), dtype)
    assert_is_softmax_attention(jobs, jobs.whole)
    for splits in (1, 2, 3):
        (got,) = jobs.run([Part(0, 519, 1)], splits=splits, block_warps=4, again=1)
        assert np.array_equal(got, jobs.whole[0][519:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_warps", [4, 8])
def test_chunks_of_a_prompt(kernels: ModuleType, block_warps: int, dtype: str) -> None:
    """Chunks begin and end anywhere; earlier ones are read from the pool."""
    jobs = jobs_of(kernels, LONG, dtype)
    for start, tokens in [(0, 2), (0, 129), (1, 64), (63, 66), (100, 300), (250, 17), (255, 2), (256, 256), (571, 129)]:
        (got,) = jobs.run([Part(0, start, tokens)], block_warps=block_warps, splits=1)
        assert np.array_equal(got, jobs.whole[0][start : start + tokens]), (start, tokens)


BATCHED = [
    Shape(16, 5, 1, 2, (300, 70, 131)),
    Shape(48, 16, 2, 3, (90, 40, 260)),
    Shape(128, 8, 1, 1, (65, 270)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_batches(kernels: ModuleType, dtype: str, data: st.DataObject) -> None:
    """Jobs cut anywhere, their chunks and decodes in batches of any kind and computed in any way: the same bits."""
    shape = data.draw(st.sampled_from(BATCHED))
    jobs = jobs_of(kernels, shape, dtype)
    done = [data.draw(st.integers(0, length - 1)) for length in shape.lengths]
    for _ in range(4):
        parts = []
        for job in data.draw(st.permutations(range(len(done)))):
            rest = shape.lengths[job] - done[job]
            if rest > 0 and data.draw(st.booleans()):
                parts.append(Part(job, done[job], data.draw(st.sampled_from([1, 1, 1, 2, 50, 140])) % (rest + 1) or 1))
        if not parts:
            continue
        options = {
            "block_warps": data.draw(st.sampled_from([4, 8])),
            "splits": data.draw(st.integers(1, 3)),
            "fill_up": data.draw(st.integers(0, 2)),
            "spare": data.draw(st.sampled_from([0, 400])),
        }
        for part, got in zip(parts, jobs.run(parts, **options), strict=True):
            assert np.array_equal(got, jobs.whole[part.job][part.start : part.start + part.tokens]), (part, options)
            done[part.job] += part.tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_of_heads(kernels: ModuleType, dtype: str) -> None:
    """Four and five of nine query heads over three KV heads, as two ranks have them."""
    jobs = Jobs(kernels, Shape(32, 16, 3, 3, (70, 20)), dtype)
    for first, shape in [
        (0, Shape(32, 16, 2, 3, (70, 20), dropped=2)),
        (4, Shape(32, 16, 2, 3, (70, 20), query_offset=1)),
    ]:
        shard = Jobs(kernels, shape, dtype)
        shard.q = [q[:, first : first + shape.heads] for q in jobs.q]
        shard.k, shard.v = ([x[:, first // 3 :][:, :2] for x in of] for of in (jobs.k, jobs.v))
        outputs = [*shard.whole, *shard.run([Part(0, 69, 1), Part(1, 19, 1)])]
        expected = [*jobs.whole, jobs.whole[0][69:], jobs.whole[1][19:]]
        for got, whole in zip(outputs, expected, strict=True):
            assert np.array_equal(got, whole[:, first : first + shape.heads])


def test_heads_that_are_too_large_are_refused(kernels: ModuleType) -> None:
    with pytest.raises(kernels.Error, match="attention takes heads of up to 256 dimensions, got 272"):
        Jobs(kernels, Shape(272, 16, 1, 1, (1,)), "bfloat16").run([Part(0, 0, 1)])


def test_the_workspace_fits_beside_a_pool(kernels: ModuleType) -> None:
    """Nobody sets memory aside for it, so it grows with what rows have in the pool, however long the longest is."""
    shape = {"dtype": "bfloat16", "num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    counters = kernels.attention_workspace(**shape, decodes=0, segments=0)
    layer = 2 * 8 * 128 * 2 * SEGMENT  # bytes of a segment's keys and values
    for rows in (1, 64):
        for segments in (rows, 1000 * rows):
            partials = kernels.attention_workspace(**shape, decodes=rows, segments=segments) - counters
            assert partials == 4 * 132 * 32 * segments  # a vector, two numbers, and two that keep it aligned
            assert partials < 0.02 * layer * segments
    # One block for each row and KV head fills the device: nobody leaves anything for others.
    assert kernels.attention_workspace(**shape, decodes=256, segments=100_000) == counters
