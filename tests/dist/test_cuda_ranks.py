"""A model over several ranks that compute on CUDA devices, or all on one: what they send crosses the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from machines import CUDA
from models import CASES, save

from fastserve import LLM, SamplingParams

PROMPTS = [[3, 5, 7, 9, 11] * 4, [1, 2, 3]]


def _tokens(path: Path, **options: Any) -> list[list[int]]:
    params = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=5, repetition_penalty=1.2, max_tokens=12, ignore_eos=True),
    ]
    with LLM(path, dtype="float32", skip_tokenizer=True, kv_cache_memory="1M", swap_space="1M", **options) as llm:
        return [list(result.outputs[0].token_ids) for result in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_tokens_are_those_of_one_cpu(device: str, tensor: int, pipeline: int, tmp_path: Path) -> None:
    save(next(case for case in CASES if case.id == "llama-gqa-tied"), tmp_path)
    layout = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    assert _tokens(tmp_path, device=f"{device}:0", **layout) == _tokens(tmp_path)
