"""The safetensors container, memory-mapped: eight bytes of header length, a JSON header, the data.

The `safetensors` library hands out NumPy arrays and NumPy has no bfloat16, so this reads the header itself and leaves
the bytes as they are. Format: github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .entries import Entry
from .mapped import MappedFile
from .spec import ModelError

_MAX_HEADER = 100_000_000  # bytes, the format's own limit


def read_entries(path: Path) -> list[Entry]:
    """The tensors of a safetensors file, in file order. Raises ModelError, naming the file and the tensor."""
    file = MappedFile(path)
    length = int.from_bytes(file.memory[:8], "little")
    if file.size < 8 or length > min(file.size - 8, _MAX_HEADER):
        raise ModelError(f"{path}: the file ends inside its header: truncated, corrupt or not safetensors")
    try:
        header = json.loads(file.memory[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: the header is not JSON: corrupt or not safetensors") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the header is not a JSON object: corrupt or not safetensors")
    header.pop("__metadata__", None)
    entries = [_entry(file, 8 + length, name, fields) for name, fields in header.items()]
    return sorted(entries, key=lambda entry: entry.offset)


def _entry(file: MappedFile, data: int, name: str, fields: Any) -> Entry:
    where = f"{file.path}: tensor {name!r}"
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            raise ModelError(f"{where} has a malformed header entry")
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ModelError(f"{where} has a malformed shape")
    if not 0 <= start <= end <= file.size - data:
        raise ModelError(f"{where} spans bytes {start} to {end} of {file.size - data}: truncated or corrupt")
    return Entry(name, dtype, tuple(shape), file, data + start, end - start)
