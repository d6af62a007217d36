"""SmolLM2 with a quarter of the KV memory its jobs would take: every swap mode, and not one token changes."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from fastserve import LLM, SamplingParams
from fastserve.engine import IterationRecord

ROWS = 4
# Of a machine where moving KV is cheaper than computing it again, as it is here: decisions shall not depend on noise.
COST = dict(per_iteration=0.008, per_row=0.0002, per_token=0.0005, per_read=1e-7)


def _jobs() -> list[tuple[list[int], SamplingParams]]:
    """Twelve jobs: short and long, greedy and sampled."""
    draw = random.Random(3)
    jobs = []
    for number in range(12):
        prompt = [draw.randrange(3, 49152) for _ in range(draw.randrange(20, 90))]
        sampling: dict[str, Any] = {"temperature": 0.0} if number % 3 else {"temperature": 0.9, "top_p": 0.95}
        output = draw.choice((6, 12, 30, 50))
        jobs.append((prompt, SamplingParams(max_tokens=output, ignore_eos=True, seed=number, **sampling)))
    return jobs


class Run:
    """All jobs at once, under a policy that interrupts each of them many times."""

    def __init__(self, blocks: int | None, kv_cache_dtype: str = "bfloat16", **options: Any) -> None:
        from fastserve import CostModel

        records: list[IterationRecord] = []
        memory = 2**28 if blocks is None else blocks * BLOCK[kv_cache_dtype]
        with LLM(
            "smollm2",
            policy="mlfq",
            kv_cache_memory=memory,
            kv_cache_dtype=kv_cache_dtype,
            max_num_seqs=ROWS,
            max_num_batched_tokens=64,
            threads=1,  # other tests may want the rest
            cost=CostModel(**COST),
            skip_tokenizer=True,
            on_iteration=records.append,
            **options,
        ) as llm:
            prompts, params = zip(*_jobs(), strict=True)
            outputs = llm.generate(prompts, params)
            assert llm._engine is not None
            llm._engine.check_integrity()
            manager = llm._engine.scheduler.blocks
            assert manager.free_blocks == manager.num_blocks and manager.free_host_blocks == manager.num_host_blocks
        self.tokens = [output.token_ids for output in outputs]
        self.preemptions = sum(output.metrics.preemptions for output in outputs)
        self.recomputed = sum(output.metrics.recomputed_tokens for output in outputs)
        self.blocks = manager.num_blocks
        self.copied = sum(record.copied_blocks for record in records)
        self.peak = manager.num_blocks - min(record.free_blocks for record in records)


# Bytes: slots, and what a token's KV takes: 30 layers × 3 heads × 64 wide × 2 (K and V), and the scales of int8.
BLOCK = {"bfloat16": 16 * 23_040, "int8": 16 * (11_520 + 30 * 3 * 2 * 4)}


@cache
def _unpressed(kv_cache_dtype: str = "bfloat16") -> Run:
    run = Run(None, kv_cache_dtype, swap_space=0)
    assert run.preemptions > 0 == run.recomputed
    return run


@pytest.mark.parametrize(
    ("swap_mode", "max_in_flight", "kv_cache_dtype"),
    [(mode, plans, "bfloat16") for mode in ("proactive", "reactive", "recompute") for plans in (1, 2)]
    + [(mode, 2, "int8") for mode in ("proactive", "recompute")],
)
def test_no_token_changes_on_a_quarter_of_the_memory(swap_mode: str, max_in_flight: int, kv_cache_dtype: str) -> None:
    whole = _unpressed(kv_cache_dtype)
    options = dict(swap_space="64M", swap_mode=swap_mode, max_in_flight=max_in_flight)
    pressed = Run(whole.peak // 4, kv_cache_dtype, **options)
    assert pressed.tokens == whole.tokens
    assert pressed.peak <= pressed.blocks == whole.peak // 4
    assert (pressed.copied > 0) == (swap_mode != "recompute")


def test_a_host_pool_of_a_few_blocks_and_a_slow_link_are_enough() -> None:
    whole = _unpressed()
    pressed = Run(whole.peak // 4, swap_space=5 * BLOCK["bfloat16"], swap_bandwidth="100M")
    assert pressed.tokens == whole.tokens
    assert pressed.copied > 0
