"""Ranks of a small model as processes, and what becomes of the others when one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastserve import _C

PROGRAM = Path(__file__).parent / "programs" / "shares_model.py"


@contextmanager
def started(
    layout: tuple[int, int], doing: Sequence[str], environments: Mapping[int, Mapping[str, str]]
) -> Iterator[list[subprocess.Popen[str]]]:
    """The ranks, once all do what they are to; `environments` are added to those of some. Ends them after."""
    size = layout[0] * layout[1]
    memory = _C.SharedMemory(size)
    common = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), memory.path, str(rank), *map(str, layout), doing[rank]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**common, **environments.get(rank, {})},
        )
        for rank in range(size)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline(), process.communicate()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def check_others_name(killed: int, layout: tuple[int, int], doing: Sequence[str]) -> None:
    """Kills a rank once all do what they are to, and sees the others end within seconds, by a line that names it."""
    with started(layout, doing, {}) as processes:
        processes[killed].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        for rank, process in enumerate(processes):
            _, errors = process.communicate(timeout=60)
            if rank != killed:
                gone = f"rank {killed} on "
                assert process.returncode == 1
                assert f"heard: {gone}" in errors and f"(process {processes[killed].pid}) is gone" in errors, errors
        assert time.monotonic() - begin < 5
