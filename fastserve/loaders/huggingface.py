"""A model directory in Hugging Face layout: config.json, weights, and a tokenizer where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .entries import Entry
from .hf_config import read_spec
from .hf_names import recipe
from .safetensors import read_entries
from .settings import Settings
from .spec import ModelError, TokenizerData
from .text import read_json
from .tokenizer_files import read_tokenizer
from .torch_file import read_torch_entries
from .weights import StoredModel, Weights

# Where weights may be, best first: one file, and the index of several.
_WEIGHTS = {
    "model.safetensors": read_entries,
    "pytorch_model.bin": read_torch_entries,
}


class HuggingFaceModel(StoredModel):
    """A directory as a ModelSource. Raises ModelError for one that is incomplete or not supported."""

    def __init__(self, directory: Path, name: str | None = None) -> None:
        config, generation = directory / "config.json", directory / "generation_config.json"
        spec = read_spec(Settings(str(config), read_json(config)), Settings(str(generation), read_json(generation, {})))
        stored, recipes = [], {}
        for entry in _entries(directory):
            tensor, how = recipe(spec, entry.name)
            if how is not None:
                stored.append(entry.stored(tensor))
                recipes[tensor] = how
        super().__init__(name or directory.resolve().name, spec, Weights(spec, stored, recipes, (), str(directory)))
        self.directory = directory

    def tokenizer_data(self) -> TokenizerData | None:
        return read_tokenizer(self.directory)


def _entries(directory: Path) -> Iterator[Entry]:
    """The tensors of every weight file, file by file. safetensors wins where a directory has both kinds."""
    for name, read in _WEIGHTS.items():
        single, index = directory / name, directory / f"{name}.index.json"
        if single.is_file() or index.is_file():
            for file in [single] if single.is_file() else _indexed(index):
                yield from read(file)
            return
    raise ModelError(
        f"{directory}: no weights: neither {' nor '.join(_WEIGHTS)}, nor an index (….index.json) of either"
    )


def _indexed(index: Path) -> list[Path]:
    """The files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and name == Path(name).name for name in weight_map.values()
    ):
        raise ModelError(f"{index}: 'weight_map' must map tensor names to file names in the same directory")
    return [index.parent / name for name in sorted(set(weight_map.values()))]
