"""The `fastserve` command, run in this process on the toy."""

from __future__ import annotations

import io
import sys

import pytest
import toy_llm
from toy_llm import ToySource, ToyWorld

import fastserve.loaders
from fastserve.cli import main

COMMANDS = [
    "serve", "generate", "chat", "info", "convert", "profile", "simulate", "version", "bench", "bench latency",
    "bench serve", "bench throughput",
]  # fmt: skip


class Shell:
    """Runs commands in this process; an exit code other than the expected one fails the test."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str, code: int = 0) -> str:
        assert main(words) == code
        printed = self._capsys.readouterr()
        self.errors = printed.err
        return printed.out


def enter(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    """Commands read nothing from standard input, and find the toy whatever model they are given."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(fastserve.loaders, "open_model", lambda model: ToySource())
    return toy_llm.enter(monkeypatch)
