"""The GGUF container: a header of typed keys, a list of tensors, and their data, memory-mapped.

The `gguf` library spends seconds and hundreds of megabytes on a tokenizer's vocabulary; this reader keeps to what
serving needs. Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .mapped import MappedFile
from .spec import ModelError
from .weights import BLOCKS, DType, StoredTensor

_SUPPORTED_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {  # value type: (struct code, NumPy dtype)
    0: ("<B", "<u1"),
    1: ("<b", "<i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<?", "?"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
_TENSOR_TYPES: dict[int, DType] = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 8: "q8_0", 9: "q8_1", 30: "bf16"}
_OTHER_TENSOR_TYPES = {
    6: "q5_0", 7: "q5_1", 10: "q2_K", 11: "q3_K", 12: "q4_K", 13: "q5_K", 14: "q6_K", 15: "q8_K",
    16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs",
    24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64", 29: "iq1_m", 34: "tq1_0", 35: "tq2_0", 39: "mxfp4",
}  # fmt: skip
_MAX_DIMS = 4
_MAX_NAME = 2**16 - 1
_SMALLEST_KEY = 8 + 4 + 1  # bytes: an empty name, a value type and a one-byte value
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8  # bytes: an empty name, one dimension, a type and an offset

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class GgufFile:
    """An opened GGUF file: `keys` by name (arrays as lists) and `tensors` in file order.

    Every count, length and offset is checked against the file's size before it is used. Raises ModelError, naming the
    file and the key or tensor at fault.
    """

    def __init__(self, path: Path) -> None:
        self._file = MappedFile(path)
        self._at = 0
        self.path = path
        magic = self._file.memory[:4]
        if magic != b"GGUF":
            raise ModelError(f"{path}: not a GGUF file: it starts with {magic!r} instead of b'GGUF'")
        self._at = 4
        version = self._u32("the version")
        if version & 0xFFFF == 0:
            raise ModelError(f"{path}: a big-endian GGUF file; supported: little-endian")
        if version not in _SUPPORTED_VERSIONS:
            raise ModelError(f"{path}: GGUF version {version} is not supported; supported: 2, 3")
        tensor_count = self._u64("the tensor count")
        key_count = self._u64("the key count")
        self._check_count("keys", key_count, _SMALLEST_KEY)
        self.keys: dict[str, Any] = {}
        for index in range(key_count):
            name = self._name(f"key {index}")
            if name in self.keys:
                raise ModelError(f"{path}: key {name!r} appears twice")
            self.keys[name] = self._value(name)
        self._check_count("tensors", tensor_count, _SMALLEST_TENSOR)
        infos = [self._tensor_info(index) for index in range(tensor_count)]
        self.tensors = self._locate(infos)

    def _fail(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: the file ends inside {what}: truncated or corrupt ({self._file.size} bytes)")

    def _take(self, size: int, what: str) -> int:
        """Step over `size` bytes; returns where they start."""
        start = self._at
        if size > self._file.size - start:
            raise self._fail(what)
        self._at = start + size
        return start

    def _u32(self, what: str) -> int:
        return int(_U32.unpack_from(self._file.memory, self._take(4, what))[0])

    def _u64(self, what: str) -> int:
        return int(_U64.unpack_from(self._file.memory, self._take(8, what))[0])

    def _check_count(self, things: str, count: int, smallest: int) -> None:
        if count > (self._file.size - self._at) // smallest:
            raise ModelError(f"{self.path}: {count} {things} cannot fit in {self._file.size} bytes: corrupt file")

    def _text(self, what: str) -> str:
        length = self._u64(what)
        start = self._take(length, what)
        try:
            return self._file.memory[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: {what} is not UTF-8: {error.reason}") from error

    def _name(self, what: str) -> str:
        name = self._text(f"the name of {what}")
        if len(name) > _MAX_NAME:
            raise ModelError(f"{self.path}: the name of {what} is longer than {_MAX_NAME} characters")
        return name

    def _value(self, key: str) -> Any:
        what = f"key {key!r}"
        kind = self._u32(what)
        if kind == _STRING:
            return self._text(what)
        if kind == _ARRAY:
            return self._array(what)
        if kind not in _SCALARS:
            raise ModelError(f"{self.path}: {what} has the unknown value type {kind}")
        code = _SCALARS[kind][0]
        return struct.unpack_from(code, self._file.memory, self._take(struct.calcsize(code), what))[0]

    def _array(self, what: str) -> Any:
        kind = self._u32(what)
        count = self._u64(what)
        if kind == _STRING:
            self._check_count(f"strings of {what}", count, _U64.size)
            return self._texts(what, count)
        if kind not in _SCALARS:
            raise ModelError(f"{self.path}: {what} is an array of value type {kind}; supported: numbers and strings")
        dtype = np.dtype(_SCALARS[kind][1])
        start = self._take(count * dtype.itemsize, what)
        return np.frombuffer(self._file.memory, dtype, count, start).tolist()

    def _texts(self, what: str, count: int) -> list[str]:
        # The one loop that runs a hundred thousand times: plain local variables, one check at a time.
        memory, size, at, unpack = self._file.memory, self._file.size, self._at, _U64.unpack_from
        texts = []
        try:
            for _ in range(count):
                if at + 8 > size:
                    raise self._fail(what)
                end = at + 8 + unpack(memory, at)[0]
                if end > size:
                    raise self._fail(what)
                texts.append(memory[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: string {len(texts)} of {what} is not UTF-8: {error.reason}") from error
        self._at = at
        return texts

    def _tensor_info(self, index: int) -> tuple[str, DType, tuple[int, ...], int]:
        """Name, dtype, row-major shape and offset into the data section."""
        name = self._name(f"tensor {index}")
        what = f"tensor {name!r}"
        dims = self._u32(what)
        if not 1 <= dims <= _MAX_DIMS:
            raise ModelError(f"{self.path}: {what} has {dims} dimensions; supported: 1 to {_MAX_DIMS}")
        shape = tuple(self._u64(what) for _ in range(dims))[::-1]
        kind = self._u32(what)
        offset = self._u64(what)
        if kind not in _TENSOR_TYPES:
            raise ModelError(
                f"{self.path}: {what} is stored as {_OTHER_TENSOR_TYPES.get(kind, f'type {kind}')}; "
                f"supported: {', '.join(sorted(_TENSOR_TYPES.values()))}"
            )
        return name, _TENSOR_TYPES[kind], shape, offset

    def _locate(self, infos: list[tuple[str, DType, tuple[int, ...], int]]) -> dict[str, StoredTensor]:
        alignment = self.keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ModelError(f"{self.path}: key 'general.alignment' must be a power of two, got {alignment!r}")
        data = -(-self._at // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, dtype, shape, offset in infos:
            block, size = BLOCKS[dtype]
            if name in tensors:
                raise ModelError(f"{self.path}: tensor {name!r} appears twice")
            if 0 in shape or shape[-1] % block:
                raise ModelError(f"{self.path}: tensor {name!r} has shape {list(shape)}, impossible for {dtype}")
            if offset % alignment:
                raise ModelError(f"{self.path}: tensor {name!r} at offset {offset} is not aligned to {alignment} bytes")
            nbytes = prod(shape) // block * size
            if data + offset + nbytes > self._file.size:
                raise ModelError(
                    f"{self.path}: tensor {name!r} ends at byte {data + offset + nbytes} of {self._file.size}: "
                    "truncated or corrupt"
                )
            tensors[name] = StoredTensor(name, dtype, shape, self._file, data + offset, nbytes)
        return dict(sorted(tensors.items(), key=lambda item: item[1].offset))
