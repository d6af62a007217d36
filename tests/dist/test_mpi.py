"""Groups that mpiexec starts: on this host, and as if on several."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from machines import CUDA

from fastserve import distributed

MPIEXEC = Path(sys.prefix) / "bin" / "mpiexec"
PROGRAM = Path(__file__).parent / "programs" / "under_mpi.py"
OUTLIVED = PROGRAM.with_name("outlived.sh")

pytestmark = pytest.mark.skipif(
    not MPIEXEC.exists() or distributed.mpi_library() is None, reason="no MPI: pip install mpich, then make build"
)


def mpiexec(size: int, case: str, *arguments: str, wrapper: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [str(MPIEXEC), "-n", str(size), *wrapper, sys.executable, str(PROGRAM), case, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def heard(size: int, case: str, *arguments: str, folder: Path, everywhere: bool = False) -> list[str]:
    """What ranks other than 1, or all, say of its end, where no launcher ends them first."""
    mpiexec(size, case, *arguments, wrapper=(str(OUTLIVED), str(folder), str(size)))
    errors = [file.read_text() for file in folder.glob("*.stderr")]
    statuses = [int(file.read_text()) for file in folder.glob("*.status")]
    assert statuses.count(3) == size - (not everywhere), errors
    return sorted(line for text in errors for line in text.splitlines() if " heard: " in line)


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_are_the_same_within_and_across_hosts(size: int) -> None:
    """Four ranks are more than some machines have cores."""
    shared = lines(mpiexec(size, "sums"))
    apart = lines(mpiexec(size, "sums", "1"))
    mixed = lines(mpiexec(size, "sums", "2"))
    assert [line.rpartition(" ")[0] for line in shared] == ["shared memory"] * size
    assert [line.rpartition(" ")[0] for line in apart] == ["across hosts"] * size
    assert len({line.rpartition(" ")[2] for line in shared + apart + mixed}) == 1


@pytest.mark.parametrize("arguments", [(), ("2",), ("1",)], ids=str)
def test_messages(arguments: tuple[str, ...]) -> None:
    assert lines(mpiexec(3, "messages", *arguments)) == ["messages"] * 3


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("per_host", ["1", "2"])
def test_devices_of_several_hosts_choose_one_cpus_tokens(per_host: str, device: str) -> None:
    """Their sums and activations go through the host's memory, and between hosts through MPI."""
    alone = lines(mpiexec(1, "alone", "1", "cpu"))
    assert [len(line.split()) for line in alone] == [4]
    assert lines(mpiexec(4, "decodes", per_host, device)) == alone


def test_a_grid_of_two_stages_on_two_hosts() -> None:
    hosts = "host0 host0 host1 host1"
    assert lines(mpiexec(4, "grid", "2")) == [
        f"0 0 11 101 {hosts}",
        f"0 1 11 1010 {hosts}",
        f"1 0 1100 101 {hosts}",
        f"1 1 1100 1010 {hosts}",
    ]


def test_a_killed_rank_ends_the_group() -> None:
    begin = time.monotonic()
    assert mpiexec(3, "killed").returncode != 0
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("arguments", [(), ("2",)], ids=str)
def test_all_others_name_a_killed_rank(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Across hosts: the rank that shares memory with it finds out, and tells the others."""
    said = heard(3, "killed", *arguments, folder=tmp_path)
    assert [line.split(" heard: ")[0] for line in said] == ["rank 0", "rank 2"]
    assert all("rank 1 on " in line and " is gone" in line for line in said)


@pytest.mark.parametrize("arguments", [(), ("1",), ("2",)], ids=str)
def test_an_exception_is_told_to_all(arguments: tuple[str, ...], tmp_path: Path) -> None:
    said = heard(3, "raises", *arguments, folder=tmp_path)
    assert [line.split(" heard: ")[0] for line in said] == ["rank 0", "rank 2"]
    assert all("rank 1 on " in line and "ValueError: no such layer" in line for line in said)


@pytest.mark.parametrize("arguments", [(), ("1",), ("2",)], ids=str)
def test_a_plan_that_fails_on_one_rank_is_told_to_all(arguments: tuple[str, ...], tmp_path: Path) -> None:
    said = heard(4, "plan", *arguments, folder=tmp_path, everywhere=True)
    assert [line.split(" heard: ")[0] for line in said] == [f"rank {rank}" for rank in range(4)]
    assert all("rank 1 on " in line and "block 9 of slot 0 is outside the pool of 8" in line for line in said)


@pytest.mark.parametrize("arguments", [(), ("1",)], ids=str)
def test_a_hung_rank_is_named(arguments: tuple[str, ...]) -> None:
    done = mpiexec(2, "hangs", *arguments)
    assert done.returncode != 0
    assert "rank 0 heard: " in done.stderr
    assert " seconds for rank 1 on " in done.stderr


def test_a_grid_that_does_not_fit_names_the_options() -> None:
    done = mpiexec(3, "grid")
    assert done.returncode != 0
    message = "tensor_parallel_size × pipeline_parallel_size: must be the number of ranks (3), got 2 × 1 = 2"
    assert message in done.stderr
