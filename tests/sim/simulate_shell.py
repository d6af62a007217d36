"""`fastserve simulate` as tests call it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastserve.cli import main
from fastserve.workloads import SimJob, write_trace


class Shell:
    """Runs `fastserve simulate` in this process; an exit code other than the expected one fails the test."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str, code: int = 0) -> str:
        assert main(["simulate", *words]) == code, self._capsys.readouterr().err
        printed = self._capsys.readouterr()
        self.errors = printed.err
        return printed.out

    def json(self, *words: str) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self(*words, "--json"))
        return result

    def runs(self, *words: str) -> list[dict[str, Any]]:
        runs: list[dict[str, Any]] = self.json(*words, "--workers", "1")["runs"]
        return runs


def trace_of(path: Path, jobs: Sequence[tuple[float, int]], prompt_tokens: int = 4) -> str:
    write_trace(path, [SimJob(arrival, prompt_tokens, output) for arrival, output in jobs])
    return str(path)


def policies(*names: str) -> list[str]:
    return [word for name in names for word in ("--policy", name)]
