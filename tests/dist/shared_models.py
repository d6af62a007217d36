"""A small model and one with long residuals, with plans for them, as tests share them out over ranks."""

from __future__ import annotations

import numpy as np
from synthetic import SyntheticModel, llama_spec, plan

from fastserve.config import RuntimeConfig
from fastserve.types import BatchPlan

SMALL = SyntheticModel(llama_spec(num_layers=3))
SMALL_CONFIG = RuntimeConfig(dtype="float32", block_size=4, num_blocks=10, max_num_batched_tokens=16, threads=1)
PROMPT = plan(1, [(0, 0, 3, 1)], [5, 6, 7], opened=[(0, 3)], table=[(0, 0, 9)])

# 512 rows of its residual are 4 MiB, sixteen times what is sent at once.
WIDE = SyntheticModel(
    llama_spec(
        hidden_size=2048,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=64,
        rope_inv_freq=(1.0, 0.5, 0.25, 0.125),
    )
)
WIDE_CONFIG = RuntimeConfig(dtype="float32", block_size=16, num_blocks=64, max_num_batched_tokens=512, threads=1)
WIDE_BYTES = 512 * 2048 * 4


def wide_plan(number: int) -> BatchPlan:
    """A prompt of 512 tokens in a slot and blocks of its own; `number` is 1 or 2."""
    slot, blocks = number, range(32 * (number - 1), 32 * number)
    tokens = np.random.default_rng(number).integers(0, WIDE.spec.vocab_size, 512).tolist()
    table = [(slot, index, block) for index, block in enumerate(blocks)]
    return plan(number, [(slot, 0, 512, 0)], tokens, opened=[(slot, 512)], table=table)
