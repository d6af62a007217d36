"""Models written as FasterTransformer GPT checkpoints, cut for a number of tensor-parallel ranks."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from .config import check_integer
from .loaders.fastertransformer import FasterTransformerModel
from .loaders.floats import BITS, ITEM_SIZES, FloatType
from .loaders.floats import cast as cast_bits
from .loaders.ft_config import DATA_TYPES, activation_type, config_text
from .loaders.ft_layout import CONFIG, SECTION, most_ranks, places
from .loaders.huggingface import HuggingFaceModel
from .loaders.spec import ModelError, ModelSource, ModelSpec, WeightTensor
from .loaders.tokenizer_files import TOKENIZER_FILES
from .types import InvalidRequest

FAMILIES = ("gpt2", "opt")
_MAX_RANKS = 1024
_SLICE_BYTES = 16 * 2**20  # of a tensor, converted at a time
_WEIGHT_FILES = "model.*.bin"
_STAGING = ".convert-"


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    model: str
    directory: str
    family: str
    tensor_parallel_size: int
    dtype: str  # fp32, fp16 or bf16
    files: int  # of weights
    bytes: int  # of these
    tokenizer_files: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokenizer_files": list(self.tokenizer_files)}


def convert(
    source: ModelSource,
    directory: Path,
    *,
    tensor_parallel_size: int = 1,
    dtype: str | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write GPT-2 or OPT as `config.ini`, `model.*.bin` and the tokenizer's files.

    `source` is a directory in Hugging Face layout, or another FasterTransformer checkpoint, to be cut anew. `dtype` is
    fp32, fp16 or bf16; None: what most weights are stored in. A directory that holds anything is an error unless
    `force`: then a checkpoint in it is replaced. `on_progress` hears how many bytes of how many have been written.

    Needs memory for one matrix. Files are written to a folder within `directory` and take their places when all are
    there, the config last: what looks like a checkpoint is one, and an old one stays until then. Raises InvalidRequest,
    naming the parameter, before anything is written; ModelError for a model that this layout cannot hold; OSError where
    the disk fails or is full.
    """
    ranks = check_integer("tensor_parallel_size", tensor_parallel_size, 1, _MAX_RANKS)
    origin = _origin(source)
    target = _target_spec(source)
    _check_ranks(target, ranks)
    data_type = _data_type(dtype, source)
    _prepare(directory, origin, force)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=directory))
    claim = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(claim, fcntl.LOCK_EX)
        weights = _Files(staging, target, ranks, DATA_TYPES[data_type])
        weights.create()
        written = 0
        for tensor in source.tensors():
            for size in weights.write(tensor, source.spec.position_offset):
                written += size
                if on_progress is not None:
                    on_progress(written, weights.total_bytes)
        copied = tuple(name for name in TOKENIZER_FILES if (origin / name).is_file())
        for name in copied:
            shutil.copyfile(origin / name, staging / name)
        (staging / CONFIG).write_text(config_text(target, data_type, ranks), encoding="utf-8")
        _replace(directory, staging)
    finally:
        os.close(claim)
        shutil.rmtree(staging, ignore_errors=True)
    return Conversion(
        model=source.name,
        directory=str(directory),
        family=target.family,
        tensor_parallel_size=ranks,
        dtype=data_type,
        files=weights.count,
        bytes=weights.total_bytes,
        tokenizer_files=copied,
    )


def _origin(source: ModelSource) -> Path:
    whole = not isinstance(source, FasterTransformerModel) or source.rank is None
    if not isinstance(source, (HuggingFaceModel, FasterTransformerModel)) or not whole:
        raise ModelError(
            f"{source.name}: cannot be converted; use a directory in Hugging Face layout, a hub id, or a "
            "FasterTransformer checkpoint to be cut anew"
        )
    return source.directory


def _target_spec(source: ModelSource) -> ModelSpec:
    """The model as ParallelGpt knows it: no rows before position 0, and every bias there, zero if it has to be."""
    spec = source.spec
    if spec.family not in FAMILIES:
        raise ModelError(
            f"{source.name}: FasterTransformer's GPT layout holds GPT-2 and OPT, and this is {spec.family}; FastServe "
            f"serves its Hugging Face directory directly: fastserve serve --model {source.name}"
        )
    if activation_type(spec) is None:
        raise ModelError(
            f"{source.name}: FasterTransformer's GPT has no activation {spec.activation!r} (its Gelu is the tanh "
            "approximation); serve the Hugging Face directory directly"
        )
    return replace(spec, position_offset=0, qkv_bias=True, out_bias=True, mlp_bias=True)


def _check_ranks(spec: ModelSpec, ranks: int) -> None:
    most = most_ranks(spec)
    if most % ranks:
        raise InvalidRequest(
            "tensor_parallel_size",
            f"must divide {most}, which {spec.num_heads} attention heads and {spec.intermediate_size} units of the "
            f"feed-forward layers have in common; got {ranks}",
        )


def _data_type(asked: str | None, source: ModelSource) -> str:
    if asked is None:
        return next(name for name, kind in DATA_TYPES.items() if kind == source.weights_dtype)
    if asked not in DATA_TYPES:
        raise InvalidRequest("dtype", f"must be one of {', '.join(DATA_TYPES)}, got {asked!r}")
    return asked


def _prepare(directory: Path, origin: Path, force: bool) -> None:
    """Make the directory. Raises InvalidRequest for one that holds what must not be lost."""
    if directory.exists() and not directory.is_dir():
        raise InvalidRequest("directory", f"{directory} is a file; name a directory to be made")
    if directory.is_dir():
        _remove_abandoned(directory)
    if directory.is_dir() and any(directory.iterdir()):
        if directory.samefile(origin):
            raise InvalidRequest("directory", f"{directory} is the model that is read; name another")
        if not force:
            raise InvalidRequest("directory", f"{directory} is not empty; name another, or give --force")
        if (directory / "config.json").exists():
            raise InvalidRequest("directory", f"{directory} holds another model (config.json); name another")
        if (name := _of_others(directory)) is not None:
            raise InvalidRequest(
                "directory", f"{directory} holds {name}, and no checkpoint that it belongs to; name another"
            )
    directory.mkdir(parents=True, exist_ok=True)


def _remove_abandoned(directory: Path) -> None:
    """What runs that were killed have left behind. Those under way hold their folders."""
    for folder in directory.glob(f"{_STAGING}*"):
        claim = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        except BlockingIOError:
            pass
        finally:
            os.close(claim)


def _of_others(directory: Path) -> str | None:
    """A file that a checkpoint would take the place of, where there is no checkpoint that it may be of."""
    config = directory / CONFIG
    if config.is_file() and f"[{SECTION}]" in config.read_text(encoding="utf-8", errors="replace"):
        return None
    taken = [config, *directory.glob(_WEIGHT_FILES), *(directory / name for name in TOKENIZER_FILES)]
    return next((path.name for path in taken if path.exists()), None)


def _replace(directory: Path, staging: Path) -> None:
    """Put new files where old ones are. Without a config, nobody takes what is there meanwhile for a checkpoint."""
    old = [directory / CONFIG, *directory.glob(_WEIGHT_FILES), *(directory / name for name in TOKENIZER_FILES)]
    for path in old:
        path.unlink(missing_ok=True)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG):
        path.rename(directory / path.name)


class _Files:
    """The weight files of a checkpoint: all made at their full size, then filled tensor by tensor, in any order."""

    def __init__(self, directory: Path, spec: ModelSpec, ranks: int, dtype: FloatType) -> None:
        self._directory = directory
        self._dtype = dtype
        self._places = dict(places(spec, ranks))
        self._sizes = {
            place.file(directory, rank): place.file_elements * ITEM_SIZES[dtype]
            for place in self._places.values()
            for rank in place.shards
        }
        self.count = len(self._sizes)
        self.total_bytes = sum(self._sizes.values())

    def create(self) -> None:
        """Zeros on the disk, so that writing to the memory map of a file cannot run out of it."""
        for path, size in self._sizes.items():
            with path.open("xb") as file:
                try:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)
                    else:
                        file.truncate(size)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(path)) from error

    def write(self, tensor: WeightTensor, position_offset: int) -> Iterator[int]:
        """Put a tensor where it belongs; yields how many bytes were written, slice by slice. Raises ModelError."""
        place = self._places[tensor.name]
        stored = cast(FloatType, tensor.dtype)  # files that are converted hold no blocks
        values = tensor.data.view(BITS[stored]).reshape(tensor.shape)
        if tensor.name == "position_embedding.weight":
            values = values[position_offset:]
        for rank in place.shards:
            content = np.memmap(place.file(self._directory, rank), BITS[self._dtype], "r+")
            yield from self._fill(tensor.name, place.view(content), values[place.index(rank)], stored)

    def _fill(self, name: str, target: Any, values: Any, stored: FloatType) -> Iterator[int]:
        rows = max(1, _SLICE_BYTES * len(values) // max(1, values.nbytes))
        for first in range(0, len(values), rows):
            part = slice(first, first + rows)
            try:
                target[part] = cast_bits(values[part], stored, self._dtype)
            except OverflowError as error:
                raise ModelError(f"tensor {name!r} holds {error}; convert to bf16 or fp32") from error
            yield target[part].nbytes
