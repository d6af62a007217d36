"""Arrows between files point one way (docs/architecture.md), and libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastserve

PACKAGE = Path(fastserve.__file__).parent

# What the files of each part may import of FastServe; None: anything.
ARROWS: dict[str, set[str] | None] = {
    "types": set(),
    "version": set(),
    "config": {"types"},
    "cost": {"types"},
    "workloads": {"types"},
    "loaders": {"types"},
    "chat_template": {"loaders", "types"},
    "literals": {"types"},
    "tokenizer": {"chat_template", "literals", "loaders", "types"},
    "tokenizer_choice": {"loaders", "tokenizer", "types"},
    "convert": {"loaders", "config", "types"},
    "kv": {"config", "cost", "types"},
    "programs": {"types"},
    "policies": {"programs", "origin", "config", "cost", "types"},
    "planning": {"config", "cost", "types"},
    "decode_rows": {"cost", "types"},
    "prefixes": {"kv", "origin", "cost", "types"},
    "slots": {"planning", "types"},
    "residency": {"origin", "slots", "policies", "prefixes", "kv", "planning", "config", "cost", "types"},
    "room": {"origin", "residency", "policies", "kv", "config", "cost", "types"},
    "swapping": {"origin", "residency", "room", "decode_rows", "policies", "kv", "config", "cost", "types"},
    "chunking": {"cost", "types"},
    "shelter": {"policies", "decode_rows", "cost", "types"},
    "selection": {"shelter", "policies", "room", "decode_rows", "config", "types"},
    "charges": {"policies", "programs", "decode_rows", "cost", "types"},
    "batches": {
        "charges", "selection", "shelter", "swapping", "room", "residency", "decode_rows", "policies", "config", "cost",
        "types",
    },
    "scheduler": {
        "batches", "charges", "chunking", "policies", "residency", "decode_rows", "planning", "programs", "config",
        "cost", "types",
    },
    "integrity": {"scheduler", "types"},
    "engine": {"integrity", "planning", "scheduler", "config", "cost", "types"},
    "simulator": {"engine", "workloads", "config", "cost", "types"},
    "roofline": {"config", "cost", "types"},
    "presets": {"roofline", "config", "cost", "types"},
    "profiler": {"config", "cost", "types"},
    "_C": {"loaders", "types"},  # its stub, for the type checker
    "ranks": {"_C"},
    "distributed": {"joining", "ranks", "_C", "config", "types"},
    "joining": {"_C"},
    "links": {"distributed", "_C"},
    "pulse": {"_C"},
    "sharding": {"loaders", "types"},
    "native": {"distributed", "links", "sharding", "loaders", "_C", "config", "types"},
    "seeds": {"types"},
    "ipc": {"types"},
    "origin": {"types"},
    "requests": {"config", "origin", "tokenizer", "types"},
    "outputs": {"requests", "tokenizer", "types"},
    "sizing": {"config", "types"},
    "calibration": {"profiler", "cost", "config", "types", "version"},
    "stage_costs": {"native", "profiler", "sharding", "loaders", "config", "cost", "version"},
    "placement": {
        "distributed", "links", "loaders", "native", "pulse", "ranks", "sharding", "stage_costs", "_C", "config",
        "types",
    },
    "assembly": {
        "calibration", "config", "cost", "distributed", "loaders", "native", "placement", "policies", "sizing",
        "tokenizer", "tokenizer_choice", "types", "version",
    },
    "serving": {
        "assembly", "calibration", "config", "cost", "distributed", "engine", "engine_options", "outputs", "requests",
        "seeds", "types",
    },
    "server": {
        "backlog", "config", "cost", "distributed", "engine_options", "ipc", "origin", "outputs", "seeds", "tokenizer",
        "types", "version",
    },
    "llm": {"serving", "requests", "origin", "outputs", "calibration", "cost", "distributed", "types"},
    "async_llm": {"serving", "requests", "origin", "outputs", "config", "types"},
    "backlog": {"config", "cost", "types"},
    "engine_options": {"config", "types"},
    "monitor": {"backlog", "engine", "ipc", "config", "cost", "types"},
    "worker": {
        "assembly", "config", "distributed", "engine", "engine_options", "ipc", "loaders", "monitor", "placement",
        "types",
    },
    "__init__": {"llm", "async_llm", "cost", "distributed", "loaders", "outputs", "serving", "types", "version"},
    "__main__": {"cli"},
    "cli": None,
    "bench": None,
}  # fmt: skip

SOURCES = sorted(path for pattern in ("*.py", "*.pyi") for path in PACKAGE.rglob(pattern))


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules a file imports, wherever in the file it does."""
    package = ["fastserve", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            if module == ["fastserve"]:
                yield from (f"fastserve.{alias.name}" for alias in node.names)
            else:
                yield ".".join(module)


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].partition(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path: Path) -> None:
    own = part(path)
    assert own in ARROWS, f"{own} is new: give it a place in ARROWS and in docs/architecture.md"
    allowed = ARROWS[own]
    if allowed is None:
        return
    found = {name.split(".")[1] for name in imported(path) if name.startswith("fastserve.")}
    assert found - {own} <= allowed, f"{path.name} may not import {sorted(found - {own} - allowed)}"


def test_there_is_no_cycle() -> None:
    """A part that may import anything is imported only by its own kind and the way in."""
    seen: list[str] = []
    rest = {name: set(allowed) - {"__init__"} for name, allowed in ARROWS.items() if allowed is not None}
    rest.pop("__main__")
    while rest:
        free = [name for name, allowed in rest.items() if allowed <= set(seen)]
        assert free, f"in a cycle: {sorted(rest)}"
        seen += free
        for name in free:
            del rest[name]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_where_they_belong(path: Path) -> None:
    libraries = {name.partition(".")[0] for name in imported(path)}
    assert not libraries & {"torch", "transformers", "gguf"}, "the serving path does without"
    if part(path) != "cli":
        assert "typer" not in libraries
    if part(path) not in ("cli", "bench", "llm"):
        assert "rich" not in libraries
    if part(path) in ("policies", "kv"):
        assert not libraries & {"numpy", "time", "threading"}, "bookkeeping: no clock, no device, no threads"


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_after("import fastserve.cli, contextlib, io; fastserve.cli.main(['generate', '--help'])")
    assert not loaded & {"tokenizers", "jinja2", "fastserve._C", "huggingface_hub", "matplotlib"}


def test_serving_loads_no_training_library() -> None:
    assert not loaded_after("from fastserve import LLM, AsyncLLM") & {"torch", "transformers", "gguf", "typer", "rich"}


def test_an_engine_in_one_process_needs_no_server_library() -> None:
    loaded = loaded_after("from fastserve import LLM, AsyncLLM")
    assert not loaded & {"msgspec", "zmq", "fastapi", "uvicorn", "starlette", "prometheus_client"}


def test_public_names() -> None:
    for name in fastserve.__all__:
        assert getattr(fastserve, name) is not None
    with pytest.raises(AttributeError, match="LMM"):
        fastserve.LMM  # noqa: B018
