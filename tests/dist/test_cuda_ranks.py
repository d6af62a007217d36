"""A model over several ranks that compute on CUDA devices. What they send each other crosses the host, or goes by NCCL:
the emulated devices' stand-in for it, which is in their plugin."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from machines import CUDA
from models import CASES, save

from fastserve import LLM, SamplingParams, _C

PROMPTS = [[3, 5, 7, 9, 11] * 4, [1, 2, 3]]
PROGRAM = Path(__file__).parent / "programs" / "shares_model.py"
THROUGH_HOST = "exchanges with others through the host's memory"
EMULATED = Path(os.environ.get("FASTSERVE_CUDA_PLUGIN", "/nowhere"))
WAYS = ["host", "nccl", "nccl graphs"]


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How ranks exchange from here on."""
    way: str = request.param
    if way.startswith("nccl") and not EMULATED.exists():
        pytest.skip("GPUs' own NCCL takes a GPU for each rank")
    monkeypatch.setenv("FASTSERVE_NCCL", "0" if way == "host" else str(EMULATED))
    monkeypatch.setenv("FASTSERVE_NCCL_GRAPHS", "1" if way == "nccl graphs" else "0")
    monkeypatch.setenv("FASTSERVE_DEBUG", "1")
    return way


def _tokens(path: Path, **options: Any) -> list[list[int]]:
    params = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=5, repetition_penalty=1.2, max_tokens=12, ignore_eos=True),
    ]
    with LLM(path, dtype="float32", skip_tokenizer=True, kv_cache_memory="1M", swap_space="1M", **options) as llm:
        return [list(result.outputs[0].token_ids) for result in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(
    ("way", "tensor", "pipeline"),
    [(way, *layout) for way in WAYS for layout in [(2, 1), (1, 2), (2, 2)] if way != "nccl graphs" or layout == (2, 1)],
    indirect=["way"],
)
def test_tokens_are_those_of_one_cpu(
    device: str, way: str, tensor: int, pipeline: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(next(case for case in CASES if case.id == "llama-gqa-tied"), tmp_path)
    layout = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    assert _tokens(tmp_path, device=f"{device}:0", **layout) == _tokens(tmp_path)
    assert (THROUGH_HOST in capfd.readouterr().err) == (way == "host")
