"""FastServe: serves large language models so that jobs finish soon."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .async_llm import AsyncLLM
    from .cost import CostModel
    from .distributed import GroupError
    from .llm import LLM
    from .loaders.spec import ModelError
    from .outputs import CompletionOutput, RequestOutput
    from .serving import EngineError
    from .types import InvalidRequest, SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "CostModel",
    "EngineError",
    "GroupError",
    "InvalidRequest",
    "ModelError",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_HOMES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "CompletionOutput": "outputs",
    "CostModel": "cost",
    "EngineError": "serving",
    "GroupError": "distributed",
    "InvalidRequest": "types",
    "ModelError": "loaders.spec",
    "RequestOutput": "outputs",
    "SamplingParams": "types",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `fastserve --help` need not load a runtime."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
