"""One model in the formats that engines read: a Hugging Face directory in bfloat16, GGUF files made from it.

A GGUF file holds every matrix in one type, the token embedding included: all who read it multiply the same bits.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt

from fastserve.loaders import ModelError, ModelSource, ModelSpec, open_model
from fastserve.loaders.hf_config import read_spec
from fastserve.loaders.settings import Settings
from fastserve.loaders.weights import tensor_shapes
from fastserve.tokenizer import Tokenizer

Weights = Literal["bfloat16", "q8_0", "q4_0"]
WEIGHTS: tuple[Weights, ...] = ("bfloat16", "q8_0", "q4_0")
RANDOM = "llama-1b"
NAMED = ("smollm2", RANDOM)  # others are directories

Array = npt.NDArray[Any]
_TYPES = {
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# Canonical name (see WeightTensor): (Hugging Face, GGUF). In front of a layer's: "model.layers.N.", "blk.N.".
_TOP = {
    "token_embedding": ("model.embed_tokens", "token_embd"),
    "final_norm": ("model.norm", "output_norm"),
    "lm_head": ("lm_head", "output"),
}
_LAYER = {
    "attn_norm": ("input_layernorm", "attn_norm"),
    "q": ("self_attn.q_proj", "attn_q"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "o": ("self_attn.o_proj", "attn_output"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}
_LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DEVIATION = 0.02  # of random weights
_CHUNK = 1 << 22  # random numbers at a time


def directory_of(model: str, work: Path) -> Path:
    """The model as a Hugging Face directory; named ones are made under `work`, once."""
    if model not in NAMED:
        if not (Path(model) / "config.json").is_file():
            raise ModelError(f"{model}: not a Hugging Face directory; name one, or {' or '.join(NAMED)}")
        return Path(model)
    directory = work / model
    if not (directory / "config.json").is_file():  # written last
        directory.mkdir(parents=True, exist_ok=True)
        donor = open_model("smollm2")
        data = donor.tokenizer_data()
        assert data is not None
        Tokenizer.from_data(data)._backend.save(str(directory / "tokenizer.json"))
        if model == RANDOM:
            config = _llama_config(_LLAMA_1B)
            write_safetensors(directory / "model.safetensors", _random_tensors(_spec_of(config)))
        else:
            config = _config_of(donor.spec)
            write_safetensors(directory / "model.safetensors", _bfloat16_tensors(donor))
        special = {"tokenizer_class": "PreTrainedTokenizerFast", **(data.special_tokens or {})}
        (directory / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return directory


def gguf_of(directory: Path, weights: Weights, work: Path) -> Path:
    """A GGUF file of a Llama-like model, made once; matrices hold what the directory's round to."""
    path = work / f"{directory.resolve().name}-{weights}.gguf"
    if path.is_file():
        return path
    source, donor = open_model(str(directory)), open_model("smollm2")
    spec = source.spec
    _check_llama(spec)
    if spec.vocab_size < donor.spec.vocab_size:
        raise ModelError(f"{directory}: has fewer tokens than SmolLM2, whose vocabulary GGUF files are given here")
    kind, file_type = _TYPES[weights]
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_name(path.stem)
    writer.add_file_type(file_type)
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_position)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(_rope_theta(spec))
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    _add_tokens(writer, donor, spec.vocab_size)
    # Shapes and sizes first, tensors as they are converted: a large model is never whole in memory.
    shapes = {name: shape for name, shape in tensor_shapes(spec)}
    order = [tensor.name for tensor in source.tensors()]
    for name in order:
        held = kind if len(shapes[name]) > 1 else gguf.GGMLQuantizationType.F32
        block, size = gguf.GGML_QUANT_SIZES[held]
        elements = int(np.prod(shapes[name]))
        if shapes[name][-1] % block:
            raise ModelError(f"{directory}: {name} has rows of {shapes[name][-1]}, which {weights} cannot hold")
        writer.add_tensor_info(
            _stored(name)[1], shapes[name], np.dtype(np.float32), elements // block * size, raw_dtype=held
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in source.tensors():
        values = _float32(tensor.dtype, tensor.data, tensor.shape)
        heads = {"q": spec.num_heads, "k": spec.num_kv_heads}.get(tensor.name.split(".")[-2])
        if heads is not None:  # rotated pairs are neighbours there
            values = values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        held = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(values), held))
    writer.close()
    part.rename(path)
    return path


def write_safetensors(path: Path, tensors: Iterator[tuple[str, tuple[int, ...], Iterator[Array]]]) -> None:
    """Writes bfloat16 tensors, given as (name, shape, pieces of uint16 bits), one after another."""
    data, header, offset = path.with_suffix(".data"), dict[str, Any](), 0
    with data.open("wb") as out:
        for name, shape, pieces in tensors:
            begin = offset
            for bits in pieces:
                out.write(bits.astype("<u2", copy=False).tobytes())
                offset += 2 * bits.size
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, offset]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out, data.open("rb") as content:
        out.write(struct.pack("<Q", len(text)) + text)
        while piece := content.read(1 << 24):
            out.write(piece)
    data.unlink()


def bfloat16_bits(values: npt.NDArray[np.float32]) -> Array:
    """Rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _bfloat16_tensors(source: ModelSource) -> Iterator[tuple[str, tuple[int, ...], Iterator[Array]]]:
    for tensor in source.tensors():
        values = _float32(tensor.dtype, tensor.data, tensor.shape)
        yield _stored(tensor.name)[0], tensor.shape, iter([bfloat16_bits(values)])


def _random_tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...], Iterator[Array]]]:
    draw = np.random.default_rng(0)

    def pieces(shape: tuple[int, ...]) -> Iterator[Array]:
        if len(shape) == 1:
            yield bfloat16_bits(np.ones(shape, np.float32))
            return
        left = int(np.prod(shape))
        while left:
            count = min(left, _CHUNK)
            yield bfloat16_bits(draw.standard_normal(count, np.float32) * np.float32(_DEVIATION))
            left -= count

    for name, shape in tensor_shapes(spec):
        yield _stored(name)[0], shape, pieces(shape)


def _float32(dtype: str, data: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = data.reshape(-1, shape[-1] // block * size)
    values: npt.NDArray[np.float32] = gguf.quants.dequantize(rows, kind).astype(np.float32).reshape(shape)
    return values


def _stored(name: str) -> tuple[str, str]:
    """Hugging Face's and GGUF's name of a canonical one."""
    parts = name.split(".")
    if parts[0] != "layers":
        theirs, ours = _TOP[parts[0]]
        return f"{theirs}.{parts[1]}", f"{ours}.{parts[1]}"
    theirs, ours = _LAYER[parts[2]]
    return f"model.layers.{parts[1]}.{theirs}.{parts[3]}", f"blk.{parts[1]}.{ours}.{parts[3]}"


def _llama_config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        **fields,
    }


def _config_of(spec: ModelSpec) -> dict[str, Any]:
    _check_llama(spec)
    return _llama_config(
        {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "num_key_value_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "intermediate_size": spec.intermediate_size,
            "rms_norm_eps": spec.norm_eps,
            "rope_theta": _rope_theta(spec),
            "max_position_embeddings": spec.max_position,
            "tie_word_embeddings": spec.tied_embeddings,
            "bos_token_id": spec.bos_token_id,
            "eos_token_id": spec.eos_token_ids[0],
        }
    )


def _spec_of(config: dict[str, Any]) -> ModelSpec:
    return read_spec(Settings("config.json", config), Settings("generation_config.json", {}))


def _check_llama(spec: ModelSpec) -> None:
    if spec.family not in ("llama", "mistral") or spec.qkv_bias or spec.qk_norm:
        raise ModelError(f"only Llama-like models are written in other formats here, not {spec.family}")
    _rope_theta(spec)


def _rope_theta(spec: ModelSpec) -> float:
    half = spec.head_dim // 2
    theta = round(spec.rope_inv_freq[1] ** -half)
    expected = float(theta) ** -(np.arange(half) / half)
    if len(spec.rope_inv_freq) != half or not np.allclose(spec.rope_inv_freq, expected, rtol=1e-4):
        raise ModelError("only models whose rotary frequencies are not scaled are written in other formats here")
    return float(theta)


def _add_tokens(writer: gguf.GGUFWriter, donor: ModelSource, vocab_size: int) -> None:
    data = donor.tokenizer_data()
    assert data is not None and data.gguf is not None
    keys = data.gguf
    tokens, types = keys["tokenizer.ggml.tokens"], list(keys["tokenizer.ggml.token_type"])
    missing = vocab_size - len(tokens)
    writer.add_tokenizer_model(keys["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(keys["tokenizer.ggml.pre"])
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in range(missing))])
    writer.add_token_types([*types, *[gguf.TokenType.UNUSED] * missing])
    writer.add_token_merges(keys["tokenizer.ggml.merges"])
    writer.add_bos_token_id(keys["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(keys["tokenizer.ggml.eos_token_id"])
    writer.add_add_bos_token(False)
