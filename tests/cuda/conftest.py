"""Tests of the CUDA kernels. They run on the CPU, where tests/simt emulates the machine, or on a GPU where
FASTSERVE_KERNELS names the folder of the module that nvcc compiled."""

from __future__ import annotations

import importlib.util
import os
import zlib
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(os.environ.get("FASTSERVE_KERNELS") or Path(__file__).parents[2] / "build" / "simt")
FILES = [file for suffix in EXTENSION_SUFFIXES if (file := FOLDER / f"_kernels{suffix}").exists()]

if not FILES:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.cuda)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not FILES:
        terminalreporter.write_line(
            f"tests/cuda left out: no _kernels in {FOLDER}; `make build-cuda` compiles it where CUDA's headers are"
        )


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    """The functions of csrc/backend/cuda, as tests/cuda/bindings offers them."""
    spec = importlib.util.spec_from_file_location("_kernels", FILES[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _machine(kernels: ModuleType, request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test has an order of its own in which threads and streams go on, the same every time."""
    if not hasattr(kernels, "simt"):
        yield
        return
    kernels.simt.configure("random", zlib.crc32(request.node.nodeid.encode()))
    objects = kernels.simt.live_objects()
    yield
    kernels.simt.check_errors()
    assert kernels.simt.live_objects() == objects, "memory, streams, events or graphs are left"
