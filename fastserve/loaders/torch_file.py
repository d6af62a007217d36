"""`pytorch_model.bin`: what torch.save writes since 1.6, memory-mapped; read without torch, and without running code.

The file is a zip archive that compresses nothing: `ROOT/data.pkl` is a pickle of the state dict, in which each tensor
names its storage, and `ROOT/data/KEY` are the bytes of a storage. A pickle may call anything that can be imported; this
one may rebuild tensors and ordered dicts, and whatever else it asks for is refused by name.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from .entries import Entry
from .mapped import MappedFile
from .spec import ModelError

_DTYPES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
_ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, …, length of the name, length of the extra field
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # how files of torch before 1.6 begin
_MOST_DIMENSIONS = 8
_RESAVE = "save it again with torch 1.6 or later, or convert it to safetensors with transformers' save_pretrained"


class _Storage(NamedTuple):
    dtype: str
    key: str
    elements: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_entries(path: Path) -> list[Entry]:
    """The tensors of a state dict, in file order. Raises ModelError, naming the file and the tensor."""
    file = MappedFile(path)
    archive = _Archive(file)
    entries = [_entry(archive, name, tensor) for name, tensor in _state_dict(archive).items()]
    return sorted(entries, key=lambda entry: entry.offset)


class _Archive:
    """Where the members of a zip file are. Raises ModelError for a file that torch.save did not write."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.path = file.path
        if file.memory[: len(_LEGACY)] == _LEGACY:
            raise ModelError(f"{self.path}: written by torch before 1.6, a format that is not supported; {_RESAVE}")
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._members = {info.filename: info for info in archive.infolist()}
        except (zipfile.BadZipFile, ValueError, OSError, OverflowError, NotImplementedError, struct.error) as error:
            raise ModelError(f"{self.path}: not a file of torch.save, or cut short ({error}); {_RESAVE}") from error
        roots = [name.removesuffix("/data.pkl") for name in self._members if name.endswith("/data.pkl")]
        if len(roots) != 1 or f"{roots[0]}/constants.pkl" in self._members:
            raise ModelError(f"{self.path}: a zip archive, but no state dict that torch.save wrote; {_RESAVE}")
        self._root = roots[0]
        if f"{self._root}/byteorder" in self._members and bytes(self.read("byteorder")) != b"little":
            raise ModelError(f"{self.path}: written on a big-endian machine; supported: little-endian")

    def read(self, name: str) -> bytes:
        offset, size = self.locate(name)
        return self.file.memory[offset : offset + size]

    def locate(self, name: str) -> tuple[int, int]:
        """Offset in the file and size of a member, in bytes."""
        info = self._members.get(f"{self._root}/{name}")
        where = f"{self.path}: member {self._root}/{name}"
        if info is None:
            raise ModelError(f"{where} is missing: truncated or corrupt")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ModelError(f"{where} is compressed or encrypted, which torch.save never does; {_RESAVE}")
        header = info.header_offset
        if not 0 <= header <= self.file.size - _LOCAL_HEADER.size:
            raise ModelError(f"{where} lies outside of the file: truncated or corrupt")
        signature, name_length, extra_length = _LOCAL_HEADER.unpack_from(self.file.memory, header)
        offset = header + _LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\x03\x04" or offset + info.file_size > self.file.size:
            raise ModelError(f"{where} lies outside of the file: truncated or corrupt")
        return offset, info.file_size


def _state_dict(archive: _Archive) -> dict[str, _Tensor]:
    pickled = archive.read("data.pkl")
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            # The unpickler allocates as much as the highest index says.
            if opcode.name in ("PUT", "LONG_BINPUT") and isinstance(argument, int) and argument > len(pickled):
                raise ValueError(f"memo index {argument}")
        value = _Unpickler(archive.path, pickled).load()
    except ModelError:
        raise
    except Exception as error:  # a malformed pickle raises nearly anything
        raise ModelError(f"{archive.path}: its pickle is malformed ({error}): truncated or corrupt") from error
    if not isinstance(value, dict):
        raise ModelError(f"{archive.path}: holds a {type(value).__name__}, not a state dict of tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise ModelError(
                f"{archive.path}: holds {type(tensor).__name__} {name!r}, not only tensors by name; "
                "save the model's state_dict() alone"
            )
    return value


class _Unpickler(pickle.Unpickler):
    """Rebuilds descriptions of tensors and dicts of them. Raises ModelError for anything else, naming it."""

    def __init__(self, path: Path, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled), encoding="utf-8")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        found = _ALLOWED.get((module, name))
        if found is None:
            raise ModelError(
                f"{self._path}: its pickle asks for {module}.{name}, which is not part of a state dict of tensors and "
                "could run code: refused; convert it to safetensors where you trust it"
            )
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(dtype), str(key), _, int(elements)) if dtype in _ITEM_SIZES and elements >= 0:
                return _Storage(dtype, key, elements)
        raise ModelError(f"{self._path}: its pickle refers to {pid!r:.100}, which is no storage of a tensor")


class _RebuildTensor:
    """Stands for torch._utils._rebuild_tensor_v2. Without slots of its own, a pickle cannot change it."""

    __slots__: ClassVar[tuple[str, ...]] = ()

    def __call__(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
    ) -> _Tensor:
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError("a tensor's storage, offset, shape or strides")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter:
    """Stands for torch._utils._rebuild_parameter: a parameter is its tensor."""

    __slots__: ClassVar[tuple[str, ...]] = ()

    def __call__(self, data: Any, requires_grad: Any, hooks: Any) -> Any:
        return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
}


def _entry(archive: _Archive, name: str, tensor: _Tensor) -> Entry:
    where = f"{archive.path}: tensor {name!r}"
    storage, shape = tensor.storage, tensor.shape
    if len(shape) > _MOST_DIMENSIONS:
        raise ModelError(f"{where} has {len(shape)} dimensions; those of a model have at most {_MOST_DIMENSIONS}")
    expected = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    given = zip(shape, tensor.strides, expected, strict=False)
    if len(tensor.strides) != len(shape) or any(size > 1 and stride != row for size, stride, row in given):
        raise ModelError(
            f"{where} of shape {list(shape)} is stored with strides {list(tensor.strides)}, not row by row; "
            "call contiguous() on it and save it again"
        )
    item = _ITEM_SIZES[storage.dtype]
    start, size = archive.locate(f"data/{storage.key}")
    elements = prod(shape)
    if tensor.offset + elements > storage.elements or storage.elements * item > size:
        raise ModelError(
            f"{where} takes elements {tensor.offset} to {tensor.offset + elements} of a storage of {storage.elements} "
            f"in {size} bytes: truncated or corrupt"
        )
    offset = start + tensor.offset * item
    if offset % item:
        raise ModelError(f"{where} is not aligned to its elements, as torch.save aligns them; {_RESAVE}")
    return Entry(name, storage.dtype, shape, archive.file, offset, elements * item)
