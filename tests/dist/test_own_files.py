"""FasterTransformer checkpoints over ranks: each reads the files that were cut for it, and no other's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import models
import pytest

from fastserve import LLM, SamplingParams
from fastserve.convert import convert
from fastserve.loaders import open_model
from fastserve.loaders.fastertransformer import FasterTransformerModel
from fastserve.placement import own_files
from fastserve.sharding import cut

CASES = {name: next(case for case in models.CASES if case.id == name) for name in ("gpt2-tied", "opt-tied")}


@pytest.fixture(scope="module", params=CASES)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A model in Hugging Face layout, its checkpoint for as many ranks as it has heads, and that many."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp("checkpoint")
    heads = models.save(case, folder / "hf").config.num_attention_heads
    convert(open_model(str(folder / "hf")), folder / "ft", tensor_parallel_size=heads)
    return folder / "hf", folder / "ft", heads


def test_each_rank_has_files_of_its_own(folders: tuple[Path, Path, int]) -> None:
    _, directory, ranks = folders
    source = open_model(str(directory))
    assert isinstance(source, FasterTransformerModel)
    stages = [range(source.spec.num_layers)]
    for rank in range(ranks):
        own = own_files(source, cut(source.spec, tensor_rank=rank, tensor_size=ranks, stage=0, stages=stages))
        assert isinstance(own, FasterTransformerModel) and own.rank == rank
    alone = cut(source.spec, tensor_rank=0, tensor_size=1, stage=0, stages=stages)
    assert own_files(source, alone) is source, "cut for others"


def test_tokens_are_those_of_the_model(
    folders: tuple[Path, Path, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And a rank's files are what it computes with: where they are another model's, so are the tokens."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    whole, directory, ranks = folders
    expected = tokens(whole, 1)
    assert tokens(directory, ranks) == expected
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in directory.iterdir():
        content = file.read_bytes()
        if file.name.endswith(f"mlp.dense_4h_to_h.weight.{ranks - 1}.bin"):
            content = content[::-1][: len(content) // 2] + content[len(content) // 2 :]
        (changed / file.name).write_bytes(content)
    assert tokens(changed, ranks) != expected


def tokens(model: Path, ranks: int) -> list[int]:
    options = {"dtype": "float32", "kv_cache_memory": "1M", "swap_space": 0, "threads": 1, "skip_tokenizer": True}
    with LLM(model, tensor_parallel_size=ranks, **options) as llm:
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        return llm.generate([5, 3, 8, 1], params)[0].outputs[0].token_ids
