"""`fastserve convert`: what it writes and says, what it refuses, and that a failure leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from fastserve import InvalidRequest, ModelError
from fastserve.cli import main
from fastserve.convert import convert
from fastserve.loaders import open_model


def _case(identifier: str) -> models.Case:
    return next(case for case in models.CASES if case.id == identifier)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in Hugging Face layout, with a tokenizer."""
    directory = tmp_path_factory.mktemp("gpt2")
    models.save(_case("gpt2-untied-inner"), directory)
    tokenizer = Tokenizer(BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return directory


def test_the_command_writes_a_checkpoint_and_says_so(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ft = tmp_path / "new" / "ft"
    assert main(["convert", str(gpt2), str(ft), "--tensor-parallel-size", "2", "--dtype", "bf16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    files = list(ft.glob("*.bin"))
    assert told == {
        "model": gpt2.name,
        "directory": str(ft),
        "family": "gpt2",
        "tensor_parallel_size": 2,
        "dtype": "bf16",
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "tokenizer_files": ["tokenizer.json", "chat_template.jinja"],
    }
    assert main(["info", str(ft), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["family"], info["weights_dtype"], info["shards"]) == ("gpt2", "bf16", 2)
    assert info["tokenizer"] and info["chat_template"]
    data = open_model(str(ft)).tokenizer_data()
    assert data is not None and data == open_model(str(gpt2)).tokenizer_data()

    assert main(["convert", str(gpt2), str(ft)]) == 2
    assert "is not empty; name another" in capsys.readouterr().err
    assert main(["convert", str(gpt2), str(ft), "--force"]) == 0
    assert f"{ft}: gpt2 in fp32 for 1 rank, 29 files, 0.1 MB, with its tokenizer" in capsys.readouterr().out
    assert not list(ft.glob("*.1.bin")), "files of the checkpoint that was there"


def test_a_directory_of_torch_files(gpt2: Path, tmp_path: Path) -> None:
    models.save(_case("gpt2-untied-inner"), tmp_path / "hf")
    state = models.build(_case("gpt2-untied-inner")).state_dict()
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    for name, source in (("a", gpt2), ("b", tmp_path / "hf")):
        convert(open_model(str(source)), tmp_path / name, tensor_parallel_size=4)
    for file in (tmp_path / "a").glob("*.bin"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_progress_ends_at_the_whole(gpt2: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    done = convert(open_model(str(gpt2)), tmp_path / "ft", on_progress=lambda *amounts: heard.append(amounts))
    assert heard == sorted(heard) and heard[-1] == (done.bytes, done.bytes)


@pytest.mark.parametrize("identifier", ["llama-gqa-tied", "qwen3-gqa", "gpt_neox-parallel", "mistral-gqa"])
def test_other_families_are_told_what_to_do(identifier: str, tmp_path: Path) -> None:
    models.save(_case(identifier), tmp_path / "hf")
    family = identifier.split("-")[0]
    with pytest.raises(ModelError, match=rf"holds GPT-2 and OPT, and this is {family}; .* fastserve serve --model"):
        convert(open_model(str(tmp_path / "hf")), tmp_path / "ft")
    assert not (tmp_path / "ft").exists()


def test_an_activation_that_fastertransformer_lacks(tmp_path: Path) -> None:
    models.save(
        models.Case("opt", "gelu", _case("opt-tied").options | dict(activation_function="gelu")), tmp_path / "hf"
    )
    with pytest.raises(ModelError, match="no activation 'gelu'"):
        convert(open_model(str(tmp_path / "hf")), tmp_path / "ft")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tensor_parallel_size=3), "tensor_parallel_size: must divide 4, which 4 attention heads and 40 units"),
        (dict(tensor_parallel_size=0), "tensor_parallel_size: must be at least 1"),
        (dict(dtype="float32"), "dtype: must be one of fp32, fp16, bf16, got 'float32'"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str, gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=message):
        convert(open_model(str(gpt2)), tmp_path / "ft", **options)
    assert not (tmp_path / "ft").exists()


def test_nothing_of_somebody_elses_is_overwritten(gpt2: Path, tmp_path: Path) -> None:
    source = open_model(str(gpt2))
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.ini").write_text("[settings]\n")
    (tmp_path / "vocabulary").mkdir()
    (tmp_path / "vocabulary" / "vocab.json").write_text("{}")
    for directory, message in (
        (tmp_path / "file", "is a file"),
        (gpt2, "is the model that is read"),
        (tmp_path / "other", "holds another model"),
        (tmp_path / "theirs", "holds config.ini, and no checkpoint that it belongs to"),
        (tmp_path / "vocabulary", "holds vocab.json, and no checkpoint that it belongs to"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            convert(source, directory, force=True)
    assert (tmp_path / "theirs" / "config.ini").read_text() == "[settings]\n"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    convert(source, tmp_path / "notes", force=True)
    assert (tmp_path / "notes" / "notes.txt").read_text() == "mine"
    with pytest.raises(ModelError, match="smollm2: cannot be converted; use a directory in Hugging Face layout"):
        convert(open_model("smollm2"), tmp_path / "gguf")


def test_numbers_too_large_for_float16_leave_nothing_behind(tmp_path: Path) -> None:
    model = models.save(_case("opt-tied"), tmp_path / "hf")
    with torch.no_grad():
        model.model.decoder.layers[1].fc2.weight[0, 0] = 7e4
    model.save_pretrained(tmp_path / "hf")
    source = open_model(str(tmp_path / "hf"))
    with pytest.raises(
        ModelError, match=r"tensor 'layers\.1\.down\.weight' holds numbers beyond float16's range of 65504"
    ):
        convert(source, tmp_path / "ft", dtype="fp16")
    assert not list((tmp_path / "ft").iterdir())
    convert(source, tmp_path / "ft", dtype="bf16")


def test_an_old_checkpoint_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    """And the new one leaves nothing of it."""
    model = models.save(_case("opt-tied"), tmp_path / "hf")
    convert(open_model(str(tmp_path / "hf")), tmp_path / "ft", tensor_parallel_size=3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "ft").iterdir()}
    with torch.no_grad():
        model.model.decoder.layers[1].fc2.weight[0, 0] = 7e4
    model.save_pretrained(tmp_path / "hf")
    source = open_model(str(tmp_path / "hf"))
    with pytest.raises(ModelError, match="float16's range"):
        convert(source, tmp_path / "ft", dtype="fp16", force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "ft").iterdir()} == before
    convert(source, tmp_path / "ft", force=True)
    convert(source, tmp_path / "new")
    assert {path.name for path in (tmp_path / "ft").iterdir()} == {path.name for path in (tmp_path / "new").iterdir()}


def test_what_a_killed_run_left_is_removed_and_no_other_runs(gpt2: Path, tmp_path: Path) -> None:
    abandoned, held = tmp_path / ".convert-abandoned", tmp_path / ".convert-held"
    for folder in (abandoned, held):
        folder.mkdir()
        (folder / "model.wte.bin").write_bytes(b"half of it")
    source, claim = open_model(str(gpt2)), os.open(held, os.O_RDONLY)
    fcntl.flock(claim, fcntl.LOCK_EX)
    with pytest.raises(InvalidRequest, match=r"^directory: .* is not empty"):
        convert(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [held.name]
    os.close(claim)
    convert(source, tmp_path)
    assert (tmp_path / "config.ini").exists() and not held.exists()


def test_a_full_disk_leaves_nothing_behind(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def full(descriptor: int, offset: int, length: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/model\.\S+\.bin'"):
        convert(open_model(str(gpt2)), tmp_path / "ft")
    assert not list((tmp_path / "ft").iterdir())
