"""Llama-like models of random weights, made in seconds however large: one block of random numbers, over and over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from fastserve.loaders.spec import ModelSpec, TokenizerData, WeightTensor
from fastserve.loaders.weights import tensor_shapes

_BLOCK = 8_388_593  # numbers; a prime, so that rows of a matrix differ
_DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """As csrc/bench/random_model.cc has them."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    max_position: int = 8192

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of a `transformers.LlamaConfig`."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        }


SHAPES = {
    "llama-8b": Shape(128256, 4096, 32, 32, 8, 128, 14336, 500000.0),
    "llama-1b": Shape(128256, 2048, 16, 32, 8, 64, 8192, 500000.0),
    "tiny": Shape(512, 128, 2, 4, 2, 32, 192, 10000.0),
}


class RandomLlama:
    """A ModelSource in bfloat16."""

    weights_dtype = "bf16"

    def __init__(self, name: str) -> None:
        shape = SHAPES[name]
        half = shape.head_dim // 2
        self.name = name
        self.spec = ModelSpec(
            family="llama",
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate_size,
            max_position=shape.max_position,
            norm="rms",
            norm_eps=1e-5,
            activation="silu",
            gated_mlp=True,
            rope_inv_freq=tuple(shape.rope_theta ** (-i / half) for i in range(half)),
        )
        self._shapes = dict(tensor_shapes(self.spec))

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: "bf16" if len(shape) > 1 else "f32" for name, shape in self._shapes.items()}

    @property
    def num_parameters(self) -> int:
        return sum(prod(shape) for shape in self._shapes.values())

    def tensors(self) -> Iterator[WeightTensor]:
        largest = max(prod(shape) for shape in self._shapes.values())
        numbers = np.random.default_rng(0).standard_normal(min(_BLOCK, largest), np.float32) * np.float32(_DEVIATION)
        block = (numbers.view(np.uint32) >> 16).astype(np.uint16)  # cut to bfloat16
        data = np.resize(block, largest).view(np.uint8)
        for name, shape in self._shapes.items():
            if len(shape) > 1:
                yield WeightTensor(name, "bf16", shape, data[: 2 * prod(shape)])
            else:
                yield WeightTensor(name, "f32", shape, np.ones(shape, np.float32).view(np.uint8))

    def tokenizer_data(self) -> TokenizerData | None:
        """Prompts are token ids."""
        return None
