"""The same model in every form it may be given in, through the runtime: the same tokens, to the last one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from fastserve import LLM, AsyncLLM, InvalidRequest, SamplingParams
from fastserve.convert import convert
from fastserve.loaders import open_model

OPTIONS: dict[str, Any] = dict(policy="fcfs", kv_cache_memory="1M", swap_space=0, threads=2)
PROMPTS = [[int(t) for t in np.random.default_rng(i).integers(3, models.VOCAB_SIZE, 5 + 7 * i)] for i in range(4)]
PARAMS = [
    *[SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)] * 3,
    SamplingParams(max_tokens=24, seed=4, ignore_eos=True),
]


def _case(identifier: str) -> models.Case:
    return next(case for case in models.CASES if case.id == identifier)


def _tokens(model: Any, **options: Any) -> list[list[int]]:
    with LLM(model, **OPTIONS, **options) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("identifier", "ranks"), [("gpt2-tied", 3), ("gpt2-untied-inner", 2), ("opt-tied", 3)])
def test_fastertransformer_gives_the_directorys_tokens(identifier: str, ranks: int, dtype: str, tmp_path: Path) -> None:
    model = models.save(_case(identifier), tmp_path / "hf")
    convert(open_model(str(tmp_path / "hf")), tmp_path / "ft", tensor_parallel_size=ranks)
    expected = _tokens(tmp_path / "hf", dtype=dtype)
    assert _tokens(tmp_path / "ft", dtype=dtype) == expected
    if dtype == "float32":  # and those of transformers, while they are the largest logits by far
        answer = model.generate(
            torch.tensor([PROMPTS[0]]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert answer[0, len(PROMPTS[0]) :].tolist() == expected[0]


@pytest.mark.parametrize("identifier", ["gpt2-tied", "opt-tied", "llama-gqa-tied", "qwen3-gqa", "gpt_neox-parallel"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_module_gives_its_directorys_tokens(identifier: str, stored: torch.dtype, tmp_path: Path) -> None:
    models.save(_case(identifier), tmp_path, dtype=stored)
    expected = _tokens(tmp_path, dtype="float32")
    module = type(models.build(_case(identifier))).from_pretrained(tmp_path, dtype=stored)
    assert _tokens(module, dtype="float32") == expected


def test_a_module_may_change_once_it_is_loaded() -> None:
    """Its weights have been copied: training may go on."""
    module = models.build(_case("qwen2-tied"))
    expected = _tokens(module)
    with LLM(module, **OPTIONS) as llm:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)] == expected


def test_a_module_is_served_to_asyncio_code() -> None:
    module = models.build(_case("llama-linear"))

    async def answer() -> list[int]:
        async with AsyncLLM(module, **OPTIONS) as llm:
            async for output in llm.generate(PROMPTS[1], PARAMS[1]):
                final = output
        return list(final.outputs[0].token_ids)

    assert asyncio.run(answer()) == _tokens(module)[1]


def test_a_module_reads_text_by_the_tokenizer_beside_it() -> None:
    module = models.build(_case("llama-linear"))
    backend = Tokenizer(BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[]))
    with LLM(module, tokenizer=backend, **OPTIONS) as llm:
        text, ids = llm.generate(["bad", [1, 0, 3]], PARAMS[0])
        assert text.prompt_token_ids == [1, 0, 3] and text.outputs[0].token_ids == ids.outputs[0].token_ids
        assert text.outputs[0].text == backend.decode(ids.outputs[0].token_ids)
    with LLM(module, **OPTIONS) as llm, pytest.raises(InvalidRequest, match="LlamaForCausalLM was loaded without one"):
        llm.generate("bad")


@pytest.mark.parametrize("identifier", ["gpt2-tied", "qwen2-tied"])
def test_torch_files_give_the_safetensors_tokens(identifier: str, tmp_path: Path) -> None:
    model = models.save(_case(identifier), tmp_path)
    expected = _tokens(tmp_path, dtype="float32")
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert _tokens(tmp_path, dtype="float32") == expected
