"""FasterTransformer checkpoints: files as NVIDIA's converters lay them out, there and back, and what is malformed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastserve import InvalidRequest
from fastserve.convert import convert
from fastserve.loaders import ModelError, open_model
from fastserve.loaders.fastertransformer import FasterTransformerModel
from fastserve.loaders.floats import cast

TOKENS = [int(token) for token in np.random.default_rng(9).integers(0, models.VOCAB_SIZE, 32)]
CASES = [case for case in models.CASES if case.family in ("gpt2", "opt")]


def _case(identifier: str) -> models.Case:
    return next(case for case in models.CASES if case.id == identifier)


def _numbers(directory: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.fromfile(directory / f"model.{name}.bin", np.float32).reshape(shape)


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for three ranks, and beside it, as `hf`, the directory it was made of."""
    directory = tmp_path_factory.mktemp("opt")
    models.save(_case("opt-tied"), directory / "hf")
    convert(open_model(str(directory / "hf")), directory / "ft", tensor_parallel_size=3)
    return directory / "ft"


@pytest.fixture
def copied(opt: Path, tmp_path: Path) -> Path:
    for file in opt.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def _set(directory: Path, **changes: str | None) -> None:
    """Change keys of config.ini; None removes one."""
    file = directory / "config.ini"
    lines = [line for line in file.read_text().splitlines() if line.split(" ")[0] not in changes]
    file.write_text("\n".join([*lines, *(f"{key} = {value}" for key, value in changes.items() if value is not None)]))


# --- There and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("cut", [False, True])
def test_logits_equal_transformers(case: models.Case, cut: bool, tmp_path: Path) -> None:
    model = models.save(case, tmp_path / "hf")
    ranks = model.config.num_attention_heads if cut else 1
    done = convert(open_model(str(tmp_path / "hf")), tmp_path / "ft", tensor_parallel_size=ranks)
    source = open_model(str(tmp_path / "ft"))
    expected = models.logits(model, TOKENS)
    np.testing.assert_allclose(reference.logits(source, TOKENS), expected, rtol=0, atol=reference.tolerance(expected))
    spec = source.spec
    assert (spec.family, spec.bos_token_id, spec.eos_token_ids) == (case.family, 1, (2,))
    assert spec.max_position == models.MAX_POSITION and spec.tied_embeddings == model.config.tie_word_embeddings
    assert (done.dtype, done.family, done.tensor_parallel_size) == ("fp32", case.family, ranks)
    files = list((tmp_path / "ft").glob("*.bin"))
    assert (done.files, done.bytes) == (len(files), sum(file.stat().st_size for file in files))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked", ["fp32", "fp16", "bf16", None])
def test_numbers_are_rounded_as_torch_rounds_them(stored: torch.dtype, asked: str | None, tmp_path: Path) -> None:
    model = models.save(_case("gpt2-untied-inner"), tmp_path / "hf", dtype=stored)
    done = convert(open_model(str(tmp_path / "hf")), tmp_path / "ft", tensor_parallel_size=2, dtype=asked)
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = stored if asked is None else kinds[asked]
    assert kinds[done.dtype] == dtype
    source = open_model(str(tmp_path / "ft"))
    assert source.weights_dtype == done.dtype.replace("p", "")
    expected = model.transformer.h[1].mlp.c_fc.weight.to(dtype).float().T.detach()
    np.testing.assert_array_equal(reference.weights(source)["layers.1.up.weight"], expected)


@pytest.mark.parametrize("target", ["f16", "bf16"])
def test_rounding_of_what_is_special(target: str) -> None:
    """Ties, denormals, zeros, infinities and NaNs."""
    random = np.random.default_rng(2).integers(0, 2**32, 20_000, dtype=np.uint32)
    ties = (random & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    special = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 1], np.uint32)
    bits = np.concatenate([random, ties, special])
    if target == "f16":
        too_large = np.abs(bits.view(np.float32)) > 60000
        bits = bits[~too_large | ~np.isfinite(bits.view(np.float32))]
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[target]
    expected = torch.from_numpy(bits.view(np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint16)
    found = cast(bits, "f32", target)
    nans = np.isnan(bits.view(np.float32))
    np.testing.assert_array_equal(found[~nans], expected[~nans])
    back = cast(found, target, "f32").view(np.float32)
    assert np.isnan(back[nans]).all() and not np.isnan(back[~nans]).any()


def test_a_checkpoint_can_be_cut_anew(opt: Path, tmp_path: Path) -> None:
    convert(open_model(str(opt)), tmp_path / "one", dtype="fp32")
    one, three = (reference.weights(open_model(str(path))) for path in (tmp_path / "one", opt))
    assert one.keys() == three.keys() and all(np.array_equal(one[name], three[name]) for name in one)


def test_several_ends_and_none(tmp_path: Path) -> None:
    models.save(_case("gpt2-relu"), tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    content = json.loads(config.read_text())
    for ends, expected in (([5, 6], (5, 6)), (None, ())):
        config.write_text(json.dumps(content | {"eos_token_id": ends, "bos_token_id": None}))
        (tmp_path / "hf" / "generation_config.json").unlink(missing_ok=True)
        convert(open_model(str(tmp_path / "hf")), tmp_path / "ft", force=True)
        spec = open_model(str(tmp_path / "ft")).spec
        assert (spec.eos_token_ids, spec.bos_token_id) == (expected, None)


# --- The files, worked out by hand -----------------------------------------------------------------------------------


def test_files_of_gpt2_for_two_ranks(tmp_path: Path) -> None:
    """Hidden size 4, two heads of 2, six inner units. GPT-2's own matrices are [inputs, outputs]; Q, K, V in a row."""
    case = models.Case("gpt2", "hand", dict(n_embd=4, n_head=2, n_layer=1, n_positions=3, n_inner=6))
    model = models.build(case)
    block = model.transformer.h[0]
    with torch.no_grad():
        for parameter in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            parameter.weight.copy_(torch.arange(parameter.weight.numel()).reshape(parameter.weight.shape))
            parameter.bias.copy_(100 + torch.arange(parameter.bias.numel()))
        model.transformer.wpe.weight.copy_(torch.arange(12).reshape(3, 4))
    model.save_pretrained(tmp_path / "hf")
    ft = tmp_path / "ft"
    convert(open_model(str(tmp_path / "hf")), ft, tensor_parallel_size=2)

    # Row i of c_attn is 12 i … 12 i + 11: Q is the first four columns, and the second head of it 2 and 3.
    qkv = [[[12 * i + 4 * part + 2, 12 * i + 4 * part + 3] for part in range(3)] for i in range(4)]
    np.testing.assert_array_equal(_numbers(ft, "layers.0.attention.query_key_value.weight.1", (4, 3, 2)), qkv)
    bias = _numbers(ft, "layers.0.attention.query_key_value.bias.0", (3, 2))
    np.testing.assert_array_equal(bias, [[100, 101], [104, 105], [108, 109]])
    dense = _numbers(ft, "layers.0.attention.dense.weight.1", (2, 4))
    np.testing.assert_array_equal(dense, [[8, 9, 10, 11], [12, 13, 14, 15]])
    np.testing.assert_array_equal(_numbers(ft, "layers.0.attention.dense.bias", (4,)), [100, 101, 102, 103])
    up = _numbers(ft, "layers.0.mlp.dense_h_to_4h.weight.1", (4, 3))
    np.testing.assert_array_equal(up, [[3, 4, 5], [9, 10, 11], [15, 16, 17], [21, 22, 23]])
    np.testing.assert_array_equal(_numbers(ft, "layers.0.mlp.dense_h_to_4h.bias.1", (3,)), [103, 104, 105])
    down = _numbers(ft, "layers.0.mlp.dense_4h_to_h.weight.1", (3, 4))
    np.testing.assert_array_equal(down, [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]])
    np.testing.assert_array_equal(_numbers(ft, "layers.0.mlp.dense_4h_to_h.bias", (4,)), [100, 101, 102, 103])
    np.testing.assert_array_equal(_numbers(ft, "wpe", (3, 4)), np.arange(12).reshape(3, 4))
    wte = model.transformer.wte.weight.detach().numpy()
    np.testing.assert_array_equal(_numbers(ft, "wte", (models.VOCAB_SIZE, 4)), wte)
    layer = "model.layers.0"
    shared = {"input_layernorm", "post_attention_layernorm"}
    assert {path.name for path in ft.iterdir()} == {
        "config.ini", "model.wte.bin", "model.wpe.bin",
        *(f"model.final_layernorm.{kind}.bin" for kind in ("weight", "bias")),
        *(f"{layer}.{name}.{kind}.bin" for name in shared for kind in ("weight", "bias")),
        *(f"{layer}.{name}.bias.bin" for name in ("attention.dense", "mlp.dense_4h_to_h")),
        *(f"{layer}.{name}.weight.{rank}.bin" for name in ("attention.dense", "mlp.dense_4h_to_h") for rank in (0, 1)),
        *(
            f"{layer}.{name}.{kind}.{rank}.bin"
            for name in ("attention.query_key_value", "mlp.dense_h_to_4h")
            for kind in ("weight", "bias")
            for rank in (0, 1)
        ),
    }  # fmt: skip


def _write_as_nvidia(model: Any, directory: Path, ranks: int, config: dict[str, Any]) -> None:
    """What huggingface_gpt_convert.py and huggingface_opt_convert.py do, for both families."""
    directory.mkdir()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    is_opt = model.config.model_type == "opt"

    def save(name: str, array: np.ndarray, axis: int | None = None) -> None:
        parts = [array] if axis is None else np.split(array, ranks, axis)
        for rank, part in enumerate(parts):
            part.tofile(directory / f"model.{name}{'' if axis is None else f'.{rank}'}.bin")

    if is_opt:
        base, layer_base = "model.decoder.", "model.decoder.layers."
        save("wte", state[base + "embed_tokens.weight"])
        save("lm_head.weight", state[base + "embed_tokens.weight"])
        save("wpe", state[base + "embed_positions.weight"][2:])
    else:
        base, layer_base = "transformer.", "transformer.h."
        save("wte", state[base + "wte.weight"])
        save("wpe", state[base + "wpe.weight"])
    for kind in ("weight", "bias"):
        save(f"final_layernorm.{kind}", state[f"{base}{'final_layer_norm' if is_opt else 'ln_f'}.{kind}"])
    names = (
        ["self_attn_layer_norm", "self_attn.out_proj", "final_layer_norm", "fc1", "fc2"]
        if is_opt
        else ["ln_1", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    )
    for i in range(model.config.num_hidden_layers):

        def get(name: str, i: int = i) -> np.ndarray:
            array = state[f"{layer_base}{i}.{name}"]
            return array.T if is_opt and array.ndim == 2 else array

        for kind in ("weight", "bias"):
            if is_opt:
                qkv = np.concatenate([get(f"self_attn.{part}_proj.{kind}") for part in "qkv"], -1)
            else:
                qkv = get(f"attn.c_attn.{kind}")
            local = qkv.shape[-1] // 3
            save(f"layers.{i}.attention.query_key_value.{kind}", qkv.reshape(*qkv.shape[:-1], 3, local), -1)
            first, dense, second, up, down = (get(f"{name}.{kind}") for name in names)
            save(f"layers.{i}.input_layernorm.{kind}", first)
            save(f"layers.{i}.attention.dense.{kind}", dense, 0 if kind == "weight" else None)
            save(f"layers.{i}.post_attention_layernorm.{kind}", second)
            save(f"layers.{i}.mlp.dense_h_to_4h.{kind}", up, -1)
            save(f"layers.{i}.mlp.dense_4h_to_h.{kind}", down, 0 if kind == "weight" else None)
    values = dict(vocab_size=models.VOCAB_SIZE, max_pos_seq_len=models.MAX_POSITION, start_id=1, end_id=2) | config
    hidden, heads = model.config.hidden_size, model.config.num_attention_heads
    values |= dict(num_layer=2, head_num=heads, size_per_head=hidden // heads, inter_size=4 * hidden)
    lines = [f"{key} = {value}" for key, value in values.items()]
    (directory / "config.ini").write_text("\n".join(["[gpt]", *lines, ""]))


def test_a_checkpoint_of_nvidias_opt_converter(tmp_path: Path) -> None:
    """It does not tell for how many ranks it is cut, and stores the tied head a second time."""
    model = models.build(_case("opt-tied"))
    config = dict(layernorm_eps="1e-5", layernorm_type="pre_layernorm", activation_type="Relu", int8="False")
    _write_as_nvidia(model, tmp_path / "ft", 3, config | dict(has_post_decoder_layernorm=1, weight_data_type="fp32"))
    source = open_model(str(tmp_path / "ft"))
    expected = models.logits(model, TOKENS)
    np.testing.assert_allclose(reference.logits(source, TOKENS), expected, rtol=0, atol=reference.tolerance(expected))
    assert isinstance(source, FasterTransformerModel) and source.tensor_parallel_size == 3
    assert source.spec.family == "opt" and not source.spec.tied_embeddings


def test_a_checkpoint_of_nvidias_gpt_converter(tmp_path: Path) -> None:
    """It does not tell the epsilon of its norms, for which FasterTransformer takes 1e-6."""
    model = models.build(models.Case("gpt2", "nvidia", _case("gpt2-tied").options | dict(layer_norm_epsilon=1e-6)))
    _write_as_nvidia(model, tmp_path / "ft", 3, dict(model_name="gpt", weight_data_type="fp32", tensor_para_size=3))
    source = open_model(str(tmp_path / "ft"))
    expected = models.logits(model, TOKENS)
    np.testing.assert_allclose(reference.logits(source, TOKENS), expected, rtol=0, atol=reference.tolerance(expected))
    assert source.spec.family == "gpt2" and source.spec.norm_eps == 1e-6


# --- One rank alone --------------------------------------------------------------------------------------------------


def test_a_rank_reads_its_own_files_alone(copied: Path) -> None:
    whole = reference.weights(open_model(str(copied)))
    spec = open_model(str(copied)).spec
    for rank in range(3):
        for file in copied.glob("model.*.bin"):
            if re.fullmatch(r".*\.[0-2]\.bin", file.name) and not file.name.endswith(f".{rank}.bin"):
                file.rename(file.with_suffix(".away"))
        source = FasterTransformerModel(copied, rank=rank)
        assert source.spec == spec and source.num_parameters == sum(map(np.size, whole.values()))
        shard = {tensor.name: reference.values(tensor) for tensor in source.tensors()}
        assert shard.keys() == whole.keys()
        for name, values in shard.items():
            axis = (
                0 if re.search(r"\.(?:q|k|v|up)\.", name) else 1 if re.search(r"\.(?:o|down)\.weight", name) else None
            )
            expected = whole[name] if axis is None else np.split(whole[name], 3, axis)[rank]
            np.testing.assert_array_equal(values, expected, err_msg=name)
        for file in copied.glob("*.away"):
            file.rename(file.with_suffix(".bin"))
    with pytest.raises(InvalidRequest, match="rank: must be 0 to 2"):
        FasterTransformerModel(copied, rank=3)


# --- What is malformed -----------------------------------------------------------------------------------------------

_QKV = "model.layers.1.attention.query_key_value.weight.2.bin"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_layer="3"), r"model\.layers\.2\.input_layernorm\.weight\.bin: No such file.*num_layer 3"),
        (
            dict(num_layer="1"),
            r"config\.ini: num_layer is 1, and model\.layers\.1\.input_layernorm\.weight\.bin is there",
        ),
        (
            dict(tensor_para_size="1"),
            r"query_key_value\.weight\.0\.bin: 2304 bytes, not the 6912 of \[24, 3, 24\] in f32",
        ),
        (
            dict(tensor_para_size="6"),
            r"head_num 3 and inter_size 96 cannot be cut for 6 ranks; possible: divisors of 3",
        ),
        (dict(weight_data_type="fp16"), r"model\.wte\.bin: 9312 bytes, not the 4656 of \[97, 24\] in f16"),
        (dict(weight_data_type="int8"), r"'weight_data_type' must be one of fp32, fp16, bf16, got 'int8'"),
        (dict(vocab_size="98"), r"model\.wte\.bin: 9312 bytes, not the 9408 of \[98, 24\] in f32"),
        (dict(head_num=None), r"'head_num' is missing"),
        (dict(head_num="three"), r"'head_num' must be an integer between 1 and \d+, got 'three'"),
        (dict(layernorm_type="post_layernorm"), r"'layernorm_type' must be 'pre_layernorm'"),
        (dict(activation_type="GeGLU"), r"'activation_type' must be one of Gelu, Relu, Silu"),
        (dict(has_post_decoder_layernorm="0"), r"'has_post_decoder_layernorm' must be True"),
        (dict(has_adapters="true"), r"'has_adapters' must be False"),
        (dict(use_attention_linear_bias="maybe"), r"'use_attention_linear_bias' must be False"),
        (dict(model_variant="bloom-pre"), r"'model_variant' must be one of gpt, opt-pre"),
        (dict(num_tasks="2"), r"'num_tasks' must be 0"),
        (dict(tensor_para_size="2.5"), r"'tensor_para_size' must be an integer"),
    ],
)
def test_a_config_that_does_not_fit_is_named(changes: dict[str, str | None], message: str, copied: Path) -> None:
    _set(copied, **changes)
    with pytest.raises(ModelError, match=message) as error:
        open_model(str(copied))
    assert str(copied) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_missing_cut_short_or_too_many_are_named(copied: Path) -> None:
    file, content = copied / _QKV, (copied / _QKV).read_bytes()
    file.write_bytes(content[:-4])
    with pytest.raises(ModelError, match=rf"{re.escape(_QKV)}: 2300 bytes, not the 2304 of \[24, 3, 8\] in f32"):
        open_model(str(copied))
    file.unlink()
    with pytest.raises(ModelError, match=rf"{re.escape(_QKV)}: No such file.*tensor_para_size 3"):
        open_model(str(copied))
    file.write_bytes(content)
    (copied / _QKV.replace(".2.bin", ".3.bin")).write_bytes(content)
    with pytest.raises(ModelError, match=r"tensor_para_size is 3, and .*weight\.3\.bin is there"):
        open_model(str(copied))


def test_a_file_that_shrinks_after_it_was_checked(copied: Path) -> None:
    source = open_model(str(copied))
    (copied / _QKV).write_bytes(b"gone")
    with pytest.raises(ModelError, match="4 bytes, not the 2304"):
        list(source.tensors())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"section \[gpt\] is missing"),
        ("head_num = 3", "not an INI file"),
        ("[gpt]\nhead_num = 3\nhead_num = 4", "not an INI file"),
        ("[gpt]\n[task_0]", r"unknown section \[task_0\] \(prompt learning, which is not supported\)"),
        ("[gpt]\n[structure]", r"unknown section \[structure\] \(experts"),
        ("[DEFAULT]\nhead_num = 3\n[gpt]", r"unknown section \[DEFAULT\]; a GPT checkpoint has \[gpt\] alone"),
        ("[gpt]\nhead_num = 3 ; heads\nsize_per_head = 8 # each", "'inter_size' is missing|'vocab_size' is missing"),
        ("[gpt]\n\xff", "not UTF-8 text"),
    ],
)
def test_a_malformed_config_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.ini").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=message) as error:
        open_model(str(tmp_path))
    assert str(tmp_path / "config.ini") in str(error.value) and "\n" not in str(error.value)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_corrupt_configs_give_a_model_error_or_a_model(opt: Path, copied: Path, data: st.DataObject) -> None:
    content = bytearray((opt / "config.ini").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from(b"0123456789[]=;#,-.ex \n\0\xff"))
    (copied / "config.ini").write_bytes(bytes(content))
    try:
        source = open_model(str(copied))
    except ModelError as error:
        assert str(copied) in str(error)
    else:
        assert sum(len(tensor.data) for tensor in source.tensors()) > 0
