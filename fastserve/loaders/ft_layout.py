"""FasterTransformer's GPT checkpoint on disk: which file holds which part of which canonical tensor.

Files are raw numbers, row by row, without a header; matrices are [inputs, outputs], transposed to ours. A file whose
name has a rank before `.bin` holds what that rank of a tensor-parallel group computes with: of Q, K, V and the first
feed-forward matrix its columns (with its biases), of the attention's output and the second feed-forward matrix its
rows. All other files are everybody's. Facts from FasterTransformer's ParallelGptWeight, ParallelGptDecoderLayerWeight
and the converters in examples/pytorch/gpt/utils.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, prod
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .spec import ModelSpec
from .weights import tensor_shapes

CONFIG, SECTION = "config.ini", "gpt"
_TOP = {
    "token_embedding.weight": "wte",
    "position_embedding.weight": "wpe",
    "final_norm.weight": "final_layernorm.weight",
    "final_norm.bias": "final_layernorm.bias",
    "lm_head.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "q": "attention.query_key_value",
    "k": "attention.query_key_value",
    "v": "attention.query_key_value",
    "o": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
_THIRDS = ("q", "k", "v")  # of one file, in this order
_CUT = {  # the axis of the canonical tensor along which ranks share it; others are everybody's
    **{(name, kind): 0 for name in (*_THIRDS, "up") for kind in ("weight", "bias")},
    ("o", "weight"): 1,
    ("down", "weight"): 1,
}


@dataclass(frozen=True)
class Place:
    """Where one canonical tensor of shape `shape`, cut for `ranks` ranks, is kept."""

    stem: str  # of the file's name
    shape: tuple[int, ...]
    ranks: int
    axis: int | None  # of the canonical tensor, along which it is cut; None: one file for all
    third: int | None  # 0, 1, 2 for Q, K, V, which share a file
    transposed: bool

    @property
    def shards(self) -> range:
        """The ranks that have a file of their own; of a file for all, 0 alone."""
        return range(self.ranks if self.axis is not None else 1)

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Of the canonical tensor, the part that one rank has."""
        return tuple(size // self.ranks if axis == self.axis else size for axis, size in enumerate(self.shape))

    @property
    def file_elements(self) -> int:
        return prod(self.shard_shape) * (1 if self.third is None else len(_THIRDS))

    def file(self, directory: Path, rank: int) -> Path:
        return directory / f"model.{self.stem}{'' if self.axis is None else f'.{rank}'}.bin"

    def index(self, rank: int) -> tuple[slice, ...]:
        """What a rank has of the canonical tensor."""
        if self.axis is None:
            return ()
        size = self.shard_shape[self.axis]
        return (*[slice(None)] * self.axis, slice(rank * size, (rank + 1) * size))

    def view(self, content: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The rank's part of the canonical tensor, of shape `shard_shape`, within all elements of its file."""
        columns = self.shard_shape[::-1] if self.transposed else self.shard_shape
        if self.third is None:
            part = content.reshape(columns)
        else:  # Q, K and V lie side by side in each row
            part = content.reshape(*columns[:-1], len(_THIRDS), columns[-1])[..., self.third, :]
        return part.T if self.transposed else part


def places(spec: ModelSpec, ranks: int) -> Iterator[tuple[str, Place]]:
    """Canonical name and place of every tensor of a model that ParallelGpt runs, layer by layer."""
    for name, shape in tensor_shapes(spec):
        if name in _TOP:
            yield name, Place(_TOP[name], shape, ranks, None, None, False)
            continue
        layer, _, rest = name.removeprefix("layers.").partition(".")
        part, kind = rest.split(".")
        third = _THIRDS.index(part) if part in _THIRDS else None
        stem = f"layers.{layer}.{_LAYER[part]}.{kind}"
        yield name, Place(stem, shape, ranks, _CUT.get((part, kind)), third, transposed=len(shape) == 2)


def most_ranks(spec: ModelSpec) -> int:
    """Into so many equal parts, of whole heads and inner units, can a model be cut, and into any divisor of that."""
    return gcd(spec.num_heads, spec.intermediate_size)
