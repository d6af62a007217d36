"""Tiny random models of every family: made by `transformers`, saved as safetensors or, by the `gguf` library, as GGUF.

The shapes vary what tends to break: odd head counts, grouped heads, tied and untied embeddings, biases on and off,
heads that are not hidden / heads wide, partial rotation, rope scalings.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

logging.disable_progress_bar()

VOCAB_SIZE, MAX_POSITION = 97, 96


@dataclass(frozen=True)
class Case:
    """One shape of one family; `options` are keys of its transformers config."""

    family: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.family}-{self.name}"


def _llama(heads: int, kv_heads: int, **options: Any) -> dict[str, Any]:
    shape = dict(hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=56)
    return shape | dict(num_hidden_layers=2, max_position_embeddings=MAX_POSITION) | options


def _gpt2(heads: int, **options: Any) -> dict[str, Any]:
    return dict(n_embd=8 * heads, n_head=heads, n_layer=2, n_positions=MAX_POSITION) | options


def _opt(heads: int, **options: Any) -> dict[str, Any]:
    hidden = 8 * heads
    shape = dict(hidden_size=hidden, word_embed_proj_dim=hidden, num_attention_heads=heads, ffn_dim=4 * hidden)
    return shape | dict(num_hidden_layers=2, max_position_embeddings=MAX_POSITION) | options


def _neox(heads: int, **options: Any) -> dict[str, Any]:
    shape = dict(hidden_size=16 * heads, num_attention_heads=heads, intermediate_size=72, num_hidden_layers=2)
    return shape | dict(max_position_embeddings=MAX_POSITION) | options


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=10000.0) | parameters)


_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=24)
_WHOLE_HEAD = _rope("default", partial_rotary_factor=1.0)

CASES = [
    Case("gpt2", "tied", _gpt2(3)),
    Case("gpt2", "untied-inner", _gpt2(4, n_inner=40, tie_word_embeddings=False)),
    Case("gpt2", "relu", _gpt2(1, activation_function="relu")),
    Case("opt", "tied", _opt(3)),
    Case("opt", "untied-no-bias", _opt(4, enable_bias=False, tie_word_embeddings=False)),
    Case("llama", "gqa-tied", _llama(9, 3, tie_word_embeddings=True)),
    Case("llama", "mqa-bias", _llama(4, 1, attention_bias=True, mlp_bias=True)),
    Case("llama", "head-dim-llama3", _llama(3, 3, head_dim=12, **_LLAMA3)),
    Case("llama", "linear", _llama(2, 1, **_rope("linear", factor=2.0))),
    Case("mistral", "gqa", _llama(6, 2, sliding_window=None)),
    Case("mistral", "head-dim", _llama(5, 5, head_dim=10, sliding_window=None, tie_word_embeddings=True)),
    Case("qwen2", "tied", _llama(7, 1, tie_word_embeddings=True)),
    Case("qwen2", "untied-yarn", _llama(4, 2, **_YARN)),
    Case("qwen3", "gqa", _llama(4, 2, head_dim=16)),
    Case("qwen3", "odd-tied-bias", _llama(3, 1, head_dim=8, tie_word_embeddings=True, attention_bias=True)),
    Case("gpt_neox", "parallel", _neox(3)),
    Case("gpt_neox", "sequential", _neox(4, use_parallel_residual=False, **_WHOLE_HEAD)),
    Case("gpt_neox", "no-bias-tied", _neox(2, attention_bias=False, tie_word_embeddings=True, hidden_act="gelu_new")),
]
GGUF_CASES = [
    case
    for case in CASES
    if case.id
    in ("gpt2-tied", "gpt2-untied-inner", "llama-gqa-tied", "llama-mqa-bias", "llama-head-dim-llama3", "llama-linear")
    or case.id in ("mistral-head-dim", "qwen2-untied-yarn", "qwen3-gqa", "gpt_neox-parallel", "gpt_neox-sequential")
]


def build(case: Case, seed: int = 0) -> PreTrainedModel:
    """The model in float32, every parameter random: weights wide enough for clear logits, and no bias zero."""
    config = AutoConfig.for_model(case.family, vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, **case.options)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5 * (2.0 if "emb" in name else 1.0))
            else:
                parameter.copy_(noise * 0.1 + (1.0 if "norm" in name or "ln_" in name else 0.0) * ("weight" in name))
    return model


def save(case: Case, directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shards: int = 1) -> Any:
    """Write the model in Hugging Face layout and return it, in float32 with the values as stored."""
    model = build(case, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    stored = copy.deepcopy(model).to(dtype)  # not the returned one: this rounds the rotary frequencies too
    size = sum(tensor.nbytes for tensor in stored.state_dict().values())
    stored.save_pretrained(directory, max_shard_size=size if shards == 1 else size // shards)
    return model


def logits(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """[tokens, vocabulary], float32, as `transformers` computes them."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


_GGUF_NAMES = {
    "gpt2": ("gpt2", "GPT2"),
    "llama": ("llama", "LLAMA"),
    "mistral": ("llama", "LLAMA"),
    "qwen2": ("qwen2", "QWEN2"),
    "qwen3": ("qwen3", "QWEN3"),
    "gpt_neox": ("gptneox", "GPTNEOX"),
}


def save_gguf(case: Case, path: Path, *, seed: int = 0, quantization: str = "F32") -> Any:
    """Write the model as llama.cpp's converter does and return it in float32, with the values as stored.

    Matrices whose rows do not fill blocks of the quantization stay float32. Skips the test where there is no `gguf`,
    as on a machine that is lent for its GPU.
    """
    gguf = pytest.importorskip("gguf")
    kinds = gguf.GGMLQuantizationType
    model = build(case, seed)
    config = model.config
    architecture, arch = _GGUF_NAMES[case.family]
    writer = gguf.GGUFWriter(path, architecture)
    hidden = config.hidden_size
    inner = (config.n_inner or 4 * hidden) if case.family == "gpt2" else config.intermediate_size
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    if case.family in ("gpt2", "gpt_neox"):
        writer.add_layer_norm_eps(config.layer_norm_eps if case.family == "gpt_neox" else config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(kv_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if case.family == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    if case.family != "gpt2":
        _add_rope(writer, config.rope_parameters, head_dim)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        # Moving indices instead of values tells where each value goes, and so how to bring it back.
        order = _converted(case.family, name, np.arange(tensor.numel()).reshape(tensor.shape), heads, kv_heads)
        values = tensor.numpy().reshape(-1)[order]
        block = gguf.GGML_QUANT_SIZES[kinds[quantization]][0]
        raw = kinds[quantization if values.ndim == 2 and values.shape[1] % block == 0 else "F32"]
        data = gguf.quants.quantize(values, raw)
        stem, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", data, raw_dtype=raw)
        tensor.numpy().reshape(-1)[order.reshape(-1)] = gguf.quants.dequantize(data, raw).reshape(-1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _converted(family: str, name: str, array: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """The layout llama.cpp's converter gives a tensor of transformers."""
    if family == "gpt2" and array.ndim == 2 and any(part in name for part in ("c_attn", "c_proj", "c_fc")):
        return np.ascontiguousarray(array.T)
    if ".query_key_value." in name:  # from q, k, v of each head to all of q, all of k, all of v
        return array.reshape(heads, 3, array.shape[0] // heads // 3, -1).swapaxes(0, 1).reshape(array.shape)
    if family in ("llama", "mistral") and (".q_proj." in name or ".k_proj." in name):  # halves of a head to pairs
        rows = heads if ".q_proj." in name else kv_heads
        return array.reshape(rows, 2, array.shape[0] // rows // 2, -1).swapaxes(1, 2).reshape(array.shape)
    return array


def _add_rope(writer: Any, parameters: dict[str, Any], head_dim: int) -> None:
    writer.add_rope_dimension_count(int(head_dim * parameters.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(parameters["rope_theta"])
    kind = parameters["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(pytest.importorskip("gguf").RopeScalingType(kind))
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
    if kind == "llama3":  # the converter stores what each frequency is divided by
        plain = 1.0 / parameters["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        factor, low, high = (parameters[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
        turns = parameters["original_max_position_embeddings"] * plain / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / ((1 - smooth) / factor + smooth)).astype(np.float32))
