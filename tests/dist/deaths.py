"""What becomes of the others when a rank is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fastserve import _C

PROGRAM = Path(__file__).parent / "programs" / "shares_model.py"


def check_others_name(killed: int, layout: tuple[int, int], doing: list[str]) -> None:
    """Kills a rank once all do what they are to, and sees the others end within seconds, by a line that names it."""
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
