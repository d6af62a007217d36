"""Kernels that begin before the one before them has ended: where a device has that, and what is launched so."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "backend" / "cuda"


def test_the_trial_of_a_chain(kernels: ModuleType) -> None:
    verdict = kernels.try_early_launches()
    assert verdict == "used" or not hasattr(kernels, "simt")
    assert kernels.kernels_begin_early() == (verdict == "used")


def test_who_does_not_want_them_says_so(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.try_early_launches()
    before = kernels.kernels_begin_early()
    with monkeypatch.context() as context:
        context.setenv("FASTSERVE_PDL", "0")
        assert kernels.early_launch_trial() == "not used: FASTSERVE_PDL is 0"
    assert not kernels.kernels_begin_early()
    kernels.early_launch_trial()
    assert kernels.kernels_begin_early() == before


def test_nothing_comes_before_the_wait() -> None:
    """In each kernel that calls it, begin_after_predecessor() is the first statement: no memory is read before."""
    calls = 0
    for file in sorted(SOURCES.glob("*.cu*")):
        if file.name == "simt.cuh":
            continue
        text = file.read_text()
        calls += text.count("begin_after_predecessor();")
        for kernel in re.finditer(r"__global__[^{;]*\{\n([^\n]*)\n", text):
            if "begin_after_predecessor" in text[kernel.end(1) : text.find("\n}\n", kernel.end())]:
                pytest.fail(f"{file.name}: begin_after_predecessor() is not the first statement of a kernel")
            calls -= kernel[1].strip() == "begin_after_predecessor();"
    assert calls == 0, "begin_after_predecessor() outside of a kernel's first line"
