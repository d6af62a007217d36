"""A tensor as a container describes it, before anybody knows whether it is used."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .mapped import MappedFile
from .spec import ModelError
from .weights import BLOCKS, DType, StoredTensor

DTYPES: dict[str, DType] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `stored` checks that it can be used. `dtype` is what safetensors calls it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: MappedFile
    offset: int
    nbytes: int

    def stored(self, name: str) -> StoredTensor:
        """The tensor under another name. Raises ModelError for a dtype or size that does not fit."""
        where = f"{self.file.path}: tensor {self.name!r}"
        if self.dtype not in DTYPES:
            raise ModelError(f"{where} is stored as {self.dtype}; supported: {', '.join(DTYPES)}")
        if not self.shape or 0 in self.shape:
            raise ModelError(f"{where} has the empty shape {list(self.shape)}")
        dtype = DTYPES[self.dtype]
        if self.nbytes != prod(self.shape) * BLOCKS[dtype][1]:
            raise ModelError(f"{where} takes {self.nbytes} bytes, wrong for {self.dtype} {list(self.shape)}")
        return StoredTensor(name, dtype, self.shape, self.file, self.offset, self.nbytes)
