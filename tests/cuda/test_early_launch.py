"""Kernels that begin before the one before them has ended: where a device has that, and what is launched so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
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


@pytest.fixture
def second_device(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emulated machine's other device, on which kernels are launched in order before and after."""
    if not hasattr(kernels, "simt"):
        pytest.skip("on the emulated device only")
    kernels.set_device(1)
    yield
    kernels.simt.revive()
    kernels.simt.set_compiled_for(90)
    monkeypatch.setenv("FASTSERVE_PDL", "0")
    kernels.early_launch_trial()
    kernels.set_device(0)


@pytest.mark.parametrize(("architecture", "named"), [(80, "8.0"), (89, "8.9")])
def test_code_that_does_not_wait_is_not_launched_early(
    kernels: ModuleType, second_device: None, architecture: int, named: str
) -> None:
    """The device is of 9.0, and so is the machine code it runs; but that may have been made of older PTX."""
    kernels.simt.set_compiled_for(architecture)
    verdict = kernels.early_launch_trial()
    assert verdict == f"not used: the kernels were compiled for {named}, where they do not wait for each other"
    assert not kernels.kernels_begin_early()
    kernels.simt.set_compiled_for(100)
    assert kernels.early_launch_trial() == "used"


def test_a_device_lost_in_the_trial_says_what_to_set(kernels: ModuleType, second_device: None) -> None:
    """The error of a kernel that has trapped stays: whoever comes next would fail without saying why."""
    kernels.simt.lose_device("cudaGraphLaunch", 1)
    with pytest.raises(kernels.Error, match=r"unspecified launch failure .*start again with FASTSERVE_PDL=0"):
        kernels.try_early_launches()
    assert not kernels.kernels_begin_early()
    kernels.simt.revive()
    assert kernels.try_early_launches() == "used"


def test_a_kernel_is_told_once_to_prefer_shared_memory(kernels: ModuleType, second_device: None) -> None:
    """Of those that may begin early: the memory is divided anew only when the device is idle."""
    row = np.ones((1, 64), np.float32)

    def normalize() -> None:
        kernels.norm(dtype="float32", input=row, order=None, output=row, weight=row[0], bias=None, eps=1e-6)

    before = kernels.simt.carveouts_set()
    normalize()
    assert kernels.simt.carveouts_set() == before
    kernels.early_launch_trial()
    before = kernels.simt.carveouts_set()
    normalize()
    normalize()
    assert kernels.simt.carveouts_set() == before + 1


# Which of a product's operands no kernel writes.
CONSTANT = {"call.weight", "call.m"}


def test_nothing_comes_before_the_wait() -> None:
    """The first statement of every kernel that waits is begin_after_predecessor(), or let_next_begin(); behind that,
    in the two files that have it, up to wait_for_predecessor() nothing of a call is named but its weights and size, and
    nothing is copied but constants. (Copies and barriers the emulated machine sees by itself; plain reads it does not.)
    """
    split = set()
    for file in sorted(SOURCES.glob("*.cu*")):
        if file.name == "simt.cuh":
            continue
        text = re.sub("//.*", "", file.read_text())
        for name in ("begin_after_predecessor", "let_next_begin"):
            firsts = re.findall(r"__global__[^{;]*\{\n *" + name + r"\(\);", text)
            assert len(firsts) == text.count(f"{name}("), f"{file.name}: {name}() is not a kernel's first statement"
        lets, waits = text.count("let_next_begin("), text.count("wait_for_predecessor(")
        assert lets == waits <= 1, f"{file.name}: {lets} let_next_begin(), {waits} wait_for_predecessor()"
        if lets == 0:
            continue
        split.add(file.name)
        summing = text[text.index("void sum_part") : text.index("wait_for_predecessor()")]
        named = set(re.findall(r"call\.\w+", summing))
        assert named <= CONSTANT, f"{file.name}: before the wait there is {named - CONSTANT}"
        assert not re.search(r"\bcopy_async|commit_copies|load|__sync|__shfl", summing), file.name
        kernel = text[text.index("let_next_begin();") :]
        before = kernel[: re.search(r"Kernel::sum_parts?\(", kernel).start()]  # type: ignore[union-attr]
        named = set(re.findall(r"call\.\w+", before))
        assert named <= CONSTANT, f"{file.name}: before the wait there is {named - CONSTANT}"
    assert split == {"gemm_rows.cuh", "gemm_tiles.cuh"}
