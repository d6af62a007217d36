"""pytorch_model.bin: the weights of safetensors, read without torch; whatever is not a tensor is refused by name."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastserve.loaders import ModelError, open_model
from fastserve.loaders.torch_file import read_torch_entries

TOKENS = [int(token) for token in np.random.default_rng(5).integers(0, models.VOCAB_SIZE, 32)]


def _case(identifier: str) -> models.Case:
    return next(case for case in models.CASES if case.id == identifier)


def _save(identifier: str, directory: Path, *, dtype: torch.dtype = torch.float32, shards: int = 1) -> Any:
    """A directory with torch's files alone; returns the model in float32, with the values as stored."""
    model = models.save(_case(identifier), directory, dtype=dtype)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    if shards == 1:
        torch.save(OrderedDict(state), directory / "pytorch_model.bin")
        return model
    names = {name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, name in enumerate(state)}
    for file in set(names.values()):
        # Copies: torch.save writes the whole memory that a tensor is a view of.
        torch.save({name: state[name].clone() for name in state if names[name] == file}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return model


@pytest.mark.parametrize("identifier", ["gpt2-tied", "opt-untied-no-bias", "llama-gqa-tied", "gpt_neox-parallel"])
@pytest.mark.parametrize("shards", [1, 3])
def test_logits_equal_transformers(identifier: str, shards: int, tmp_path: Path) -> None:
    expected = models.logits(_save(identifier, tmp_path, shards=shards), TOKENS)
    source = open_model(str(tmp_path))
    np.testing.assert_allclose(reference.logits(source, TOKENS), expected, rtol=0, atol=reference.tolerance(expected))


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_half_precision_passes_through_raw(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    expected = models.logits(_save("gpt2-tied", tmp_path, dtype=dtype), TOKENS)
    source = open_model(str(tmp_path))
    assert source.weights_dtype == name
    np.testing.assert_allclose(reference.logits(source, TOKENS), expected, rtol=0, atol=reference.tolerance(expected))


def test_safetensors_win_where_there_are_both(tmp_path: Path) -> None:
    models.save(_case("qwen2-tied"), tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never looked at")
    assert open_model(str(tmp_path)).num_parameters > 0


def _values(path: Path) -> dict[str, np.ndarray]:
    return {
        entry.name: entry.file.view(entry.offset, entry.nbytes).view(np.float32).reshape(entry.shape)
        for entry in read_torch_entries(path)
    }


def test_views_of_shared_memory_parameters_and_other_dtypes(tmp_path: Path) -> None:
    """What a state dict may hold beside plain tensors: a part of a larger one, two names for one, masks, parameters."""
    whole = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    state = {
        "rows": whole[2:4],
        "again": whole,
        "parameter": torch.nn.Parameter(torch.ones(2, 1, 3)),
        "one_column": whole[:, :1][:1],  # its strides do not matter: there is one element in either direction
    }
    file = tmp_path / "pytorch_model.bin"
    torch.save(state, file)
    values = _values(file)
    assert set(values) == set(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(values[name], tensor.detach().numpy())
    torch.save({"mask": torch.ones(1, 1, 2, 2, dtype=torch.bool), "count": torch.tensor(7)}, file)
    assert [(entry.name, entry.dtype, entry.shape) for entry in read_torch_entries(file)] == [
        ("mask", "BOOL", (1, 1, 2, 2)),
        ("count", "I64", ()),
    ]


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    _save("gpt2-tied", tmp_path)
    code = (
        "import sys; from fastserve.loaders import open_model; "
        "print(sum(len(t.data) for t in open_model(sys.argv[1]).tensors()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    size = sum(tensor.nbytes for tensor in open_model(str(tmp_path)).tensors() for tensor in [tensor.data])
    assert done.stdout.split() == [str(size), "False"]


# --- What is refused -------------------------------------------------------------------------------------------------


class _Runs:
    """Pickles as a call, as malware does. Protocol 2 has Python 2's names of modules."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.mkdir, ("MADE",), r"posix\.mkdir"),
        (eval, ("__import__('os').mkdir('MADE')",), r"__builtin__\.eval"),
        (getattr, (OrderedDict, "mro"), r"__builtin__\.getattr"),
        (torch.device, ("cpu",), r"torch\.device"),
    ],
)
def test_a_pickle_that_would_run_code_is_refused_by_name(
    function: Any, arguments: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(2), "more": _Runs(function, *arguments)}, "pytorch_model.bin")
    with pytest.raises(ModelError, match=rf"pytorch_model\.bin: its pickle asks for {name}, which .* refused"):
        read_torch_entries(Path("pytorch_model.bin"))
    assert not Path("MADE").exists()


def _rewrite(path: Path, change: Any, **options: Any) -> None:
    """Write a zip archive anew: `change` gets a member's name and content, and returns the content or None."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            changed = change(name, content)
            if changed is not None:
                archive.writestr(name, changed)


def test_a_pickle_cannot_change_what_it_is_read_with(tmp_path: Path) -> None:
    """BUILD sets attributes of what was looked up; what stands for torch's functions has none that could be set."""
    file = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.ones(2)}, file)
    stream = io.BytesIO()
    stream.write(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.")
    _rewrite(file, lambda name, content: stream.getvalue() if name.endswith("data.pkl") else content)
    with pytest.raises(ModelError, match="its pickle is malformed"):
        read_torch_entries(file)


def test_a_memo_index_allocates_nothing(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.ones(2)}, file)
    _rewrite(file, lambda name, content: b"\x80\x02}r\xff\xff\xff\x0f." if name.endswith("data.pkl") else content)
    with pytest.raises(ModelError, match="memo index 268435455"):
        read_torch_entries(file)


_WEIGHT = {"weight": torch.arange(6, dtype=torch.float32).reshape(2, 3)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"weight": _WEIGHT["weight"].T},
            r"tensor 'weight' of shape \[3, 2\] is stored with strides \[1, 3\].*contiguous",
        ),
        ({"model": _WEIGHT, "epoch": 3}, r"holds OrderedDict 'model'|holds dict 'model'"),
        ({"epoch": 3}, r"holds int 'epoch', not only tensors by name; save the model's state_dict"),
        ({1: _WEIGHT["weight"]}, r"holds _Tensor 1, not only tensors by name"),
        ([_WEIGHT["weight"]], r"holds a list, not a state dict"),
        ({"weight": torch.ones([1] * 60)}, r"tensor 'weight' has 60 dimensions; those of a model have at most 8"),
    ],
    ids=["transposed", "training", "number", "index", "list", "dimensions"],
)
def test_what_is_no_state_dict_is_named(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=rf"pytorch_model\.bin: .*(?:{message})"):
        read_torch_entries(tmp_path / "pytorch_model.bin")


def test_files_of_old_torch_say_what_to_do(tmp_path: Path) -> None:
    torch.save(_WEIGHT, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match=r"torch before 1\.6.*save it again with torch 1\.6 or later, or convert"):
        read_torch_entries(tmp_path / "pytorch_model.bin")


def test_archives_that_torch_save_did_not_write(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"

    def check(change: Any, message: str, **options: Any) -> None:
        torch.save(_WEIGHT, file)
        _rewrite(file, change, **options)
        with pytest.raises(ModelError, match=message) as error:
            read_torch_entries(file)
        assert str(file) in str(error.value)

    check(
        lambda name, content: content,
        "compressed or encrypted, which torch",
        compression=zipfile.ZIP_DEFLATED,
    )
    check(lambda name, content: None if "/data/" in name else content, r"member \S+/data/0 is missing")
    check(
        lambda name, content: content[:20] if "/data/" in name else content, "elements 0 to 6 of a storage of 6 in 20"
    )
    check(lambda name, content: None if name.endswith(".pkl") else content, "no state dict")
    check(lambda name, content: b"big" if name.endswith("byteorder") else content, "big-endian")
    torch.save(_WEIGHT, file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].split('/')[0]}/constants.pkl", pickle.dumps(()))
    with pytest.raises(ModelError, match="no state dict"):  # TorchScript
        read_torch_entries(file)
    file.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"not a file of torch\.save, or cut short"):
        read_torch_entries(file)


_fuzz = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("torch")
    _save("gpt2-relu", directory)
    return directory


@_fuzz
@given(cut=st.floats(0, 1))
def test_truncated_files_give_a_model_error(small: Path, tmp_path: Path, cut: float) -> None:
    content = (small / "pytorch_model.bin").read_bytes()
    shutil.copy(small / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(content[: int(cut * (len(content) - 1))])
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        open_model(str(tmp_path))


@_fuzz
@given(data=st.data())
def test_corrupt_files_give_a_model_error_or_a_model(small: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray((small / "pytorch_model.bin").read_bytes())
    pickled = content.index(b"data.pkl")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(pickled, pickled + 3000) | st.integers(len(content) - 3000, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    shutil.copy(small / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(content))
    try:
        source = open_model(str(tmp_path))
    except ModelError as error:
        assert str(tmp_path) in str(error)
    else:
        assert sum(len(tensor.data) for tensor in source.tensors()) > 0
