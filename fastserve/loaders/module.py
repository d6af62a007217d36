"""A `transformers` module as a ModelSource: its config and, over DLPack, its weights. torch is not imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..types import InvalidRequest
from .entries import DTYPES
from .hf_config import read_spec
from .hf_names import recipe
from .settings import Settings
from .spec import ModelError, ModelSpec, TokenizerData
from .weights import BLOCKS, StoredModel, StoredTensor, Weights

_SAFETENSORS_NAMES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
_EMBEDDING, _HEAD = "token_embedding.weight", "lm_head.weight"


def is_module(model: Any) -> bool:
    """Whether it has what every model of `transformers` has: a config and a state dict."""
    config = getattr(model, "config", None)
    # A class has these as well, but nothing to call them on.
    return (
        not isinstance(model, type)
        and callable(getattr(model, "state_dict", None))
        and callable(getattr(config, "to_dict", None))
    )


class ModuleModel(StoredModel):
    """A module that lives in this process. It is read while the engine loads, and not referred to afterwards.

    Weights may be on any device; those elsewhere than in host memory are copied there one tensor at a time. Raises
    InvalidRequest for an object that is no such module, and ModelError for a family, dtype or setting that is not
    supported.
    """

    def __init__(self, module: Any) -> None:
        if not is_module(module):
            raise InvalidRequest(
                "model", f"must be a model of transformers, with its config and weights, got {module!r:.80}"
            )
        kind = type(module).__name__
        generation = getattr(module, "generation_config", None)
        spec = read_spec(
            Settings(f"{kind}.config", _as_dict(module.config)),
            Settings(f"{kind}.generation_config", {} if generation is None else _as_dict(generation)),
        )
        tensors: Mapping[str, Any] = module.state_dict()
        spec = _untied(spec, tensors)
        stored, recipes = [], {}
        for name, tensor in tensors.items():
            canonical, how = recipe(spec, name)
            if how is not None:
                stored.append(_stored(f"{kind}: tensor {name!r}", canonical, tensor))
                recipes[canonical] = how
        path = getattr(module.config, "_name_or_path", "") or kind
        super().__init__(str(path), spec, Weights(spec, stored, recipes, (), kind))

    def tokenizer_data(self) -> TokenizerData | None:
        """A module brings none."""
        return None


def _as_dict(config: Any) -> dict[str, Any]:
    values = config.to_dict()
    if not isinstance(values, dict):
        raise InvalidRequest("model", f"must be a model of transformers; its config is {values!r:.80}")
    return values


def _untied(spec: ModelSpec, tensors: Mapping[str, Any]) -> ModelSpec:
    """What a config says of tied embeddings holds for files; in a module the head is what it is."""
    if not spec.tied_embeddings:
        return spec
    own = replace(spec, tied_embeddings=False)
    found = {outputs[0]: tensor for name, tensor in tensors.items() if (outputs := _outputs(own, name))}
    if _HEAD not in found or _EMBEDDING not in found or _address(found[_HEAD]) == _address(found[_EMBEDDING]):
        return spec
    return own


def _outputs(spec: ModelSpec, name: str) -> tuple[str, ...]:
    how = recipe(spec, name)[1]
    return () if how is None else how.outputs


def _address(tensor: Any) -> Any:
    return tensor.data_ptr(), str(getattr(tensor, "device", ""))


def _stored(where: str, name: str, tensor: Any) -> StoredTensor:
    if not hasattr(tensor, "__dlpack__"):
        raise InvalidRequest("model", f"must be a model of transformers; {where} is {type(tensor).__name__}, no tensor")
    dtype = _SAFETENSORS_NAMES.get(str(tensor.dtype))
    if dtype is None:
        raise ModelError(f"{where} is {tensor.dtype}; supported: {', '.join(_SAFETENSORS_NAMES)}")
    if str(tensor.device) == "meta":
        raise ModelError(f"{where} has no data (device meta): load the whole model before serving it")
    shape = tuple(int(size) for size in tensor.shape)
    if not shape or 0 in shape:
        raise ModelError(f"{where} has the empty shape {list(shape)}")
    nbytes = int(np.prod(shape)) * BLOCKS[DTYPES[dtype]][1]
    return StoredTensor(name, DTYPES[dtype], shape, _TensorMemory(tensor), 0, nbytes)


class _TensorMemory:
    """The bytes of somebody else's tensor, row by row."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def view(self, offset: int, length: int) -> npt.NDArray[np.uint8]:
        tensor = self._tensor.detach().cpu().contiguous()
        if str(tensor.dtype) == "torch.bfloat16":
            # NumPy has no such type. What torch calls int16 is asked of the tensor, as torch is not imported.
            tensor = tensor.view(tensor.new_empty(0).short().dtype)
        return np.from_dlpack(tensor).reshape(-1).view(np.uint8)[offset : offset + length]

    def release(self, offset: int, length: int) -> None:
        """The memory is the module's."""
