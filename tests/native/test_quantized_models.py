"""Whole models whose weights stay quantized: what they compute, whatever the batch, and what memory they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import MACHINES, use
from models import GGUF_CASES
from synthetic import VOCAB, Driver, QuantizedModel, SyntheticModel, llama_spec, whole
from tolerance import logits_tolerance

from fastserve import LLM, SamplingParams
from fastserve.config import QUANTIZATIONS, RuntimeConfig
from fastserve.loaders import open_model
from fastserve.loaders.quantization import format_bytes, weight_formats
from fastserve.native import NativeRuntime
from fastserve.tokenizer import Tokenizer

WIDE = llama_spec(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96)
PROMPT = [(37 * i * i + 11 * i + 5) % models.VOCAB_SIZE for i in range(40)]
SOURCES: dict[str, Any] = {kind: QuantizedModel(WIDE, kind) for kind in ("q8_0", "q4_0", "q4_1")}
SOURCES["int8"] = SyntheticModel(llama_spec(tied_embeddings=True))  # widths of no block


def _options(kind: str) -> dict[str, str]:
    return {"dtype": "bfloat16", "quantization": "int8" if kind == "int8" else "auto"}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("kind", SOURCES)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_no_bit_depends_on_batch_chunks_or_threads(kind: str, machine: str, data: st.DataObject) -> None:
    lengths = st.lists(st.integers(1, 300), min_size=1, max_size=3 if machine == "cuda" else 7)
    sequences = [np.random.default_rng(i).integers(0, VOCAB, n).tolist() for i, n in enumerate(data.draw(lengths))]
    with pytest.MonkeyPatch.context() as patch:
        options = {**_options(kind), "device": use(machine, patch)}
        driver = Driver(SOURCES[kind], sequences, threads=data.draw(st.integers(1, 3)), **options)
        left = {slot: len(tokens) for slot, tokens in enumerate(sequences)}
        while left:
            running = data.draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
            chunks = {slot: min(left[slot], data.draw(st.integers(1, 200))) for slot in running}
            driver.step(chunks)
            left = {slot: left[slot] - chunks.get(slot, 0) for slot in left if left[slot] > chunks.get(slot, 0)}
        for slot, tokens in enumerate(sequences):
            assert np.array_equal(driver.all_logits(slot), whole(SOURCES[kind], tokens, **options))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("case", [c for c in GGUF_CASES if c.id in ("gpt2-untied-inner", "qwen2-untied-yarn")])
def test_a_gguf_file_end_to_end(case: models.Case, kind: str, tmp_path: Path) -> None:
    """Against transformers on the dequantized weights: the error is that of activations rounded to int8."""
    path = tmp_path / "model.gguf"
    model = models.save_gguf(case, path, quantization=kind)
    source = open_model(str(path))
    assert kind.lower() in weight_formats(source, "bfloat16", "auto").values()
    longest = max(source.spec.hidden_size, source.spec.intermediate_size)
    expected = models.logits(model, PROMPT)
    bound = logits_tolerance(model, PROMPT, ["blocks"], longest)["blocks"]
    kept = whole(source, PROMPT, dtype="bfloat16")
    assert (np.abs(kept - expected) / bound).max() <= 1
    converted = whole(source, PROMPT, dtype="bfloat16", quantization="none")
    assert not np.array_equal(kept, converted)
    with LLM(path, skip_tokenizer=True, kv_cache_memory="1M", policy="fcfs") as llm:
        output = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].outputs[0]
        assert (llm.info["quantization"], llm.info["weights_dtype"]) == ("auto", kind.lower())
    assert output.token_ids[0] == kept[-1].argmax()


@pytest.mark.parametrize("case", models.CASES[::3], ids=lambda case: case.id)
def test_int8_of_a_hugging_face_model(case: models.Case, tmp_path: Path) -> None:
    model = models.save(case, tmp_path)
    source = open_model(str(tmp_path))
    longest = max(source.spec.hidden_size, source.spec.intermediate_size)
    bound = logits_tolerance(model, PROMPT, ["int8"], longest)["int8"]
    got = whole(source, PROMPT, dtype="bfloat16", quantization="int8")
    assert (np.abs(got - models.logits(model, PROMPT)) / bound).max() <= 1


def test_formats_of_one_matrix_agree() -> None:
    """q, k and v are multiplied as one: where the file disagrees, they are converted; so is all with float32."""

    class Mixed(QuantizedModel):
        @property
        def dtypes(self) -> dict[str, str]:
            return {**super().dtypes, "layers.0.v.weight": "q8_0", "layers.1.gate.weight": "f16"}

    formats = weight_formats(Mixed(WIDE, "q4_0"), "bfloat16", "auto")
    assert {formats[f"layers.0.{part}.weight"] for part in "qkv"} == {"bfloat16"}
    assert {formats[f"layers.1.{part}.weight"] for part in ("gate", "up")} == {"bfloat16"}
    assert {formats[f"layers.1.{part}.weight"] for part in ("q", "k", "v", "o", "down")} == {"q4_0"}
    assert set(weight_formats(Mixed(WIDE, "q4_0"), "float32", "auto").values()) == {"float32"}
    assert set(weight_formats(Mixed(WIDE, "q4_0"), "bfloat16", "none").values()) == {"bfloat16"}
    assert set(weight_formats(Mixed(WIDE, "q4_0"), "float32", "int8").values()) == {"int8"}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_smollm2_takes_what_its_file_takes(quantization: str) -> None:
    source = open_model("smollm2")
    stored = sum(tensor.data.nbytes for tensor in source.tensors() if len(tensor.shape) == 2)
    runtime = NativeRuntime(source, RuntimeConfig(num_blocks=2, quantization=quantization))  # type: ignore[arg-type]
    assert sum(format_bytes(source, "bfloat16", quantization).values()) == runtime.weight_bytes
    scales = 4 * runtime.weight_bytes // 576
    expected = {"auto": stored, "int8": source.num_parameters + scales, "none": 2 * source.num_parameters}[quantization]
    assert runtime.weight_bytes == pytest.approx(expected, rel=5e-3)


@pytest.fixture(scope="module")
def text() -> list[int]:
    source = open_model("smollm2")
    data = source.tokenizer_data()
    assert data is not None
    file = Path(__file__).parents[2] / "docs" / "architecture.md"
    return Tokenizer.from_data(data).encode(file.read_text(encoding="utf-8"))[:2500]


@pytest.fixture(scope="module")
def plain(text: list[int]) -> np.ndarray:
    """Logits with the weights of the file in float32."""
    return whole(open_model("smollm2"), text, dtype="float32")


def _perplexity(logits: np.ndarray, tokens: list[int]) -> float:
    shifted = logits[:-1].astype(np.float64)
    shifted -= shifted.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(tokens) - 1), tokens[1:]]
    return float(np.exp(losses.mean()))


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "agreement", "distance"), [("auto", 0.94, 0.05), ("int8", 0.9, 0.08)])
def test_smollm2_is_as_good_as_its_weights(
    quantization: str, agreement: float, distance: float, text: list[int], plain: np.ndarray
) -> None:
    """Perplexity of a few thousand tokens within one percent, and nearly always the same most likely token."""
    got = whole(open_model("smollm2"), text, dtype="bfloat16", quantization=quantization)
    assert _perplexity(got, text) == pytest.approx(_perplexity(plain, text), rel=0.01)
    assert (got.argmax(1) == plain.argmax(1)).mean() > agreement
    assert np.sqrt(np.mean((got - plain) ** 2)) < distance * plain.std()


@pytest.mark.slow
def test_smollm2_is_as_good_with_an_int8_kv_cache(text: list[int]) -> None:
    """Perplexity of a few thousand tokens within one percent of bfloat16's, nearly always the same likeliest token."""
    expected = whole(open_model("smollm2"), text, dtype="bfloat16")
    got = whole(open_model("smollm2"), text, dtype="bfloat16", kv_cache_dtype="int8")
    assert not np.array_equal(got, expected)
    assert _perplexity(got, text) == pytest.approx(_perplexity(expected, text), rel=0.01)
    assert (got.argmax(1) == expected.argmax(1)).mean() > 0.92
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.05 * expected.std()
