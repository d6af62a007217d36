"""scripts/serve_mpi.sh and scripts/serve.slurm: what they refuse, and that they serve, on one host."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_model

from fastserve import distributed

SCRIPTS = Path(__file__).parents[2] / "scripts"
PROGRAMS = Path(__file__).parent / "programs"
MPIEXEC = Path(sys.prefix) / "bin" / "mpiexec"
TWO = ("--tensor-parallel-size", "2")
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1"}

with_mpi = pytest.mark.skipif(
    not MPIEXEC.exists() or distributed.mpi_library() is None, reason="no MPI: pip install mpich, then make build"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model.write(tmp_path_factory.mktemp("tiny")))


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(path for path in sys.path if path)
    known = {"PYTHON": sys.executable, "PYTHONPATH": paths, "STAND_IN_MPIEXEC": str(MPIEXEC)}
    known["PATH"] = os.pathsep.join([str(PROGRAMS), os.environ["PATH"]])
    return {**os.environ, **known, **more}


def refusal(script: str, *arguments: str, **more: str) -> str:
    """The one line that it says before it starts anything."""
    done = subprocess.run(
        [str(SCRIPTS / script), *arguments], capture_output=True, text=True, timeout=60, env=environment(**more)
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@contextmanager
def serving(command: list[str], more: Mapping[str, str]) -> Iterator[str]:
    """The server's address; in the end it is told to stop, and has to do it in order."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(**more)) as process:
        assert process.stderr is not None
        said: list[str] = []
        try:
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"at (http://[\d.]+:\d+)/v1 ", line):
                    yield found[1].replace("0.0.0.0", "127.0.0.1")
                    break
            else:
                pytest.fail("".join(said))
        except BaseException:
            process.kill()
            raise
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait() == 0


def completion(url: str) -> bytes:
    request = urllib.request.Request(
        f"{url}/v1/completions", b'{"prompt": "abc", "max_tokens": 4}', {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("elsewhere.invalid slots=2\n", r"the first host of .* must be this one .* and is elsewhere.invalid"),
        ("localhost slots=some\n", r":1: must be HOST, HOST:RANKS or HOST slots=RANKS, got 'localhost slots=some'"),
        ("localhost\n\nlocalhost:0\n", r":3: must be HOST, HOST:RANKS or HOST slots=RANKS, got 'localhost:0'"),
        ("localhost 2\n", r":1: must be HOST"),
        ("localhost slots=3\r\n", r" has 3 slots"),
        ("# all away\n", r" names no host"),
        ("localhost:3\n", r" has 3 slots, and --tensor-parallel-size 2 × --pipeline-parallel-size 1 are 2 ranks"),
    ],
)
def test_host_files_that_cannot_be(text: str, reason: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(text)
    assert re.search(reason, refusal("serve_mpi.sh", str(hosts), *TWO))


def test_options_that_cannot_be(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2  # this one\n")
    assert "no host file /nowhere/hosts" in refusal("serve_mpi.sh", "/nowhere/hosts", *TWO)
    assert "above 1" in refusal("serve_mpi.sh", str(hosts))
    assert "whole numbers from 1, got 'two'" in refusal("serve_mpi.sh", str(hosts), "--tensor-parallel-size=two")
    assert "--launcher is what this script is for" in refusal("serve_mpi.sh", str(hosts), "--launcher", "mpiexec")
    assert "no Python at PYTHON=/nowhere" in refusal("serve_mpi.sh", str(hosts), *TWO, PYTHON="/nowhere")
    assert "has no FastServe that works (" in refusal("serve_mpi.sh", str(hosts), *TWO, PYTHON="false")
    assert "no launcher at MPIEXEC=/nowhere" in refusal("serve_mpi.sh", str(hosts), *TWO, MPIEXEC="/nowhere")


@with_mpi
def test_a_launcher_of_another_library_is_refused(tmp_path: Path) -> None:
    hosts, other = tmp_path / "hosts", tmp_path / "mpirun"
    hosts.write_text("localhost:2\n")
    name = "Open MPI" if str(distributed.mpi_library()).startswith("MPICH") else "HYDRA"
    other.write_text(f"#!/bin/sh\necho 'mpirun ({name}) 1.0'\n")
    other.chmod(0o755)
    said = refusal("serve_mpi.sh", str(hosts), *TWO, MPIEXEC=str(other))
    assert f"FastServe was built with {distributed.mpi_library()}, and {other} is " in said
    other.write_text("#!/bin/sh\necho 'something else'\n")
    assert "is neither MPICH's nor Open MPI's launcher: something else" in refusal(
        "serve_mpi.sh", str(hosts), *TWO, MPIEXEC=str(other)
    )


def test_both_teach() -> None:
    for script, word in (("serve_mpi.sh", "node1 slots=2"), ("serve.slurm", "sbatch --nodes=4")):
        done = subprocess.run([str(SCRIPTS / script), "--help"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and word in done.stdout and done.stderr == ""


@with_mpi
def test_a_host_file_is_served(model: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    options = ["--model", model, "--port", "0", *TWO]
    with serving([str(SCRIPTS / "serve_mpi.sh"), str(hosts), *options], {}) as url:
        assert b'"completion_tokens":4' in completion(url)


def test_batch_jobs_that_cannot_be() -> None:
    assert "is for sbatch" in refusal("serve.slurm", *TWO, SLURM_JOB_ID="")
    assert "first node" in refusal("serve.slurm", *TWO, **{**BATCH, "SLURM_NODEID": "1"})
    assert "above 1" in refusal("serve.slurm", **BATCH)
    assert "has 2 tasks" in refusal("serve.slurm", "--tensor-parallel-size", "4", **BATCH)
    assert "--launcher is what" in refusal("serve.slurm", "--launcher=srun", **BATCH)


@with_mpi
def test_a_batch_job_serves(model: str) -> None:
    options = ["--model", model, "--port", "0", *TWO]
    with serving([str(SCRIPTS / "serve.slurm"), *options], BATCH) as url:
        assert b'"completion_tokens":4' in completion(url)


@with_mpi
def test_a_launcher_that_the_library_does_not_know_is_named(model: str) -> None:
    """As srun with an --mpi of another library: each process finds itself alone."""
    done = subprocess.run(
        [str(SCRIPTS / "serve.slurm"), "--model", model, "--port", "0", *TWO],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(**BATCH, STAND_IN_PMI="none"),
    )
    assert done.returncode != 0
    assert "srun started rank 0 of 2, but MPICH" in done.stderr and "an --mpi that it knows" in done.stderr
