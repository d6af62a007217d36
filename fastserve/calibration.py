"""The cost model of this machine and model, measured once and remembered; and its link, measured at every start."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable
from pathlib import Path

from .config import SchedulerConfig
from .cost import CostModel, Link, profile_path
from .profiler import measure, measure_link
from .types import Executor, InvalidRequest
from .version import __version__

# First come, first served looks at no cost, so there is nothing to measure for it unless iterations have a limit.
UNMEASURED = CostModel.constant(0.01)
_COSTLESS_POLICIES = frozenset({"fcfs"})


class Calibration:
    """Where the cost model of one model on one device comes from. The executor must be idle."""

    def __init__(
        self, executor: Executor, config: SchedulerConfig, *, vocab_size: int, model: str, device: str
    ) -> None:
        self._executor = executor
        self._config = config
        self._vocab_size = vocab_size
        self._model = model
        self._device = device

    @property
    def path(self) -> Path:
        """Where the profile is remembered."""
        return profile_path(self._model, self._device)

    def cost_model(self, cost: CostModel | str | os.PathLike[str] | None) -> CostModel:
        """The one given, or read from the file given, or remembered from an earlier start, or measured roughly.

        A remembered profile counts only for the same model, device and version of FastServe; a damaged one is measured
        again. Raises InvalidRequest when the file given cannot be read, or
        what is given is neither.
        """
        if isinstance(cost, CostModel):
            return cost
        if isinstance(cost, (str, os.PathLike)):
            return CostModel.load(cost)
        if cost is not None:
            raise InvalidRequest("cost", f"must be a CostModel or the file of one, got {cost!r}")
        if self._config.policy in _COSTLESS_POLICIES and self._config.stall_limit is None:
            return UNMEASURED
        remembered = self._remembered(self.path)
        if remembered is not None:
            return remembered
        measured = self.measure(full=False)
        with contextlib.suppress(OSError):  # a read-only home costs 0.6 seconds at every start, not the start itself
            measured.save(self.path)
        return measured

    def measure(
        self, *, full: bool, on_sample: Callable[[list[tuple[int, int]], float], None] | None = None
    ) -> CostModel:
        """Run real iterations, for up to thirty seconds if `full`, else 0.6."""
        return measure(
            self._executor,
            self._config,
            vocab_size=self._vocab_size,
            full=full,
            model=self._model,
            device=self._device,
            version=__version__,
            on_sample=on_sample,
        )

    def link(self) -> Link | None:
        """How fast KV moves between device and host, measured in a fifth of a second at most; None without a host pool.

        Not remembered: it takes milliseconds where the link is fast, and a throttle changes it.
        """
        return measure_link(self._executor, self._config.num_blocks, self._config.num_host_blocks)

    def _remembered(self, path: Path) -> CostModel | None:
        if not path.exists():
            return None
        try:
            profile = CostModel.load(path)
        except InvalidRequest:
            return None
        return profile if profile.belongs_to(model=self._model, device=self._device, version=__version__) else None


def device_name(device: str, arithmetic: str, instruction_set: str, threads: int) -> str:
    """What a profile was measured on, in words: processor, instruction set, arithmetic and threads."""
    return f"{device} {_processor()} {instruction_set} {arithmetic} {threads} threads"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()
