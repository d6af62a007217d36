"""The machines that one test body runs on: the CPU's instruction sets, and a CUDA device.

The device is a GPU where the build has its backend and there is one. Elsewhere it is emulated, by the same kernels
compiled for the CPU (tests/simt), where `make build-cuda` could build that.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

import fastserve
from fastserve.native import instruction_sets

_EMULATED = Path(__file__).parents[2] / "build" / "simt" / "_cuda.so"
_PLUGIN = Path(fastserve.__file__).with_name("_cuda.so")

if not _PLUGIN.exists() and _EMULATED.exists():
    os.environ.setdefault("FASTSERVE_CUDA_PLUGIN", str(_EMULATED))

HAS_CUDA = _PLUGIN.exists() or Path(os.environ.get("FASTSERVE_CUDA_PLUGIN", "/nowhere")).exists()
NO_CUDA = "no CUDA backend: `make build-cuda` builds one where CUDA's headers are"
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not HAS_CUDA, reason=NO_CUDA)])
DEVICES = ["cpu", CUDA]
MACHINES = [*instruction_sets(), CUDA]


def use(machine: str, patch: pytest.MonkeyPatch) -> str:
    """The device to ask for from now on, for this machine."""
    if machine == "cuda":
        return machine
    patch.setenv("FASTSERVE_ISA", machine)
    return "cpu"


def supports(machine: str, kv_cache_dtype: str) -> bool:
    """Whether K and V may be held so, in something else than what is computed in."""
    return machine != "cuda" or kv_cache_dtype == "auto"


def examples(usual: int) -> int:
    """How many examples hypothesis tries where its default is too many; three times as many in `make test-all`."""
    return usual * settings.default.max_examples // 100
