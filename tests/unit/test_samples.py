"""What tells two models of one shape apart, however they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch

from fastserve.convert import convert
from fastserve.loaders import open_model
from fastserve.loaders.module import ModuleModel
from fastserve.loaders.spec import ModelSource
from fastserve.loaders.weights import StoredTensor, sample, spread

CASE = next(case for case in models.CASES if case.id == "gpt2-tied")


def stored(kind: str, folder: Path, seed: int) -> ModelSource:
    folder.mkdir()
    if kind == "module":
        return ModuleModel(models.build(CASE, seed))
    if kind == "gguf":
        models.save_gguf(CASE, folder / "model.gguf", seed=seed)
        return open_model(str(folder / "model.gguf"))
    models.save(CASE, folder, seed=seed)
    if kind == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(models.build(CASE, seed).state_dict(), folder / kind)
    if kind == "fastertransformer":
        convert(open_model(str(folder)), folder / "ft", tensor_parallel_size=3)
        return open_model(str(folder / "ft"))
    return open_model(str(folder))


@pytest.mark.parametrize("kind", ["safetensors", "pytorch_model.bin", "gguf", "module", "fastertransformer"])
def test_other_weights_give_other_samples(kind: str, tmp_path: Path) -> None:
    """And copies of the same model the same."""
    one, copy, other = (
        list(stored(kind, tmp_path / name, seed).samples()) for name, seed in (("one", 0), ("copy", 0), ("other", 1))
    )
    assert one == copy and one != other
    assert 0 < sum(map(len, one)) <= 48 * 1024


class _Memory:
    def __init__(self, size: int) -> None:
        self.bytes = np.arange(size, dtype=np.uint8)
        self.released: list[tuple[int, int]] = []

    def view(self, offset: int, length: int) -> Any:
        return self.bytes[offset : offset + length]

    def release(self, offset: int, length: int) -> None:
        self.released.append((offset, length))


def test_little_of_a_large_tensor_is_read_and_nothing_kept() -> None:
    memory = _Memory(2**16)
    tensor = StoredTensor("w", "f32", (128, 120), memory, 4096, 128 * 120 * 4)
    taken = sample(memory, tensor.offset, tensor.nbytes)
    assert len(taken) == 1024 and len(memory.released) == 1
    start, length = memory.released[0]
    assert taken == memory.bytes[start : start + length].tobytes()
    assert 4096 + tensor.nbytes // 2 in range(start, start + length)
    assert sample(memory, 8, 12) == memory.bytes[8:20].tobytes()  # all of a small one


def test_every_kind_of_tensor_is_among_those_looked_at() -> None:
    """With twelve tensors a layer, all kinds of the first layer, of the last, and of some between."""
    assert spread(40) == list(range(40))
    for layers in (8, 80, 126):
        places = spread(12 * layers)
        assert len(places) == 48
        for third in (places[:16], places[16:32], places[32:]):
            assert {place % 12 for place in third} == set(range(12))
        assert places[0] == 0 and places[-1] == 12 * layers - 1
