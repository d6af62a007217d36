"""The emulated CUDA machine does what PTX says, and finds what a GPU would not forgive."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest


@pytest.mark.parametrize("count", [1, 63, 64, 1000])
def test_kernels_run_on_the_cpu(kernels: ModuleType, count: int) -> None:
    a, b = np.arange(count, dtype=np.float32), np.full(count, 0.5, np.float32)
    assert np.array_equal(kernels.example_add("float32", a, b), a + b)
