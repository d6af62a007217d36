"""Decoding a full batch at long context with each type of KV cache: seconds of an iteration, interleaved, the least of
several, and what attention alone takes of it.

    python benchmarks/kv_cache_dtype.py --rows 32 --context 1024
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from fastserve import _C
from fastserve.config import RuntimeConfig
from fastserve.loaders import open_model
from fastserve.loaders.spec import ModelSpec
from fastserve.native import NativeRuntime
from fastserve.types import BatchPlan

BLOCK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=0, help="0: one a core")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--attention-only", action="store_true", help="leave the model out: one layer's attention")
    options = parser.parse_args()
    source = open_model(options.model)
    print(f"{options.rows} rows × {options.context} tokens, {source.name}")
    alone = {kv: _Attention(source.spec, kv, options) for kv in options.kv_cache_dtype}
    whole = {} if options.attention_only else {kv: _Decode(source, kv, options) for kv in options.kv_cache_dtype}
    for _ in range(options.runs):
        for each in (*alone.values(), *whole.values()):
            each.measure()
    for kv in options.kv_cache_dtype:
        layer = alone[kv]
        line = f"{kv:9} attention {layer.least * 1e6:7.0f} µs a layer, {layer.bytes / layer.least / 1e9:5.1f} GB/s"
        if whole:
            line += f"   iteration {whole[kv].least * 1e3:6.1f} ms, {options.rows / whole[kv].least:6.0f} tokens/s"
        print(line)


def _tables(rows: int, context: int) -> list[list[int]]:
    """Blocks of each row, scattered over the pool."""
    blocks = -(-(context + 1) // BLOCK)
    tables: list[list[int]] = np.random.default_rng(0).permutation(rows * blocks).reshape(rows, blocks).tolist()
    return tables


class _Attention:
    """One layer by itself."""

    def __init__(self, spec: ModelSpec, kv: str, options: argparse.Namespace) -> None:
        tables, rng = _tables(options.rows, options.context), np.random.default_rng(0)
        shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        self._layer = _C.Attention(*shape, kv, BLOCK, sum(map(len, tables)), options.threads)
        width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        prompt = rng.standard_normal((options.context, width), np.float32)
        for table in tables:
            self._layer.run(prompt, [(options.context, 0, table)])
        self._token = rng.standard_normal((options.rows, width), np.float32)
        self._rows = [(1, options.context, table) for table in tables]
        self.bytes = self._layer.block_bytes * sum(map(len, tables))
        self.least = float("inf")

    def measure(self) -> None:
        self.least = min(self.least, self._layer.seconds(self._token, self._rows, 3)[1])


class _Decode:
    """The whole model. Every iteration computes the same positions again."""

    def __init__(self, source: Any, kv: str, options: argparse.Namespace) -> None:
        tables = _tables(options.rows, options.context)
        config: dict[str, Any] = dict(kv_cache_dtype=kv, block_size=BLOCK, num_blocks=sum(map(len, tables)))
        self._runtime = NativeRuntime(
            source, RuntimeConfig(max_num_batched_tokens=options.context, threads=options.threads, **config)
        )
        for slot, table in enumerate(tables):
            entries = [(slot, index, block) for index, block in enumerate(table)]
            prompt = np.random.default_rng(slot).integers(3, source.spec.vocab_size, options.context)
            self._run([(slot, 0, options.context, 0)], prompt, opened=[slot], table=entries)
        self._rows = [(slot, options.context, 1, 1) for slot in range(options.rows)]
        self.least = float("inf")

    def measure(self) -> None:
        for _ in range(2):
            self.least = min(self.least, self._run(self._rows, np.full(len(self._rows), 5)))

    def _run(self, rows: list[Any], tokens: np.ndarray, opened: Any = (), table: Any = ()) -> float:
        plan = BatchPlan(
            plan_id=0,
            rows=np.array(rows, np.int32),
            tokens=tokens.astype(np.int32),
            opened=np.array([(slot, len(tokens), 0, 0, -1, 0, 0, 0) for slot in opened], np.int32).reshape(-1, 8),
            opened_params=np.array([(0, 1, 0, 1, 0, 0)] * len(opened), np.float32).reshape(-1, 6),
            opened_seeds=np.zeros(len(opened), np.uint64),
            table=np.array(table, np.int32).reshape(-1, 3),
            closed=np.array([], np.int32),
        )
        self._runtime.submit(plan)
        result = self._runtime.poll()
        assert result is not None
        return result.seconds


if __name__ == "__main__":
    main()
