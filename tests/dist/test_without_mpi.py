"""What those are told who lack an MPI library, and that nobody else notices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastserve
from fastserve import distributed

CONNECT = "from fastserve.distributed import Grid, connect; connect(Grid(2))"
LIBRARY = distributed.mpi_library()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """FastServe as it would be installed, without the plugin."""
    source = Path(fastserve.__file__).parent
    shutil.copytree(source, tmp_path / "fastserve", ignore=shutil.ignore_patterns("_mpi.so", "__pycache__"))
    return tmp_path


def run(package: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(package), *(path for path in sys.path if path and "site-packages" in path)]
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=package,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
    )


def test_one_process_needs_none(package: Path) -> None:
    done = run(package, "from fastserve.distributed import Grid, connect; print(connect(Grid()).size)")
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_several_are_told_what_is_missing(package: Path) -> None:
    done = run(package, CONNECT, PMI_RANK="0", PMI_SIZE="2")
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    if LIBRARY is not None:
        assert "MPI cannot be used: " in message and "_mpi.so" in message
        assert f"FastServe was built with {LIBRARY}: install that, or build again" in message
    else:
        assert "FastServe was built without MPI: install the mpich or openmpi package" in message


@pytest.mark.skipif(LIBRARY is None, reason="a build without MPI")
def test_a_launcher_that_the_library_does_not_know_is_named() -> None:
    """Started by srun without PMI, MPI believes to be alone."""
    done = run(Path(fastserve.__file__).parents[1], CONNECT, SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="2")
    assert done.returncode == 1
    assert "srun started rank 1 of 2, but" in done.stderr and "sees rank 0 of 1" in done.stderr
