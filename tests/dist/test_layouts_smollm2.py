"""The demo model over every layout: 9 query heads in 3 groups and 30 layers, which 2 and 4 do not divide."""

from __future__ import annotations

import os
import sys
from functools import cache

import pytest

from fastserve import LLM, SamplingParams

TEXTS = (
    "The capital of France is",
    "Once upon a time there was a lighthouse keeper who",
    "Write a list of cities in Europe, one a line:",
    "To bake a loaf of bread, first",
    "The difference between a frog and a toad is",
    "Explain why the sky is blue.",
)


def answers(tensor: int, pipeline: int, memory: str) -> tuple[list[list[int]], int]:
    """Greedy tokens in float32, and how often jobs yielded."""
    with LLM(
        "smollm2",
        dtype="float32",
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        threads=1,
        max_num_seqs=2,
        max_model_len=128,
        kv_cache_memory=memory,
        swap_space="64M",
    ) as llm:
        outputs = llm.generate(list(TEXTS), SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))
    return [output.outputs[0].token_ids for output in outputs], sum(output.metrics.preemptions for output in outputs)


@cache
def alone() -> list[list[int]]:
    return answers(1, 1, "64M")[0]


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2), (4, 1), (1, 3)], ids=str)
def test_tokens_are_those_of_one_process(layout: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In room for two jobs, so that they take turns and their KV moves."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    tokens, yielded = answers(*layout, memory="4M")
    assert tokens == alone()
    assert yielded > 0
