"""Options of the engine, frozen and checked; every error names the option and its range."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .types import InvalidRequest

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(option: str, text: str | int) -> int:
    """Bytes from `512M`, `4G`, `1.5GiB` or a plain number. Units are binary. Raises InvalidRequest."""
    if isinstance(text, int):
        size = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
        if match is None:
            raise InvalidRequest(option, f"must be a size such as 512M or 4G, got {text!r}")
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise InvalidRequest(option, f"must be larger than 0, got {text!r}")
    return size


def _at_least(option: str, value: float, low: float) -> None:
    if not value >= low:
        raise InvalidRequest(option, f"must be at least {low}, got {value}")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one iteration and the policy's settings. Seconds throughout."""

    policy: str = "skip-join-mlfq"
    max_num_seqs: int = 32  # rows of one iteration
    max_num_batched_tokens: int = 512  # tokens of one iteration
    block_size: int = 16  # token slots of one KV block
    num_blocks: int = 1024  # KV blocks on the device
    max_model_len: int = 2048  # longest prompt + output
    max_in_flight: int = 1  # plans submitted and not yet completed
    num_levels: int = 12  # of the MLFQ; quantum(i) = quantum(0) * 2^i
    starvation_limit: float | None = 60.0  # a job left waiting this long is promoted to level 0; None: never

    def __post_init__(self) -> None:
        for option in ("max_num_seqs", "block_size", "num_blocks", "max_model_len", "max_in_flight", "num_levels"):
            _at_least(option, getattr(self, option), 1)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidRequest(
                "max_num_batched_tokens",
                f"must be at least max_num_seqs ({self.max_num_seqs}), so that every row of an iteration can decode; "
                f"got {self.max_num_batched_tokens}",
            )
        if self.num_levels > 40:
            raise InvalidRequest("num_levels", f"must be at most 40, got {self.num_levels}")
        if self.starvation_limit is not None and not self.starvation_limit > 0:
            raise InvalidRequest("starvation_limit", f"must be above 0 or none, got {self.starvation_limit}")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """What the native runtime is built with."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 0  # 0: one a core
    block_size: int = 16
    num_blocks: int = 1024
    max_num_batched_tokens: int = 512

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise InvalidRequest("dtype", f"must be float32 or bfloat16, got {self.dtype!r}")
        if self.device not in ("cpu", "cuda"):
            raise InvalidRequest("device", f"must be cpu or cuda, got {self.device!r}")
        if self.device == "cuda":
            raise InvalidRequest("device", "this build has no CUDA backend; use --device cpu")
        _at_least("threads", self.threads, 0)
