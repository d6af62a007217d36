"""The cost model of this machine and model: measured once, then remembered."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

from .config import SchedulerConfig
from .cost import CostModel, profile_path
from .profiler import measure
from .types import Executor, InvalidRequest
from .version import __version__

# First come, first served looks at no cost, so there is nothing to measure for it.
UNMEASURED = CostModel.constant(0.01)
_COSTLESS_POLICIES = frozenset({"fcfs"})


def cost_model(
    cost: CostModel | str | os.PathLike[str] | None,
    executor: Executor,
    config: SchedulerConfig,
    *,
    vocab_size: int,
    model: str,
    device: str,
) -> CostModel:
    """The cost model given, or read from the file given, or remembered from an earlier start, or measured now.

    A remembered profile counts only for the same model, device and version of FastServe. Raises InvalidRequest when a
    file that was asked for cannot be read; a remembered one that is damaged is measured again.
    """
    if isinstance(cost, CostModel):
        return cost
    if cost is not None:
        return CostModel.load(cost)
    if config.policy in _COSTLESS_POLICIES:
        return UNMEASURED
    path = profile_path(model, device)
    known = _remembered(path, model, device)
    if known is not None:
        return known
    measured = measure(executor, config, vocab_size=vocab_size, model=model, device=device, version=__version__)
    with contextlib.suppress(OSError):  # a read-only home costs half a second at every start, not the start itself
        measured.save(path)
    return measured


def device_name(device: str, dtype: str, instruction_set: str, threads: int) -> str:
    """What a profile was measured on, in words: processor, instruction set, compute type and threads."""
    return f"{device} {_processor()} {instruction_set} {dtype} {threads} threads"


def _remembered(path: Path, model: str, device: str) -> CostModel | None:
    if not path.exists():
        return None
    try:
        profile = CostModel.load(path)
    except InvalidRequest:
        return None
    return profile if profile.belongs_to(model=model, device=device, version=__version__) else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()
