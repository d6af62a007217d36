"""What the engine's process is told at its start: the options of LLM, as JSON."""

from __future__ import annotations

import sys
from numbers import Integral, Real
from typing import Any, Final, Literal

import msgspec

from .config import STREAMING_STALL_LIMIT
from .types import InvalidRequest

_SCHEDULING: Final = (
    "policy", "max_num_seqs", "max_num_batched_tokens", "stall_limit", "block_size", "num_levels", "starvation_limit",
    "slowdown_limit", "admission", "swap_mode", "enable_prefix_caching", "tenant_weights",
)  # fmt: skip
_RUNNING: Final = ("dtype", "kv_cache_dtype", "quantization", "device", "threads")


class EngineOptions(msgspec.Struct, kw_only=True, frozen=True):
    """Names, defaults and meanings are LLM's, the last three aside; see there. Values are checked by who uses them."""

    model: str
    policy: str = "skip-join-mlfq"
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    quantization: str = "auto"
    device: str = "cpu"
    threads: int = 0
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    stall_limit: float | Literal["auto"] | None = "auto"  # auto: as AsyncLLM's, for tokens are streamed
    block_size: int = 16
    kv_cache_memory: str | int | None = None
    swap_space: str | int | None = None
    swap_mode: str = "proactive"
    swap_bandwidth: str | int | None = None
    admission: str = "paged"
    enable_prefix_caching: bool = True
    tenant_weights: dict[str, float] | None = None
    starvation_limit: float | None = 60.0
    slowdown_limit: float | None = None
    num_levels: int = 16
    max_in_flight: int | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    rank_timeout: float = 300.0
    cost: str | None = None  # the file of a profile
    stages: list[int] | None = None  # layers of each, as an engine before this one has measured it
    host_share: int = 1  # of the host's memory, one part in so many is this engine's: others run beside it
    engine: int = 0  # which of those it is

    def scheduling(self) -> dict[str, Any]:
        """Fields of SchedulerConfig that do not depend on the model."""
        told = {name: getattr(self, name) for name in _SCHEDULING}
        told["tenant_weights"] = self.tenant_weights or {}
        told["stall_limit"] = STREAMING_STALL_LIMIT if self.stall_limit == "auto" else self.stall_limit
        return told

    def running(self) -> dict[str, Any]:
        """The same of RuntimeConfig."""
        return {name: getattr(self, name) for name in _RUNNING}

    def to_json(self) -> str:
        return msgspec.json.encode(self, enc_hook=_plain).decode()

    @classmethod
    def from_json(cls, *texts: str) -> EngineOptions:
        """Of several, the last that names an option holds; options left out have their defaults.

        Raises InvalidRequest for what is no object of options with a model.
        """
        given: dict[str, Any] = {}
        for text in texts:
            given |= _object(text)
        if unknown := sorted(given.keys() - set(cls.__struct_fields__)):
            known = ", ".join(cls.__struct_fields__)
            raise InvalidRequest(unknown[0], f"is no option of the engine's process, which has {known}")
        if "model" not in given:
            raise InvalidRequest("model", "must be given")
        return cls(**given)


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    if isinstance(value, (Integral, Real)):
        return int(value) if isinstance(value, Integral) else float(value)
    raise TypeError(f"{value!r:.80} is no option")


def _object(text: str) -> dict[str, Any]:
    try:
        decoded = msgspec.json.decode(text)
    except msgspec.MsgspecError as error:
        raise InvalidRequest("options", f"must be a JSON object of LLM's options: {error}") from None
    if not isinstance(decoded, dict):
        raise InvalidRequest("options", f"must be a JSON object of LLM's options, got {text:.80}")
    return decoded


def worker_command(options: EngineOptions) -> list[str]:
    """What starts an engine with these options, or another rank of one."""
    return [sys.executable, "-m", "fastserve.worker", "--options", options.to_json()]
