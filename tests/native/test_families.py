"""Every family against `transformers`, on tiny random models: logits within tolerance, the same greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from machines import DEVICES
from models import CASES, GGUF_CASES, Case
from synthetic import whole
from tolerance import logits_tolerance

from fastserve.config import RuntimeConfig, SchedulerConfig
from fastserve.cost import CostModel
from fastserve.engine import Engine
from fastserve.loaders import ModelSource, open_model
from fastserve.native import NativeRuntime, instruction_sets
from fastserve.types import SamplingParams

PROMPT = [(37 * i * i + 11 * i + 5) % models.VOCAB_SIZE for i in range(40)]


def _greedy(source: ModelSource, prompt: list[int], tokens: int, device: str = "cpu") -> list[int]:
    runtime = NativeRuntime(source, RuntimeConfig(dtype="float32", num_blocks=16, device=device))
    scheduling = SchedulerConfig(num_blocks=16, max_model_len=96, max_in_flight=2)
    engine = Engine(scheduling, runtime, CostModel.constant(0.01))
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    job = engine.add_job("job", prompt, params, seed=0, vocab_size=source.spec.vocab_size)
    while engine.has_work:
        engine.step()
    return job.output


def _check(model: Any, source: ModelSource, dtypes: list[str], device: str = "cpu") -> None:
    longest = max(source.spec.hidden_size, source.spec.intermediate_size)
    expected, bounds = models.logits(model, PROMPT), logits_tolerance(model, PROMPT, dtypes, longest)
    for dtype in dtypes:
        options = {"dtype": "bfloat16", "kv_cache_dtype": "int8"} if dtype == "int8 kv" else {"dtype": dtype}
        options["device"] = device
        difference = np.abs(whole(source, PROMPT, **options) - expected)
        worst = (difference / bounds[dtype]).max()
        assert worst <= 1, f"{dtype}: up to {worst:.2f} × the bound"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_hugging_face_model(case: Case, device: str, tmp_path: Path) -> None:
    model = models.save(case, tmp_path)
    source = open_model(str(tmp_path))
    _check(model, source, ["float32", "bfloat16", "float16" if device == "cuda" else "int8 kv"], device)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert _greedy(source, PROMPT, 40, device) == expected[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, "F32") for case in GGUF_CASES]
    + [
        (case, kind)
        for case in GGUF_CASES
        if case.id in ("gpt2-untied-inner", "qwen2-untied-yarn")  # widths that quantized blocks divide
        for kind in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
    ],
    ids=lambda value: value if isinstance(value, str) else value.id,
)
def test_gguf_model(case: Case, kind: str, device: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = models.save_gguf(case, path, quantization=kind)
    source = open_model(str(path))
    _check(model, source, ["float32"], device)
    assert (
        _greedy(source, PROMPT, 30, device)
        == model.generate(
            torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(PROMPT) :].tolist()
    )


@pytest.mark.parametrize("isa", instruction_sets())
def test_every_instruction_set(isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_ISA", isa)
    model = models.save(next(case for case in CASES if case.id == "llama-gqa-tied"), tmp_path)
    source = open_model(str(tmp_path))
    _check(model, source, ["float32", "bfloat16", "int8 kv"])
