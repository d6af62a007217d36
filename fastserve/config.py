"""Options of the engine, frozen and checked; every error names the option and its range."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, Literal

from .types import InvalidRequest

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(option: str, text: str | int, *, zero: bool = False) -> int:
    """Bytes from `512M`, `4G`, `1.5GiB` or a plain number, 0 if `zero` allows it. Units are binary.

    Raises InvalidRequest.
    """
    given: Any = text
    if isinstance(given, str):
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(?:i?B)?\s*", given, re.IGNORECASE)
        size = int(Decimal(match[1]) * _UNITS[match[2].upper()]) if match else None
    else:
        size = int(given) if _is_integer(given) else None
    if size is None:
        raise InvalidRequest(option, f"must be a size such as 512M or 4G, or a whole number of bytes, got {text!r}")
    if size < 0 or (size == 0 and not zero):
        raise InvalidRequest(option, f"must be {'at least' if zero else 'larger than'} 0, got {text!r}")
    return size


def check_integer(option: str, value: Any, low: int, high: int) -> int:
    """`value` as a plain integer between `low` and `high`. Raises InvalidRequest, naming the option."""
    if not _is_integer(value):
        raise InvalidRequest(option, f"must be an integer between {low} and {high}, got {value!r}")
    if value < low:
        raise InvalidRequest(option, f"must be at least {low}, got {value}")
    if value > high:
        raise InvalidRequest(option, f"must be at most {high}, got {value}")
    return int(value)


def _is_integer(value: object) -> bool:
    """Python's or NumPy's, but neither True nor False."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_limits(config: object, limits: Mapping[str, tuple[int, int]]) -> None:
    for option, (low, high) in limits.items():
        object.__setattr__(config, option, check_integer(option, getattr(config, option), low, high))


# Far above what serves anybody, and far below what overflows a 32-bit index or takes the machine's memory by a typo: a
# free block takes a few bytes of ours, and this many blocks of 16 tokens hold the KV of 268 million tokens.
MAX_BLOCKS = 2**24
_BLOCK_SIZE = (1, 2**16)
_BLOCKS = (1, MAX_BLOCKS)
_BATCHED_TOKENS = (1, 2**20)

# The stall limit where tokens are streamed to many: a gap twice as long as usual is what a reader notices, and the cost
# model is off by a third for single iterations.
STREAMING_STALL_LIMIT = 1.5

_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")

ADMISSIONS = ("paged", "reserve")
QUANTIZATIONS = ("auto", "int8", "none")
KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
DTYPES = ("float32", "bfloat16", "float16")
SWAP_MODES = ("proactive", "reactive", "recompute")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one iteration and the policy's settings. Seconds throughout."""

    policy: str = "skip-join-mlfq"
    max_num_seqs: int = 32  # rows of one iteration
    max_num_batched_tokens: int = 512  # tokens of one iteration
    # Prefills make an iteration at most this many times as long as its decodes alone would; None: however long.
    stall_limit: float | None = None
    block_size: int = 16  # token slots of one KV block
    num_blocks: int = 1024  # KV blocks on the device
    max_model_len: int = 2048  # longest prompt + output
    max_in_flight: int = 1  # plans submitted and not yet completed
    pipeline_parallel_size: int = 1  # stages; with more than one, a job is in at most one plan in flight
    num_levels: int = 16  # of the MLFQ; quantum(i) = quantum(0) * 2^i
    starvation_limit: float | None = 60.0  # a job left waiting this long is promoted to the front; None: never
    slowdown_limit: float | None = None  # so is one that has waited this many times its own service; None: never
    admission: str = "paged"  # a job starts when its prompt fits; "reserve": when prompt and longest output do (Orca)
    num_host_blocks: int = 0  # KV blocks in host memory, for swapping
    swap_mode: str = "proactive"  # when memory runs out: move KV ahead of need, "reactive": on need, or "recompute" it
    # A job keeps its KV until served this many times what bringing it back costs. 0, as in the paper: until it was
    # served at all, so that jobs that take turns may bring it back for a token each, for as long as they do.
    repayment: float = 16.0
    enable_prefix_caching: bool = True  # whether jobs share the KV of what they have in common
    tenant_weights: Mapping[str, float] = field(default_factory=dict)  # of a tenant's share; 1 for those not named

    def __post_init__(self) -> None:
        if not isinstance(self.policy, str):
            raise InvalidRequest("policy", f"must be the name of a policy, got {self.policy!r}")
        _check_limits(
            self,
            {
                "max_num_seqs": (1, 2**16),
                "max_num_batched_tokens": _BATCHED_TOKENS,
                "block_size": _BLOCK_SIZE,
                "num_blocks": _BLOCKS,
                "max_model_len": (1, 2**30),
                "max_in_flight": (1, 64),
                "pipeline_parallel_size": (1, 64),
                "num_levels": (1, 40),
                "num_host_blocks": (0, MAX_BLOCKS),
            },
        )
        if 1 < self.pipeline_parallel_size < self.max_in_flight:
            raise InvalidRequest(
                "max_in_flight", f"must be at most the {self.pipeline_parallel_size} stages, got {self.max_in_flight}"
            )
        _check_choice("admission", self.admission, ADMISSIONS)
        _check_choice("swap_mode", self.swap_mode, SWAP_MODES)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidRequest(
                "max_num_batched_tokens",
                f"must be at least max_num_seqs ({self.max_num_seqs}), so that every row of an iteration can decode; "
                f"got {self.max_num_batched_tokens}",
            )
        if not isinstance(self.enable_prefix_caching, bool):
            raise InvalidRequest("enable_prefix_caching", f"must be True or False, got {self.enable_prefix_caching!r}")
        object.__setattr__(self, "tenant_weights", _checked_weights(self.tenant_weights))
        if not _is_number(self.repayment) or not 0 <= self.repayment < math.inf:
            raise InvalidRequest("repayment", f"must be a number from 0 on, got {self.repayment!r}")
        for option, low, unit in (
            ("starvation_limit", 0, " seconds"),
            ("slowdown_limit", 0, ""),
            ("stall_limit", 1, ""),
        ):
            object.__setattr__(self, option, _checked_limit(option, getattr(self, option), low, unit))

    @property
    def swaps(self) -> bool:
        """Whether KV ever goes to the host: not where it is thrown away, nor where everybody keeps what they have."""
        return self.swap_mode != "recompute" and self.admission != "reserve"


# Of a tenant: sums of weights further apart would lose the lighter ones.
_MOST_WEIGHT = 1e6


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _checked_weights(given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise InvalidRequest("tenant_weights", f"must be a dict from tenants to numbers above 0, got {given!r}")
    for tenant, weight in given.items():
        if not isinstance(tenant, str) or not _is_number(weight) or not 1 / _MOST_WEIGHT <= weight <= _MOST_WEIGHT:
            must = f"must give names numbers from {1 / _MOST_WEIGHT:g} to {_MOST_WEIGHT:g}"
            raise InvalidRequest("tenant_weights", f"{must}, got {tenant!r}: {weight!r}")
    return {tenant: float(weight) for tenant, weight in given.items()}


def _checked_limit(option: str, value: Any, low: int, unit: str) -> float | None:
    if value is None:
        return None
    if not (_is_number(value) and low < value < math.inf):
        raise InvalidRequest(option, f"must be above {low}{unit}, or none, got {value!r}")
    return float(value)


def _check_choice(option: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidRequest(option, f"must be one of {', '.join(choices)}; got {value!r}")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """What the native runtime is built with."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # float16: on a CUDA device only
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"  # auto: as dtype
    quantization: Literal["auto", "int8", "none"] = "auto"  # of the weights; auto: as in the file, unless float32
    device: str = "cpu"  # or cuda, or one of several: cuda:1
    threads: int = 0  # 0: one a core
    block_size: int = 16
    num_blocks: int = 1024  # KV blocks on the device
    num_host_blocks: int = 0  # KV blocks in host memory
    swap_bandwidth: int | None = None  # bytes a second that each direction of swapping is slowed to; None: as it comes
    max_num_batched_tokens: int = 512

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _check_choice("quantization", self.quantization, QUANTIZATIONS)
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise InvalidRequest("device", f"must be cpu, cuda or one such as cuda:1, got {self.device!r}")
        if not self.on_cuda and "float16" in (self.dtype, self.kv_cache_dtype):
            raise InvalidRequest("dtype", "float16 is for CUDA devices; use bfloat16 or float32 on a CPU")
        if self.on_cuda and self.kv_cache_dtype not in ("auto", self.dtype):
            raise InvalidRequest(
                "kv_cache_dtype",
                f"must be auto or the {self.dtype} of dtype on a CUDA device, got {self.kv_cache_dtype!r}",
            )
        _check_limits(
            self,
            {
                "threads": (0, 1024),
                "block_size": _BLOCK_SIZE,
                "num_blocks": _BLOCKS,
                "num_host_blocks": (0, MAX_BLOCKS),
                "max_num_batched_tokens": _BATCHED_TOKENS,
            },
        )
        if self.swap_bandwidth is not None:
            _check_limits(self, {"swap_bandwidth": (1, 2**50)})

    @property
    def on_cuda(self) -> bool:
        return self.device != "cpu"

    @property
    def kv_dtype(self) -> str:
        """What K and V are held in."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype
