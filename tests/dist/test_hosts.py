"""benchmarks/hosts.py, small: an engine on two hosts whose line is cut; streams stay as they were."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hosts
import pytest


@pytest.mark.slow
def test_no_stream_notices_that_a_host_was_away() -> None:
    try:
        hosts.check_machine()
    except hosts.CannotRun as reason:
        pytest.skip(str(reason))
    options = ["--cuts", "1", "--down", "8", "--heartbeat-timeout", "4", "--streams", "8", "--window", "0.5"]
    done = subprocess.run(
        [sys.executable, hosts.__file__, *options],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    left = Path("/run/netns")
    assert not [space for space in (left.iterdir() if left.exists() else ()) if space.name.startswith("fastserve-")]


def test_who_cannot_run_it_is_told_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert hosts.main([]) == 2
    assert capsys.readouterr().err == "hosts: needs root, for network namespaces\n"
