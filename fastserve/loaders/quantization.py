"""How the runtime holds weight matrices: in the blocks of their file, as int8, or in the type of computation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod

from .spec import ModelSource, ModelSpec
from .weights import tensor_shapes

_KEPT = {"q8_0": "q8_0", "q8_1": "q8_0", "q4_0": "q4_0", "q4_1": "q4_1"}
_BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.0, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5.0}
_SCALE_BYTES = 4  # of each output, in int8


def weight_formats(source: ModelSource, dtype: str, quantization: str) -> dict[str, str]:
    """The format of every weight matrix, by canonical name. Matrices that are computed as one have one format.

    auto: as the file has them, where it quantizes them and the type of computation is not float32.
    """
    spec, stored = source.spec, source.dtypes
    names = [name for name, shape in tensor_shapes(spec) if len(shape) == 2]
    if quantization == "int8":
        # Learned positions are only ever looked up: nothing would be faster.
        formats = {name: dtype if name == "position_embedding.weight" else "int8" for name in names}
    elif quantization == "auto" and dtype != "float32":
        formats = {name: _KEPT.get(stored[name], dtype) for name in names}
    else:
        formats = dict.fromkeys(names, dtype)
    for parts in _joined(spec):
        if len({formats[part] for part in parts}) > 1:
            formats |= dict.fromkeys(parts, dtype)
    return formats


def _joined(spec: ModelSpec) -> Iterable[list[str]]:
    """Parts of one matrix."""
    for layer in range(spec.num_layers):
        for parts in ("qkv", ("gate", "up") if spec.gated_mlp else ("up",)):
            yield [f"layers.{layer}.{part}.weight" for part in parts]


def format_bytes(source: ModelSource, dtype: str, quantization: str) -> dict[str, int]:
    """Bytes of the matrices of each format, without what rounds them up to whole vectors."""
    formats = weight_formats(source, dtype, quantization)
    sizes: Counter[str] = Counter()
    for name, shape in tensor_shapes(source.spec):
        if name in formats:
            scales = shape[0] * _SCALE_BYTES if formats[name] == "int8" else 0
            sizes[formats[name]] += int(prod(shape) * _BITS[formats[name]] / 8) + scales
    return dict(sizes)
