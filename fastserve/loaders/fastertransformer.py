"""A FasterTransformer GPT checkpoint as a ModelSource: put together, or one rank's shard of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from ..types import InvalidRequest
from .floats import BITS, ITEM_SIZES, Bits
from .ft_config import read_config
from .ft_layout import CONFIG, SECTION, Place, most_ranks, places
from .mapped import MappedFile
from .spec import ModelError, TokenizerData, WeightTensor
from .tokenizer_files import read_tokenizer
from .weights import sample, spread, tensor_shapes


class FasterTransformerModel:
    """A directory with `config.ini` and `model.*.bin`, cut for `tensor_parallel_size` ranks, as a ModelSource.

    Without `rank`, `tensors` puts the shards of all ranks together, one tensor at a time. With it, they are that rank's
    alone, in the shapes that rank holds: whole tensors where all ranks have them, else equal parts, of Q, K, V and `up`
    rows, of `o` and `down` columns. Then files of other ranks are not looked at and need not be there.

    `spec`, `dtypes` and `num_parameters` are the whole model's in any case. Every file is checked before any is read:
    raises ModelError, naming the file and what was expected, and InvalidRequest for a rank that the checkpoint lacks.
    """

    def __init__(self, directory: Path, *, rank: int | None = None) -> None:
        self.name = directory.resolve().name
        self.directory = directory
        self.rank = rank
        config = read_config(directory)
        self._dtype = config.data_type
        # As FasterTransformer decides it.
        tied = not (directory / "model.lm_head.weight.bin").is_file()
        self.spec = replace(config.spec, tied_embeddings=tied)
        self.tensor_parallel_size = config.ranks or self._count_ranks()
        most = most_ranks(self.spec)
        if most % self.tensor_parallel_size:
            raise ModelError(
                f"{directory / CONFIG}: head_num {self.spec.num_heads} and inter_size {self.spec.intermediate_size} "
                f"cannot be cut for {self.tensor_parallel_size} ranks; possible: divisors of {most}"
            )
        if rank is not None and not 0 <= rank < self.tensor_parallel_size:
            raise InvalidRequest("rank", f"must be 0 to {self.tensor_parallel_size - 1} for {directory}, got {rank}")
        self._check()

    @property
    def weights_dtype(self) -> str:
        return self._dtype

    @property
    def dtypes(self) -> Mapping[str, str]:
        return {name: self._dtype for name, _ in tensor_shapes(self.spec)}

    @property
    def num_parameters(self) -> int:
        return sum(prod(shape) for _, shape in tensor_shapes(self.spec))

    def tensors(self) -> Iterator[WeightTensor]:
        """Every tensor once, layer by layer. With `rank`, in that rank's shapes and from its files alone."""
        readers = Counter(place.stem for _, place in self._places())  # of each file
        files: dict[Path, MappedFile] = {}
        for name, place in self._places():
            paths = [place.file(self.directory, rank) for rank in self._shards(place)]
            for path in paths:
                if path not in files:
                    files[path] = self._open(path, place)
            mapped = [files[path] for path in paths]
            if self.rank is not None or place.axis is None:
                yield self._whole(name, place, mapped[0])
            else:
                yield self._joined(name, place, mapped)
            readers[place.stem] -= 1
            if not readers[place.stem]:
                for path in paths:
                    del files[path]  # unmapped with its last view

    def samples(self) -> Iterator[bytes]:
        """Of what is cut for several ranks, the first one's part, or that of `rank`."""
        all_places = list(self._places())
        for _, place in (all_places[number] for number in spread(len(all_places))):
            file = self._open(place.file(self.directory, self._shards(place)[0]), place)
            yield sample(file, 0, file.size)

    def tokenizer_data(self) -> TokenizerData | None:
        return read_tokenizer(self.directory)

    def _places(self) -> Iterator[tuple[str, Place]]:
        return places(self.spec, self.tensor_parallel_size)

    def _shards(self, place: Place) -> list[int]:
        """The ranks whose files are read."""
        return list(place.shards) if self.rank is None or place.axis is None else [self.rank]

    def _whole(self, name: str, place: Place, file: MappedFile) -> WeightTensor:
        """All of a tensor that there is to read, from one file."""
        content = file.view(0, file.size)
        if place.third is None and not place.transposed:
            return WeightTensor(name, self._dtype, place.shard_shape, content, partial(file.release, 0))
        part = np.ascontiguousarray(place.view(content.view(BITS[self._dtype])))
        return WeightTensor(name, self._dtype, place.shard_shape, part.view(np.uint8).reshape(-1))

    def _joined(self, name: str, place: Place, files: list[MappedFile]) -> WeightTensor:
        whole: Bits = np.empty(place.shape, BITS[self._dtype])
        for rank, file in zip(place.shards, files, strict=True):
            whole[place.index(rank)] = place.view(file.view(0, file.size).view(whole.dtype))
            file.release(0, file.size)
        return WeightTensor(name, self._dtype, place.shape, whole.view(np.uint8).reshape(-1))

    def _open(self, path: Path, place: Place) -> MappedFile:
        file = MappedFile(path)
        self._check_size(path, file.size, place)
        return file

    # --- Checks ------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """That every file is there, as large as the config says, and that there is no file it knows nothing of."""
        for _, place in self._places():
            for rank in self._shards(place):
                path = place.file(self.directory, rank)
                self._check_size(path, self._size(path), place)
            if self.rank is None and place.axis is not None:
                self._check_absent(place.file(self.directory, place.ranks), f"tensor_para_size is {place.ranks}")
        layer = self.spec.num_layers
        beyond = self.directory / f"model.layers.{layer}.input_layernorm.weight.bin"
        self._check_absent(beyond, f"num_layer is {layer}")

    def _size(self, path: Path) -> int:
        try:
            return os.stat(path).st_size
        except OSError as error:
            raise ModelError(
                f"{path}: {error.strerror or error}; {self.directory / CONFIG} asks for it "
                f"(num_layer {self.spec.num_layers}, tensor_para_size {self.tensor_parallel_size})"
            ) from error

    def _check_size(self, path: Path, size: int, place: Place) -> None:
        expected = place.file_elements * ITEM_SIZES[self._dtype]
        if size != expected:
            shape = list(place.shard_shape[::-1] if place.transposed else place.shard_shape)
            if place.third is not None:
                shape.insert(-1, 3)
            raise ModelError(
                f"{path}: {size} bytes, not the {expected} of {shape} in {self._dtype} that {CONFIG} asks for"
            )

    def _check_absent(self, path: Path, said: str) -> None:
        if path.exists():
            raise ModelError(f"{self.directory / CONFIG}: {said}, and {path.name} is there: one of them is wrong")

    def _count_ranks(self) -> int:
        """From the size of a shard, where the config does not tell."""
        path = self.directory / f"model.layers.0.attention.query_key_value.weight.{self.rank or 0}.bin"
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise ModelError(
                f"{path}: {error.strerror or error}; every GPT checkpoint has it, and without tensor_para_size in "
                f"[{SECTION}] of {CONFIG} its size tells how many ranks there are"
            ) from error
        whole = 3 * self.spec.hidden_size**2 * ITEM_SIZES[self._dtype]
        if not size or whole % size:
            raise ModelError(f"{path}: {size} bytes, not {whole} divided by the number of ranks, as {CONFIG} asks for")
        return whole // size
