"""GGUF files: equal to what the `gguf` library reads and `transformers` computes; never more than a ModelError."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import models
import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastserve.loaders import ModelError, open_model
from fastserve.loaders.gguf import GgufFile

TOKENS = [int(token) for token in np.random.default_rng(7).integers(0, models.VOCAB_SIZE, 48)]
Q = gguf.GGMLQuantizationType


def _case(identifier: str) -> models.Case:
    return next(case for case in models.CASES if case.id == identifier)


@pytest.mark.parametrize("case", models.GGUF_CASES, ids=lambda case: case.id)
def test_logits_equal_transformers(case: models.Case, tmp_path: Path) -> None:
    model = models.save_gguf(case, tmp_path / "model.gguf")
    source = open_model(str(tmp_path / "model.gguf"))
    expected = models.logits(model, TOKENS)
    np.testing.assert_allclose(reference.logits(source, TOKENS), expected, rtol=0, atol=reference.tolerance(expected))
    assert source.spec.eos_token_ids == (2,) and source.spec.bos_token_id == 1
    assert source.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("quantization", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1], ids=lambda kind: kind.name)
def test_every_dtype_passes_through_raw(quantization: Q, tmp_path: Path) -> None:
    model = models.save_gguf(_case("llama-mqa-bias"), tmp_path / "model.gguf", quantization=quantization.name)
    source = open_model(str(tmp_path / "model.gguf"))
    assert source.weights_dtype == quantization.name.lower()
    got = {tensor.name: reference.values(tensor) for tensor in source.tensors()}
    for name in ("q", "k", "v", "o"):  # q and k, weight and bias, are stored in another order of rows
        for kind in ("weight", "bias"):
            expected = model.state_dict()[f"model.layers.1.self_attn.{name}_proj.{kind}"]
            np.testing.assert_array_equal(got[f"layers.1.{name}.{kind}"], expected)


def test_smollm2_equals_the_gguf_library() -> None:
    source = open_model("smollm2")
    assert (source.name, source.weights_dtype, source.num_parameters) == ("smollm2", "q4_1", 134_515_008)
    spec = source.spec
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    assert spec.tied_embeddings and spec.max_position == 8192 and spec.eos_token_ids == (2,)
    library = {tensor.name: tensor for tensor in gguf.GGUFReader(source._file.path).tensors}  # type: ignore[attr-defined]
    assert sorted(tensor.name for tensor in source.tensors())[:3] == [
        "final_norm.weight", "layers.0.attn_norm.weight", "layers.0.down.weight",
    ]  # fmt: skip
    got = {tensor.name: tensor for tensor in source.tensors()}
    assert len(got) == len(library)
    for name, stored in (
        ("token_embedding.weight", "token_embd.weight"),
        ("final_norm.weight", "output_norm.weight"),
        ("layers.29.down.weight", "blk.29.ffn_down.weight"),
    ):
        np.testing.assert_array_equal(got[name].data, library[stored].data.reshape(-1).view(np.uint8))
    for name, heads in (("q", 9), ("k", 3)):
        stored = library[f"blk.29.attn_{name}.weight"]
        pairs = gguf.dequantize(stored.data, stored.tensor_type).reshape(heads, 32, 2, 576)
        halves = pairs.swapaxes(1, 2).reshape(heads * 64, 576)
        np.testing.assert_array_equal(reference.values(got[f"layers.29.{name}.weight"]), halves)


def test_metadata_of_every_type(tmp_path: Path) -> None:
    path = tmp_path / "keys.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -300)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve 你好")
    writer.add_array("texts", ["", "a", "é"])
    writer.add_array("numbers", [1, -2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    keys = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if "GGUF." not in name}
    assert GgufFile(path).keys == keys


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux only")
def test_pages_are_given_back_while_streaming() -> None:
    source = open_model("smollm2")
    resident = []
    for index, tensor in enumerate(source.tensors()):
        assert int(tensor.data.sum()) >= 0  # every page is touched
        if index % 30:
            continue
        text = Path("/proc/self/smaps").read_text(encoding="utf-8")
        lines = text[text.index("SmolLM2-135M") :].splitlines()
        resident.append(next(int(line.split()[1]) for line in lines if line.startswith("Rss:")))
    assert max(resident) < 40_000 < 98_000  # KiB: never more than the largest tensor (30 MB) of the 98 MB file


# --- Malformed files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    models.save_gguf(_case("llama-linear"), path)
    return path.read_bytes()


def _open(content: bytes, folder: Path) -> None:
    (folder / "model.gguf").write_bytes(content)
    source = open_model(str(folder / "model.gguf"))
    for tensor in source.tensors():
        assert len(tensor.data) > 0
    source.tokenizer_data()


def _key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def _header(*keys: bytes, tensors: int = 0, version: int = 3, count: int | None = None) -> bytes:
    count = len(keys) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + b"".join(keys)


def _architecture(name: bytes) -> bytes:
    return _key("general.architecture", 8, struct.pack("<Q", len(name)) + name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"GG", "not a GGUF file"),
        (b"PK\x03\x04 zip", "starts with b'PK"),
        (b"GGUF\x03", "ends inside the version"),
        (_header(version=1), "version 1 is not supported; supported: 2, 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (_header(count=2**60), "keys cannot fit"),
        (_header(tensors=2**60), "tensors cannot fit"),
        (_header(_key("a", 99, b"\0" * 8)), "key 'a' has the unknown value type 99"),
        (_header(_key("a", 8, struct.pack("<Q", 2**63))), "ends inside key 'a'"),
        (_header(_key("a", 9, struct.pack("<IQ", 8, 2**50))), "strings of key 'a' cannot fit"),
        (_header(_key("a", 9, struct.pack("<IQ", 4, 2**50))), "ends inside key 'a'"),
        (_header(_key("a", 9, struct.pack("<IQ", 9, 1) + b"\0" * 8)), "supported: numbers and strings"),
        (_header(_key("a", 8, struct.pack("<Q", 1) + b"\xff")), "key 'a' is not UTF-8"),
        (_header(_key("a", 0, b"\1"), _key("a", 0, b"\1")), "key 'a' appears twice"),
        (_header(_key("general.alignment", 4, struct.pack("<I", 3))), "must be a power of two, got 3"),
        (_header(_architecture(b"mamba")), "'mamba' is not supported; supported: llama, qwen2, qwen3, gpt2, gptneox"),
        (_header(_architecture(b"llama")), "'llama.embedding_length' is missing"),
    ],
)
def test_malformed_headers_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.gguf") as error:
        _open(content, tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),  # where the value goes, counted from the end of the tensor's name
    [
        (0, struct.pack("<I", 9), "has 9 dimensions"),
        (4, struct.pack("<Q", 0), "impossible for f32"),
        (4, struct.pack("<Q", 2**40), "truncated or corrupt"),
        (4, struct.pack("<Q", 15), "has shape [16, 15], not [16, 16]"),
        (20, struct.pack("<I", 12), "stored as q4_K; supported: bf16, f16, f32, q4_0, q4_1, q8_0"),
        (20, struct.pack("<I", 77), "stored as type 77"),
        (24, struct.pack("<Q", 2**62), "truncated or corrupt"),
        (24, struct.pack("<Q", 1), "not aligned"),
    ],
)
def test_malformed_tensors_are_named(small: bytes, field: int, value: bytes, message: str, tmp_path: Path) -> None:
    name = b"blk.0.attn_q.weight"
    at = small.index(name) + len(name) + field
    with pytest.raises(ModelError, match=r"tensor 'blk\.0\.attn_q\.weight'") as error:
        _open(small[:at] + value + small[at + len(value) :], tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_xp.weight", "tensor 'blk.1.ffn_up.weight' is missing"),
        (b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight", "tensor 'blk.0.ffn_up.weight' appears twice"),
        (b"linear", b"spiral", "'llama.rope.scaling.type' must be one of none, linear, yarn, got 'spiral'"),
        (struct.pack("<f", 1e4), struct.pack("<f", float("nan")), "'llama.rope.freq_base' must be a number above 0"),
        (b"llama.attention.head_count_kv", b"llama.attention.head_count_kx", "has shape [8, 16], not [16, 16]"),
    ],
)
def test_what_does_not_fit_is_named(small: bytes, before: bytes, after: bytes, message: str, tmp_path: Path) -> None:
    assert small.count(before) == 1
    with pytest.raises(ModelError, match=r"model\.gguf") as error:
        _open(small.replace(before, after), tmp_path)
    assert message in str(error.value)


def test_a_tensor_nobody_reads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    models.save_gguf(_case("qwen3-gqa"), path)
    content = path.read_bytes().replace(b"qwen3", b"qwen2")
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"'blk\.0\.attn_q_norm\.weight' is no part of a qwen2 model"):
        open_model(str(path))


_fuzz = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@_fuzz
@given(cut=st.floats(0, 1))
def test_truncated_files_give_a_model_error(small: bytes, tmp_path: Path, cut: float) -> None:
    with pytest.raises(ModelError, match=r"model\.gguf"):
        _open(small[: int(cut * (len(small) - 64))], tmp_path)


@_fuzz
@given(data=st.data())
def test_corrupt_headers_give_a_model_error_or_a_model(small: bytes, tmp_path: Path, data: st.DataObject) -> None:
    header = small.index(b"blk.1.ffn_norm.weight") + 60
    content = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header))
        new = data.draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x01", b"\x09", b"\xff" * 8, b"\0" * 8]))
        content[at : at + len(new)] = new
    try:
        _open(bytes(content), tmp_path)
    except ModelError as error:
        assert "model.gguf" in str(error)


_LIST, _LISTS = struct.pack("<IQ", 4, 2) + b"\1\0\0\0" * 2, struct.pack("<IQQQ", 8, 2, 0, 0)


@pytest.mark.parametrize("value", [(9, _LIST), (9, _LISTS), (8, struct.pack("<Q", 0)), (7, b"\1"), (12, b"\xff" * 8)])
def test_keys_of_the_wrong_type_give_a_model_error_or_a_model(
    small: bytes, tmp_path: Path, value: tuple[int, bytes]
) -> None:
    keys = GgufFile(_written(small, tmp_path)).keys
    rest = small[small.index(b"token_embd.weight") - 8 :] + b"\0" * 32
    for name in keys:
        kept = [_key(other, *_encoded(keys[other])) for other in keys if other != name]
        _open(_header(*kept, _key(name, *_encoded(keys[name])), tensors=small[8]) + rest, tmp_path)
        try:
            _open(_header(*kept, _key(name, *value), tensors=small[8]) + rest, tmp_path)
        except ModelError as error:
            assert "model.gguf" in str(error)


def _written(content: bytes, folder: Path) -> Path:
    (folder / "original.gguf").write_bytes(content)
    return folder / "original.gguf"


def _encoded(value: object) -> tuple[int, bytes]:
    match value:
        case str():
            return 8, struct.pack("<Q", len(value)) + value.encode()
        case int():
            return 4, struct.pack("<I", value)
        case float():
            return 6, struct.pack("<f", value)
        case _:
            raise AssertionError(f"the small model has no key of type {type(value)}")
