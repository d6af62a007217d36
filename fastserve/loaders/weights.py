"""From the tensors of a file to canonical ones: rename, split, reorder.

Every layout this module undoes moves whole rows, so it works on raw rows of bytes and block-quantized weights pass
through untouched. The one exception, GPT-2's transposed matrices, exists only in unquantized files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .spec import ModelError, ModelSpec, WeightTensor

DType = Literal["f32", "f16", "bf16", "q8_0", "q8_1", "q4_0", "q4_1"]
Order = Literal["concat", "heads", "interleaved"]
Rows = npt.NDArray[np.uint8]  # [rows, bytes of a row]

# dtype: (elements of a block, bytes of a block)
BLOCKS: dict[DType, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q8_1": (32, 36),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
}


_RUN = 16  # tensors in a row that samples are taken of: more than a layer has in most files
_SAMPLE = 1024  # bytes


class Storage(Protocol):
    """Bytes to read from: a memory map, or the memory of somebody else's tensor."""

    def view(self, offset: int, length: int) -> npt.NDArray[np.uint8]:
        """The bytes [offset, offset + length)."""

    def release(self, offset: int, length: int) -> None:
        """Those need not stay resident."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor where it lies in a file. Its shape is row-major: a matrix is [rows, columns]."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Storage
    offset: int
    nbytes: int


class Recipe(NamedTuple):
    """How one stored tensor becomes canonical ones.

    concat: the rows of the outputs, one after the other; heads: q, k and v of head 0, of head 1, … (GPT-NeoX);
    interleaved: within each head, row 2i holds row i of the first half and row 2i + 1 of the second (GGUF's Llama).
    """

    outputs: tuple[str, ...]
    order: Order = "concat"
    transposed: bool = False  # stored as [inputs, outputs]

    @property
    def in_place(self) -> bool:
        """Whether the outputs lie in the file as they are."""
        return self.order == "concat" and not self.transposed


def tensor_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Canonical name and shape of every tensor a model of this shape has. See WeightTensor."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (hidden,)
        if spec.norm == "layer":
            yield f"{name}.bias", (hidden,)

    def linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (rows, columns)
        if bias:
            yield f"{name}.bias", (rows,)

    yield "token_embedding.weight", (spec.vocab_size, hidden)
    if not spec.rope_inv_freq:
        yield "position_embedding.weight", (spec.max_position + spec.position_offset, hidden)
    for layer in range(spec.num_layers):
        at = f"layers.{layer}"
        yield from norm(f"{at}.attn_norm")
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            yield from linear(f"{at}.{name}", rows, hidden, spec.qkv_bias)
        if spec.qk_norm:
            yield f"{at}.q_norm.weight", (spec.head_dim,)
            yield f"{at}.k_norm.weight", (spec.head_dim,)
        yield from linear(f"{at}.o", hidden, q_rows, spec.out_bias)
        yield from norm(f"{at}.mlp_norm")
        if spec.gated_mlp:
            yield from linear(f"{at}.gate", inner, hidden, spec.mlp_bias)
        yield from linear(f"{at}.up", inner, hidden, spec.mlp_bias)
        yield from linear(f"{at}.down", hidden, inner, spec.mlp_bias)
    yield from norm("final_norm")
    if not spec.tied_embeddings:
        yield "lm_head.weight", (spec.vocab_size, hidden)


def spread(count: int) -> list[int]:
    """The places of `count` tensors that samples are taken of: some at the begin, in the middle and at the end.

    They are consecutive there, so that every kind of tensor is among them: fine-tuning may have changed a few kinds.
    """
    if count <= 3 * _RUN:
        return list(range(count))
    middle = (count - _RUN) // 2
    return [*range(_RUN), *range(middle, middle + _RUN), *range(count - _RUN, count)]


def sample(file: Storage, offset: int, nbytes: int) -> bytes:
    """What lies in the middle of so many bytes."""
    length = min(_SAMPLE, nbytes)
    start = offset + (nbytes - length) // 2 // 4 * 4  # where elements of all dtypes of a module begin
    taken = file.view(start, length).tobytes()
    file.release(start, length)
    return taken


class Weights:
    """The tensors of a model, checked against its spec before any is read.

    Raises ModelError for a tensor that is missing, has another shape than the spec demands, or would go unused: a
    tensor nobody reads is a part of the model that this program does not know.
    """

    def __init__(
        self,
        spec: ModelSpec,
        stored: Collection[StoredTensor],
        recipes: Mapping[str, Recipe],
        ignored: Collection[str],
        where: str,
    ) -> None:
        self._spec = spec
        self._recipes = recipes
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._stored = [tensor for tensor in stored if tensor.name not in ignored]
        by_name = {tensor.name: tensor for tensor in self._stored}
        source = {output: name for name, recipe in recipes.items() for output in recipe.outputs}
        for output, shape in tensor_shapes(spec):
            if source.get(output) not in by_name:
                raise ModelError(f"{where}: tensor {source.get(output, output)!r} is missing")
            self._shapes[output] = shape
        for tensor in self._stored:
            self._check(tensor, where)

    def _check(self, tensor: StoredTensor, where: str) -> None:
        recipe = self._recipes.get(tensor.name)
        if recipe is None or not all(output in self._shapes for output in recipe.outputs):
            raise ModelError(
                f"{where}: tensor {tensor.name!r} is no part of a {self._spec.family} model as this version knows it"
            )
        shapes = [self._shapes[output] for output in recipe.outputs]
        expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if recipe.transposed:
            expected = expected[::-1]
        if tensor.shape != expected:
            raise ModelError(f"{where}: tensor {tensor.name!r} has shape {list(tensor.shape)}, not {list(expected)}")
        if recipe.transposed and BLOCKS[tensor.dtype][0] > 1:
            raise ModelError(f"{where}: tensor {tensor.name!r} is {tensor.dtype}; supported here: f32, f16, bf16")

    @property
    def num_parameters(self) -> int:
        return sum(prod(shape) for shape in self._shapes.values())

    @property
    def dtype(self) -> str:
        """The dtype of most elements."""
        elements: Counter[str] = Counter()
        for tensor in self._stored:
            elements[tensor.dtype] += prod(tensor.shape)
        return elements.most_common(1)[0][0]

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype each tensor is stored in, by canonical name."""
        return {output: tensor.dtype for tensor in self._stored for output in self._recipes[tensor.name].outputs}

    def samples(self) -> Iterator[bytes]:
        """See ModelSource."""
        for tensor in (self._stored[place] for place in spread(len(self._stored))):
            yield sample(tensor.file, tensor.offset, tensor.nbytes)

    def __iter__(self) -> Iterator[WeightTensor]:
        """Canonical tensors in file order; the pages of each are given back once the next is asked for."""
        for tensor in self._stored:
            recipe = self._recipes[tensor.name]
            offset = tensor.offset
            for name, rows in zip(recipe.outputs, self._pieces(tensor, recipe), strict=True):
                release = partial(tensor.file.release, offset) if recipe.in_place else None
                yield WeightTensor(name, tensor.dtype, self._shapes[name], rows.reshape(-1), release)
                offset += rows.nbytes
            tensor.file.release(tensor.offset, tensor.nbytes)

    def _pieces(self, tensor: StoredTensor, recipe: Recipe) -> list[Rows]:
        data = tensor.file.view(tensor.offset, tensor.nbytes)
        if recipe.transposed and len(tensor.shape) == 2:
            item = data.view(f"u{BLOCKS[tensor.dtype][1]}").reshape(tensor.shape)
            rows = np.ascontiguousarray(item.T).view(np.uint8)
        else:
            rows = data.reshape(tensor.shape[0], -1)
        if recipe.order == "heads":
            by_head = rows.reshape(self._spec.num_heads, 3, self._spec.head_dim, -1)
            return [np.ascontiguousarray(by_head[:, part]) for part in range(3)]
        if recipe.order == "interleaved":
            pairs = rows.reshape(-1, self._spec.head_dim // 2, 2, rows.shape[1])
            return [np.ascontiguousarray(pairs.swapaxes(1, 2))]
        ends = np.cumsum([self._shapes[output][0] for output in recipe.outputs])[:-1]
        return np.split(rows, ends)


class StoredModel:
    """What sources have in common whose tensors are stored one by one."""

    def __init__(self, name: str, spec: ModelSpec, weights: Weights) -> None:
        self.name = name
        self.spec = spec
        self._weights = weights

    @property
    def weights_dtype(self) -> str:
        return self._weights.dtype

    @property
    def dtypes(self) -> Mapping[str, str]:
        return self._weights.dtypes

    @property
    def num_parameters(self) -> int:
        return self._weights.num_parameters

    def tensors(self) -> Iterator[WeightTensor]:
        return iter(self._weights)

    def samples(self) -> Iterator[bytes]:
        return self._weights.samples()
