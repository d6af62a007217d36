"""What every test may ask for that starts engines."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


@pytest.fixture
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file descriptor, no process, no folder."""
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = os.listdir("/proc/self/fd")
    yield
    assert psutil.Process().children() == []
    assert list(folder.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == len(before)
