"""A rank is killed, wherever it and the others are: all others end with an error that names it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastserve import _C

PROGRAM = Path(__file__).parent / "programs" / "shares_model.py"


@pytest.mark.parametrize(
    ("layout", "killed", "doing"),
    [
        ((2, 1), 1, ["waits for it", "comes"]),  # rank 0 makes its runtime, for which it needs the other
        ((1, 2), 0, ["leads once", "follows"]),  # followers are idle
        ((2, 2), 0, ["leads once", "follows", "follows", "follows"]),
        ((2, 1), 0, ["tells a plan", "follows"]),  # in the middle of a plan
        ((2, 1), 1, ["leads", "loads"]),  # rank 0 polls: its own runtime waits,
        ((1, 2), 1, ["leads", "loads"]),  # only the word of the other is missing,
        ((1, 2), 1, ["wide leads", "wide loads"]),  # there is more to send to it,
        ((1, 3), 1, ["leads", "loads", "follows"]),  # or what the last stage would say
        ((2, 2), 3, ["leads", "follows", "follows", "loads"]),
    ],
    ids=str,
)
def test_all_others_name_a_killed_rank(layout: tuple[int, int], killed: int, doing: list[str]) -> None:
    size = layout[0] * layout[1]
    memory = _C.SharedMemory(size)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), memory.path, str(rank), *map(str, layout), doing[rank]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(size)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline(), process.communicate()
        processes[killed].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        for rank, process in enumerate(processes):
            _, errors = process.communicate(timeout=60)
            if rank != killed:
                gone = f"rank {killed} on "
                assert process.returncode == 1
                assert f"heard: {gone}" in errors and f"(process {processes[killed].pid}) is gone" in errors, errors
        assert time.monotonic() - begin < 5
    finally:
        for process in processes:
            process.kill()
            process.communicate()
