"""Groups that FastServe starts on this host, and how they end: together."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fastserve import _C
from fastserve.ranks import RankFailed, Ranks, launch

PROGRAM = str(Path(__file__).parent / "programs" / "launched.py")
LAUNCH = """
import sys
from fastserve.ranks import launch
sys.exit(launch(int(sys.argv[1]), [sys.executable, *sys.argv[2:]]))
"""


@pytest.fixture(autouse=True)
def _this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


def start(size: int, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LAUNCH, str(size), PROGRAM, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_group_that_ends_well(size: int) -> None:
    assert launch(size, [sys.executable, PROGRAM, "ends"]) == 0


@pytest.mark.parametrize(
    ("case", "status", "rank", "why"),
    [
        ("dies early", 7, 1, "exited with status 7"),
        ("dies", 128 + 9, 2, "was ended by SIGKILL"),
        ("raises", 1, None, "exited with status 1"),
    ],
)
def test_one_line_says_who_ended_the_group_and_why(case: str, status: int, rank: int | None, why: str) -> None:
    launcher = start(3, case)
    begin = time.monotonic()
    _, errors = launcher.communicate(timeout=60)
    assert time.monotonic() - begin < 10
    assert launcher.returncode == status
    (line,) = [line for line in errors.splitlines() if line.startswith("fastserve: ")]
    assert f"rank {'' if rank is None else rank}" in line
    assert f" on {os.uname().nodename} (process " in line and why in line
    if case == "raises":
        assert "ValueError: no such layer" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_ranks_do_not_outlive_their_launcher(number: signal.Signals) -> None:
    launcher = start(2, "stays")
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "here\n"
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(children) == 2
    launcher.send_signal(number)
    launcher.communicate(timeout=30)  # until its ranks have closed its output, too


def test_the_caller_may_be_rank_0() -> None:
    """As `LLM(tensor_parallel_size=3)` is, in a program of the user's."""
    with Ranks([sys.executable, PROGRAM, "ends"], 3, first=1) as others:
        world = _C.join_shared_memory(others.path, 0, 3)
        tensor, pipeline = world.split(0, 0), world.split(0, 0)
        assert tensor is not None and pipeline is not None and pipeline.size == 1
        values = np.full(3, 1, np.float32)
        tensor.all_reduce_sum(values)
        assert values.tolist() == [6, 6, 6]
        assert others.wait(30)
        for part in (tensor, pipeline, world):
            part.close()


def test_waiting_has_an_end() -> None:
    with Ranks([sys.executable, "-c", "import threading; threading.Event().wait()"], 2) as ranks:
        assert not ranks.wait(0.01)
        assert len(ranks.processes) == 2


def test_a_program_that_cannot_be_started_leaves_nothing() -> None:
    gc.collect()  # what earlier tests have left is not to be closed meanwhile
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        Ranks(["/no/such/program"], 2)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_the_failure_says_all_there_is() -> None:
    with Ranks([sys.executable, "-c", "import os; os.abort()"], 1) as ranks, pytest.raises(RankFailed) as caught:
        ranks.wait()
    assert (caught.value.rank, caught.value.status) == (0, -signal.SIGABRT)
    assert str(ranks.processes[0]) in str(caught.value)


FORKS = """
import os, signal, sys
from fastserve.ranks import Ranks

RANK = "from fastserve.ranks import end_with_launcher; import signal; end_with_launcher(); signal.pause()"
ranks = Ranks([sys.executable, "-c", RANK], 2, first=1)
child = os.fork()
if child:
    print(child, *ranks.processes, flush=True)
signal.pause()
"""


def test_a_forked_child_of_the_launcher_keeps_no_ranks_alive() -> None:
    """Such as a worker of multiprocessing, which goes on when its parent has been killed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child, rank = map(int, parent.stdout.readline().split())
        handle = os.pidfd_open(rank)
        parent.kill()
        try:
            assert select.select([handle], [], [], 30.0)[0]
        finally:
            os.close(handle)
            for process in (child, rank):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
