"""Ranks that do not come together, under mpiexec: the others say so, soon, and end."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from fastserve import distributed
from fastserve.distributed import Grid, connect
from fastserve.ipc import Failed, FromEngine, Here
from fastserve.joining import LIMIT_VARIABLE, limit_of
from fastserve.types import InvalidRequest

MPIEXEC = Path(sys.prefix) / "bin" / "mpiexec"
PROGRAM = str(Path(__file__).parent / "programs" / "comes_late.py")
HERE = socket.gethostname()

with_mpi = pytest.mark.skipif(
    not MPIEXEC.exists() or distributed.mpi_library() is None, reason="no MPI: pip install mpich, then make build"
)


def said_of(case: str, *wrapper: str, **more: str) -> str:
    """The line of rank 0 of two, where rank 1 does not come."""
    command = [str(MPIEXEC), "-n", "2", *wrapper, sys.executable, PROGRAM, case]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **more}
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode != 0 and time.monotonic() - began < 15
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fastserve: ")]
    assert line.startswith(f"fastserve: rank 0 of 2 on {HERE}: ")
    return line


@with_mpi
@pytest.mark.parametrize("case", ["ends", "raises"])
@pytest.mark.parametrize("wrapper", [(), ("sh", "-c", '"$@"; exit $?', "sh")], ids=["bare", "wrapped"])
def test_a_rank_that_ends_before_the_others_come_is_named(case: str, wrapper: tuple[str, ...]) -> None:
    assert f"rank 1 on {HERE} has ended before the ranks came together" in said_of(case, *wrapper)


@with_mpi
def test_the_server_is_told(tmp_path: Path) -> None:
    """By rank 0, whose main thread is in MPI_Init."""
    options = '{"model": "/nowhere", "tensor_parallel_size": 2}'
    only_0 = ["sh", "-c", 'test "${PMI_RANK-$OMPI_COMM_WORLD_RANK}" = 0 || exit 0; exec "$@"', "sh"]
    worker = [sys.executable, "-m", "fastserve.worker", "--address", f"ipc://{tmp_path}/socket", "--options", options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket_of_server:
        socket_of_server.bind(f"ipc://{tmp_path}/socket")
        done = subprocess.run([str(MPIEXEC), "-n", "2", *only_0, *worker], timeout=60, env=environment)
        assert done.returncode != 0
        decode = msgspec.msgpack.Decoder(FromEngine).decode
        here, failed = (decode(socket_of_server.recv(zmq.NOBLOCK)) for _ in range(2))
    assert isinstance(here, Here) and isinstance(failed, Failed)
    assert failed.message.startswith(f"rank 0 of 2 on {HERE}: rank 1 on {HERE} has ended before the ranks came ")


@with_mpi
def test_ranks_that_do_not_come_are_not_waited_for_without_a_limit() -> None:
    line = said_of("stays", **{LIMIT_VARIABLE: "1.5"})
    assert "others of the 2 ranks that mpiexec started have not reached MPI_Init within 1.5 seconds" in line
    assert f"on {HERE} there are ranks 0, 1" in line and LIMIT_VARIABLE in line


def test_how_long_ranks_are_waited_for() -> None:
    """Longer where there are many, which read Python from one place."""
    assert limit_of(1.5, 2, {}) == 21.0
    assert limit_of(22.5, 2, {}) == 23.5
    assert limit_of(22.5, 512, {}) == 278.5
    assert limit_of(math.inf, 4, {}) == 122.0
    assert limit_of(22.5, 512, {LIMIT_VARIABLE: "5"}) == 5.0


@pytest.mark.parametrize("given", ["soon", "0", "-1", "nan"])
def test_a_limit_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PMI_RANK", "0"), ("PMI_SIZE", "2"), (LIMIT_VARIABLE, given)):
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidRequest, match=f"^{LIMIT_VARIABLE}: must be seconds"):
        connect(Grid(2))
