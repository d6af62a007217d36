"""What every test runs under: no network, a cache of its own, and the same random examples each time."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("FASTSERVE_DEBUG", None)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("thorough", settings.get_profile("repeatable"), max_examples=300)  # three times as many
settings.load_profile("repeatable")

# torch has no build for every Python and machine. In CI its absence is an error, elsewhere those tests are left out.
_HAS_TORCH = importlib.util.find_spec("torch") is not None or bool(os.environ.get("CI"))
_NEEDS_TORCH = re.compile(r"^(?:import|from) (?:torch|transformers|models|tolerance)\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if _HAS_TORCH or collection_path.suffix != ".py":
        return None
    return bool(_NEEDS_TORCH.search(collection_path.read_text(encoding="utf-8"))) or None


def pytest_report_header() -> list[str]:
    return [] if _HAS_TORCH else ["torch is not installed: tests that compare with transformers are left out"]


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Profiles measured by tests are not the user's."""
    os.environ["FASTSERVE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
