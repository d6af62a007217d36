"""What a group that mpiexec starts leaves in /dev/shm, however it ends, and what it says where there is no room."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_model

from fastserve import distributed

MPIEXEC = Path(sys.prefix) / "bin" / "mpiexec"
PROGRAMS = Path(__file__).parent / "programs"
SHARED = Path("/dev/shm")
# A /dev/shm of its own, for a command: of so many KB, the names that are left there going to a file.
OWN = """
mount -t tmpfs -o size="$1"k tmpfs /dev/shm || exit 99
left="$2"
shift 2
"$@"
status=$?
ls -A /dev/shm > "$left"
exit $status
"""
IN_OWN = ["unshare", "--mount", "--map-root-user", "sh", "-c", OWN, "sh"]

pytestmark = pytest.mark.skipif(
    not MPIEXEC.exists() or distributed.mpi_library() is None, reason="no MPI: pip install mpich, then make build"
)


@pytest.fixture(scope="module")
def own_is_possible(tmp_path_factory: pytest.TempPathFactory) -> bool:
    left = str(tmp_path_factory.mktemp("own") / "left")
    return shutil.which("unshare") is not None and subprocess.run([*IN_OWN, "64", left, "true"]).returncode == 0


def mpiexec(*arguments: str, wrapper: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [*(wrapper or []), str(MPIEXEC), "-n", "2", sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def left_by(own: bool, folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """What two ranks said, and the names that they left in /dev/shm."""
    if own:
        done = mpiexec(*arguments, wrapper=[*IN_OWN, "262144", str(folder / "left")])
        return done, {*(folder / "left").read_text().splitlines()}
    before = {path.name for path in SHARED.iterdir()}
    done = mpiexec(*arguments)
    return done, {path.name for path in SHARED.iterdir()} - before


def test_a_killed_rank_leaves_nothing(own_is_possible: bool, tmp_path: Path) -> None:
    done, left = left_by(own_is_possible, tmp_path, str(PROGRAMS / "under_mpi.py"), "killed")
    assert done.returncode != 0
    assert left == set()


def test_a_refused_model_leaves_nothing(own_is_possible: bool, tmp_path: Path) -> None:
    options = '{"model": "/nowhere", "tensor_parallel_size": 2}'
    worker = ["-m", "fastserve.worker", "--address", f"ipc://{tmp_path}/socket", "--options", options]
    done, left = left_by(own_is_possible, tmp_path, *worker)
    assert done.returncode != 0
    assert left == set()


def test_a_rank_that_does_not_come_leaves_nothing(own_is_possible: bool, tmp_path: Path) -> None:
    """Those that wait for it have shared memory already."""
    done, left = left_by(own_is_possible, tmp_path, str(PROGRAMS / "comes_late.py"), "ends")
    assert done.returncode != 0
    assert left == set()


def test_a_group_that_ends_well_leaves_nothing(own_is_possible: bool, tmp_path: Path) -> None:
    """Though MPI, when it ends, finds that its names are gone."""
    model = str(tiny_model.write(tmp_path / "tiny"))
    done, left = left_by(own_is_possible, tmp_path, str(PROGRAMS / "script.py"), model, "2", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert left == set()


def test_no_room_is_said_in_one_line(own_is_possible: bool, tmp_path: Path) -> None:
    """And is no SIGBUS. A group after it, with room, starts."""
    if not str(distributed.mpi_library()).startswith("MPICH"):
        pytest.skip("Open MPI does without")
    if not own_is_possible:
        pytest.skip("this system grants no /dev/shm of its own")
    done = mpiexec(str(PROGRAMS / "under_mpi.py"), "sums", wrapper=[*IN_OWN, "1024", str(tmp_path / "left")])
    assert done.returncode == 2, done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("fastserve: ")]
    assert said
    for line in said:
        assert "/dev/shm is full: MPI needs about 2.2 MB there for 2 ranks on " in line
        assert "of 1.0 MB 0.0 are free" in line and "mpich_shm_*" in line and "--shm-size" in line
    assert (tmp_path / "left").read_text() == ""
    enough = mpiexec(str(PROGRAMS / "under_mpi.py"), "sums", wrapper=[*IN_OWN, "4096", str(tmp_path / "left")])
    assert enough.returncode == 0, enough.stderr
