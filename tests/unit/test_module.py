"""Modules of `transformers` as models: weights over DLPack without importing torch, and what is no such module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import reference
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from fastserve import LLM, InvalidRequest
from fastserve.loaders import ModelError
from fastserve.loaders.module import ModuleModel
from fastserve.tokenizer import Tokenizer
from fastserve.tokenizer_choice import read_given_tokenizer

TOKENS = [int(token) for token in np.random.default_rng(7).integers(0, models.VOCAB_SIZE, 32)]


def _case(identifier: str) -> models.Case:
    return next(case for case in models.CASES if case.id == identifier)


@pytest.mark.parametrize("case", models.CASES, ids=lambda case: case.id)
def test_logits_equal_the_modules_own(case: models.Case) -> None:
    model = models.build(case)
    source = ModuleModel(model)
    expected = models.logits(model, TOKENS)
    np.testing.assert_allclose(reference.logits(source, TOKENS), expected, rtol=0, atol=reference.tolerance(expected))
    assert source.spec.family == case.family and source.tokenizer_data() is None
    assert source.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("identifier", ["gpt2-tied", "qwen2-tied"])
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_half_precision_is_the_modules_bits(identifier: str, dtype: torch.dtype, name: str) -> None:
    """NumPy has no bfloat16: the bits must come through unchanged all the same."""
    model = models.build(_case(identifier))
    half = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    source = ModuleModel(models.build(_case(identifier)).to(dtype))
    assert source.weights_dtype == name
    embedding = next(half[name] for name in half if "wte" in name or "embed_tokens" in name)
    found = next(tensor for tensor in source.tensors() if tensor.name == "token_embedding.weight")
    assert found.data.tobytes() == embedding.view(torch.uint8).numpy().tobytes()
    model.load_state_dict({name: tensor.float() for name, tensor in half.items()})
    expected = models.logits(model, TOKENS)
    np.testing.assert_allclose(reference.logits(source, TOKENS), expected, rtol=0, atol=reference.tolerance(expected))


def test_weights_are_the_modules_memory() -> None:
    model = models.build(_case("llama-gqa-tied"))
    found = next(tensor for tensor in ModuleModel(model).tensors() if tensor.name == "token_embedding.weight")
    assert found.data.ctypes.data == model.get_input_embeddings().weight.data_ptr()


def test_a_head_is_tied_when_it_is_the_embedding() -> None:
    """Whatever the config says: somebody may have given the module a head of its own."""
    model = models.build(_case("gpt2-tied"))
    assert ModuleModel(model).spec.tied_embeddings
    model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape, generator=torch.manual_seed(1)))
    source = ModuleModel(model)
    expected = models.logits(model, TOKENS)
    assert not source.spec.tied_embeddings
    np.testing.assert_allclose(reference.logits(source, TOKENS), expected, rtol=0, atol=reference.tolerance(expected))


def test_weights_that_are_not_row_by_row() -> None:
    model = models.build(_case("opt-tied"))
    expected = models.logits(model, TOKENS)
    layer = model.model.decoder.layers[0].fc1
    layer.weight = torch.nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert not layer.weight.is_contiguous()
    found = reference.logits(ModuleModel(model), TOKENS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=reference.tolerance(expected))


_NO_TORCH = """
import sys
import numpy as np
from fastserve import LLM, SamplingParams

class Tensor:
    def __init__(self, array):
        self.array, self.shape, self.dtype, self.device = array, array.shape, "torch.float32", "cpu"
        self.data_ptr = lambda: array.ctypes.data
        self.detach = self.cpu = self.contiguous = lambda: self
    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)
    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

class Config:
    def to_dict(self):
        return dict(model_type="gpt2", vocab_size=32, n_embd=8, n_head=2, n_layer=1, n_positions=64, eos_token_id=2)

class Model:
    config = Config()
    def state_dict(self):
        random = np.random.default_rng(0)
        shapes = {"wte": (32, 8), "wpe": (64, 8)}
        shapes |= {f"h.0.{name}": (8, columns) for name, columns in {"attn.c_attn": 24, "attn.c_proj": 8}.items()}
        shapes |= {"h.0.mlp.c_fc": (8, 32), "h.0.mlp.c_proj": (32, 8)}
        shapes |= dict.fromkeys(("h.0.ln_1", "h.0.ln_2", "ln_f"), (8,))
        tensors = {f"transformer.{name}.weight": shape for name, shape in shapes.items()}
        tensors |= {f"transformer.{name}.bias": shape[-1:] for name, shape in shapes.items() if name[0] != "w"}
        return {name: Tensor(random.normal(size=shape).astype(np.float32)) for name, shape in tensors.items()}

with LLM(Model(), policy="fcfs", dtype="float32", kv_cache_memory="1M", swap_space=0) as llm:
    (output,) = llm.generate([5, 6, 7], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
print(len(output.outputs[0].token_ids), llm.info["model"], "torch" in sys.modules)
"""


def test_no_torch_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", _NO_TORCH], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "Model", "False"]


# --- What is no such module ------------------------------------------------------------------------------------------


class _Config:
    def to_dict(self) -> list[int]:
        return []


class _Listed:
    config = _Config()

    def state_dict(self) -> dict[str, int]:
        return {}


class _Numbers(_Listed):
    config = models.build(_case("qwen2-tied")).config

    def state_dict(self) -> dict[str, int]:
        return {"model.norm.weight": 3}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.Linear(2, 2), r"a module of transformers, got Linear\("),
        (type(models.build(_case("gpt2-tied"))), "a module of transformers, got <class"),
        (7, "a module of transformers, got 7"),
        (None, "a module of transformers, got None"),
        ("", "a module of transformers, got ''"),
        (_Listed(), r"must be a model of transformers; its config is \[\]"),
        (_Numbers(), "tensor 'model.norm.weight' is int, no tensor"),
    ],
    ids=["linear", "class", "number", "none", "empty", "config", "weights"],
)
def test_what_is_no_module_is_named(model: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        LLM(model)
    assert error.value.field == "model"


def test_what_is_not_supported_is_named() -> None:
    model = models.build(_case("qwen2-tied"))
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM: tensor 'model\.\S+' is torch\.float64; supported: torch"):
        ModuleModel(model.double())
    with torch.device("meta"):
        empty = type(model)(model.config).float()
    with pytest.raises(ModelError, match=r"has no data \(device meta\)"):
        ModuleModel(empty)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match=r"BloomForCausalLM\.config: model_type 'bloom' is not supported; supp"):
        ModuleModel(bloom)


# --- The tokenizer beside it -----------------------------------------------------------------------------------------


def _backend() -> Backend:
    vocab = {chr(code): code - 97 for code in range(97, 123)}
    backend = Backend(BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(["<s>"])
    return backend


def _path(tmp_path: Path) -> str:
    _backend().save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


@pytest.mark.parametrize("kind", ["directory", "file", "path", "tokenizers", "transformers", "own"])
def test_a_tokenizer_in_every_form(kind: str, tmp_path: Path) -> None:
    directory = _path(tmp_path)
    given: dict[str, Any] = {
        "directory": directory,
        "file": f"{directory}/tokenizer.json",
        "path": Path(directory),
        "tokenizers": _backend(),
        "transformers": PreTrainedTokenizerFast(
            tokenizer_object=_backend(), bos_token="<s>", chat_template="{{ bos_token }}{{ messages[0].content }}"
        ),
        "own": Tokenizer(_backend()),
    }
    tokenizer = read_given_tokenizer(given[kind])
    assert tokenizer.encode("bad") == [1, 0, 3]
    if kind == "transformers":
        assert tokenizer.encode_chat([{"role": "user", "content": "bad"}]) == [26, 1, 0, 3]
    else:
        assert not tokenizer.has_chat_template


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("/no/such/tokenizer", "there is no /no/such/tokenizer"),
        (3, "must be a directory with a tokenizer, a tokenizer.json, or .* got int"),
        (Backend, "got type"),
    ],
)
def test_what_is_no_tokenizer_is_named(given: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        read_given_tokenizer(given)
    assert error.value.field == "tokenizer"


def test_an_empty_directory_has_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json, nor vocab\.json and merges\.txt"):
        read_given_tokenizer(tmp_path)


def test_a_tokenizer_and_none_at_once() -> None:
    with pytest.raises(InvalidRequest, match="tokenizer: cannot be given with skip_tokenizer"):
        LLM(models.build(_case("gpt2-tied")), tokenizer=_backend(), skip_tokenizer=True)
