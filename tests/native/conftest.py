"""What tests of the emulated CUDA device share."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest

_MEMORY = 512 * 2**20  # bytes of the emulated device


@pytest.fixture
def plugin() -> Iterator[ctypes.CDLL]:
    """The emulated device's backend, which can be told to be slow, to fail and to be small."""
    named = os.environ.get("FASTSERVE_CUDA_PLUGIN")
    library = ctypes.CDLL(named)
    if named is None or not hasattr(library, "fastserve_simt_set_latency"):
        pytest.skip("on an emulated device only")
    library.fastserve_simt_set_latency.argtypes = [ctypes.c_double]
    library.fastserve_simt_set_memory.argtypes = [ctypes.c_size_t]
    yield library
    library.fastserve_simt_set_latency(0)
    library.fastserve_simt_fail_call(None, 0)
    library.fastserve_simt_set_memory(_MEMORY)
