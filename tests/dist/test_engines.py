"""Engines of several ranks as users start them: a script, mpiexec, the API server's worker; and how they end."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chaos
import psutil
import pytest
import tiny_model
from served import Server, exchange, until

from fastserve import LLM, EngineError, InvalidRequest, SamplingParams, distributed
from fastserve.distributed import Grid, GroupError
from fastserve.placement import ended_by_others, place

MPIEXEC = Path(sys.prefix) / "bin" / "mpiexec"
SCRIPT = str(Path(__file__).parent / "programs" / "script.py")
LAYOUTS = [(2, 1), (1, 2), (2, 2)]
PROMPTS = ["abc", "the quick brown fox", [5, 6, 7, 8]]
PARAMS = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)

with_mpi = pytest.mark.skipif(
    not MPIEXEC.exists() or distributed.mpi_library() is None, reason="no MPI: pip install mpich, then make build"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model.write(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def _this_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For the ranks, too; none of which is left afterwards."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    assert not {child.pid for child in psutil.Process().children(recursive=True)} - before


def load(model: str, tensor: int, pipeline: int, **options: Any) -> LLM:
    sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    return LLM(model, dtype="float32", kv_cache_memory="1M", swap_space="1M", threads=1, **sizes, **options)


def tokens_of(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


def test_tokens_are_those_of_one_process(model: str) -> None:
    with load(model, 1, 1) as llm:
        alone = tokens_of(llm)
    for layout in LAYOUTS:
        with load(model, *layout) as llm:
            assert tokens_of(llm) == alone
            ranks = llm.info["ranks"]
            assert [each["rank"] for each in ranks] == list(range(layout[0] * layout[1]))
            assert ranks[0]["process"] == os.getpid()
        assert not any(psutil.pid_exists(each["process"]) for each in ranks[1:])


def test_one_plan_a_stage_is_in_flight(model: str) -> None:
    with load(model, 1, 2) as llm:
        assert llm.info["max_in_flight"] == 2 and llm.info["stages"] == [1, 1]
    with pytest.raises(InvalidRequest, match=r"^max_in_flight: must be at most the 2 stages, got 3"):
        load(model, 1, 2, max_in_flight=3)


def test_a_killed_rank_is_named_at_once(model: str) -> None:
    llm = load(model, 2, 2)
    victim = llm.info["ranks"][2]["process"]
    began: list[float] = []

    def kill() -> None:
        os.kill(victim, signal.SIGKILL)
        began.append(time.monotonic())

    stream = llm.stream("abc", SamplingParams(max_tokens=4000, ignore_eos=True))
    next(stream)
    threading.Thread(target=kill).start()
    with pytest.raises(EngineError, match=rf"rank 2 on .* \(process {victim}\) (was ended by SIGKILL|is gone)"):
        list(stream)
    assert time.monotonic() - began[0] < 5
    llm.close()


def test_a_hung_rank_is_named_when_the_time_is_up(model: str) -> None:
    with load(model, 2, 1, rank_timeout=0.5) as llm:
        hung = llm.info["ranks"][1]["process"]
        stream = llm.stream("abc", SamplingParams(max_tokens=4000, ignore_eos=True))
        next(stream)
        os.kill(hung, signal.SIGSTOP)
        with pytest.raises(EngineError, match=rf"has waited .* seconds for rank 1 on .* \(process {hung}\)"):
            list(stream)


def test_a_hung_rank_of_the_last_stage_is_named_when_the_time_is_up(model: str) -> None:
    """Which rank 0 is not waiting for in any sum or message of an iteration."""
    with load(model, 1, 2, rank_timeout=0.5) as llm:
        hung = llm.info["ranks"][1]["process"]
        stream = llm.stream("abc", SamplingParams(max_tokens=4000, ignore_eos=True))
        next(stream)
        os.kill(hung, signal.SIGSTOP)
        with pytest.raises(EngineError, match=rf"has waited .* seconds for rank 1 on .* \(process {hung}\)"):
            list(stream)


def test_a_grid_that_does_not_fit_is_refused_before_anything_starts(model: str) -> None:
    with pytest.raises(
        InvalidRequest, match=r"^tensor_parallel_size: must be at most 4, for the model has as many heads"
    ):
        load(model, 5, 1)
    with pytest.raises(InvalidRequest, match=r"^pipeline_parallel_size: must be at most 2"):
        load(model, 1, 3)
    for timeout in (0, -1, float("nan"), "3"):
        with pytest.raises(InvalidRequest, match=r"^rank_timeout: must be seconds, above 0"):
            load(model, 2, 1, rank_timeout=timeout)
    with pytest.raises(InvalidRequest, match=r"must be 1 for a module in memory"):
        place(Grid(2), None)


def test_a_rank_that_does_not_come_is_named() -> None:
    began = time.monotonic()
    with pytest.raises(GroupError, match=r"rank 1 on .* \(process \d+\) exited with status 3"):
        place(Grid(2), [sys.executable, "-c", "raise SystemExit(3)"])
    assert time.monotonic() - began < 10


def test_whose_fault_the_end_of_a_rank_is() -> None:
    """A job that was computed when somebody killed a rank did not bring it down (server/ledger.py)."""
    rank = "rank 1 on here (process 7)"
    for said, by_others in (
        (f"{rank} is gone", True),
        (f"{rank} was ended by SIGKILL; the group was ended", True),
        (f"{rank} has not been heard of for 3.0 seconds", True),
        (f"{rank} was ended by SIGSEGV; the group was ended", False),
        (f"{rank} exited with status 1; the group was ended", False),
        (f"{rank}: RuntimeError: the disk is gone, says the kernel", False),
        (f"rank 0 on here (process 6) has waited 3 seconds for {rank}", False),
    ):
        assert ended_by_others(GroupError(said)) is by_others, said


def mpiexec(size: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(MPIEXEC), "-n", str(size), sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@with_mpi
def test_a_script_under_mpiexec(model: str) -> None:
    """Rank 0 gets the results; the others end when it is done with them."""
    with load(model, 1, 1) as llm:
        alone = tokens_of(llm)
    done = mpiexec(4, model, "2", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{alone}\n"


@with_mpi
def test_what_one_rank_lacks_is_told_by_rank_0(model: str, tmp_path: Path) -> None:
    began = time.monotonic()
    done = mpiexec(2, model, "2", "1", str(tmp_path / "nothing"))
    assert done.returncode != 0 and time.monotonic() - began < 20
    assert "GroupError: rank 1 on " in done.stderr and "nothing" in done.stderr


@with_mpi
def test_a_worker_by_hand_says_why_it_does_not_start() -> None:
    program = [sys.executable, "-m", "fastserve.worker", "--address", "ipc:///nowhere"]
    options = '{"model": "/nowhere/model", "tensor_parallel_size": 2}'
    command = [str(MPIEXEC), "-n", "2", *program, "--options", options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "/nowhere/model: no such file" in done.stderr


@with_mpi
def test_the_command_gets_its_prompt_on_rank_0(model: str) -> None:
    command = [str(MPIEXEC), "-n", "2", sys.executable, "-m", "fastserve", "generate", "--model", model]
    sizes = ["--tensor-parallel-size", "2", "--max-tokens", "5", "--temperature", "0", "--ignore-eos"]
    done = subprocess.run([*command, *sizes], input="abc", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) == 5


@with_mpi
def test_ranks_of_different_models_do_not_start(model: str, tmp_path: Path) -> None:
    other = str(tiny_model.write(tmp_path / "other", seed=0))
    config = Path(other, "config.json")
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    done = mpiexec(2, model, "2", "1", other)
    assert done.returncode != 0
    assert "model: must be the same on all ranks: rank 1 on " in done.stderr


@with_mpi
def test_ranks_of_other_weights_do_not_start(model: str, tmp_path: Path) -> None:
    """A stale copy on one host: a model of the same shape."""
    done = mpiexec(2, model, "2", "1", str(tiny_model.write(tmp_path / "other", seed=1)))
    assert done.returncode != 0 and done.stdout == ""
    assert "model: must be the same on all ranks: rank 1 on " in done.stderr


@with_mpi
def test_as_many_ranks_as_places(model: str) -> None:
    done = mpiexec(3, model, "2", "1")
    assert done.returncode != 0
    assert "must be the number of ranks (3), got 2 × 1 = 2" in done.stderr


def test_an_idle_engine_notices_that_a_rank_has_died(model: str) -> None:
    """Before anybody has to wait for another engine."""

    async def work() -> None:
        async with Server(["--model", model, "--tensor-parallel-size", "2", "--kv-cache-memory", "1M"]) as server:
            before = await server.engines()
            os.kill(before[1], signal.SIGKILL)

            async def replaced() -> bool:
                return (await server.health())["engine"]["restarts"] == 1

            await until(replaced, 30.0)
            assert not {*before} & {*await server.engines()}

    asyncio.run(work())


def test_the_server_says_which_rank_of_the_last_stage_hangs(model: str) -> None:
    """Before it would kill an engine of which it does not know why it is silent."""

    async def work() -> None:
        options = ["--pipeline-parallel-size", "2", "--kv-cache-memory", "1M", "--heartbeat-timeout", "6"]
        async with Server(["--model", model, *options]) as server:
            _, hung = await server.engines()
            os.kill(hung, signal.SIGSTOP)
            request = {"prompt": "abc", "max_tokens": 4, "ignore_eos": True}
            async with exchange(server, "POST", "/v1/completions", request) as answer:
                assert b'"completion_tokens":4' in b"".join([piece async for piece in answer.pieces()])
            assert (await server.health())["engine"]["restarts"] == 1
            said = server.log()
            assert re.search(rf"has waited [\d.]+ seconds for rank 1 on .* \(process {hung}\)", said), said

    asyncio.run(work())


def test_a_stopped_rank_does_not_outlive_a_killed_server(model: str) -> None:
    """It cannot notice that it is alone: rank 0 ends it."""

    async def work() -> None:
        async with Server(["--model", model, "--pipeline-parallel-size", "2", "--kv-cache-memory", "1M"]) as server:
            handles = [os.pidfd_open(pid) for pid in await server.engines()]
            os.kill((await server.engines())[1], signal.SIGSTOP)
            os.kill(server.pid, signal.SIGKILL)
            try:
                for handle in handles:
                    assert select.select([handle], [], [], 30.0)[0]
            finally:
                for handle in handles:
                    os.close(handle)

    asyncio.run(work())


def test_no_request_is_lost_when_ranks_die(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """benchmarks/chaos.py at 2 × 2, small: any of the four is killed, and one is stopped."""
    options = ["--kills", "4", "--stop", "1", "--streams", "12", "--tokens", "400", "--window", "0.3"]
    layout = ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"]
    code = chaos.main(["--model", model, "--heartbeat-timeout", "3", *options, "--options", *layout])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err


@with_mpi
def test_nor_where_a_launcher_starts_them(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kills", "2", "--stop", "0", "--streams", "8", "--tokens", "400", "--window", "0.3"]
    layout = ["--tensor-parallel-size", "2", "--launcher", str(MPIEXEC)]
    code = chaos.main(["--model", model, "--heartbeat-timeout", "4", *options, "--options", *layout])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
