"""`fastserve simulate` at the edges of what it takes: blocks, sizes, and numbers in traces and profiles."""

from __future__ import annotations

from pathlib import Path

import pytest
from simulate_shell import Shell, trace_of

from fastserve.bench.experiment import Experiment
from fastserve.cost import CostModel
from fastserve.workloads import SimJob, write_trace


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def test_defaults_stay_within_the_blocks_that_are_kept_track_of(tmp_path: Path) -> None:
    tiny = Experiment(
        model="smollm2-135m",
        hardware="a100-80g",
        tensor_parallel_size=3,
        pipeline_parallel_size=30,
        jobs=3,
        scheduler={"block_size": 1},
    )
    config = tiny.setting().config
    assert (config.num_blocks, config.num_host_blocks) == (2**24, 2**24)
    trace = Path(trace_of(tmp_path / "long.jsonl", [(0.0, 2**25)]))
    long = Experiment(trace=trace, cost="constant:1", scheduler={"block_size": 1})
    assert long.setting().config.num_blocks == 2**24


@pytest.mark.parametrize("none", ["0", "0G", " 0 ", "0.0M"])
def test_swap_space_can_be_none(none: str) -> None:
    assert Experiment(swap_space=none, scheduler={}).setting().config.num_host_blocks == 0
    assert Experiment(scheduler={}).setting().config.num_host_blocks > 0


@pytest.mark.filterwarnings("error")
def test_a_profile_of_next_to_no_time_is_told_without_a_warning(shell: Shell, tmp_path: Path) -> None:
    CostModel(per_iteration=1e-320).save(tmp_path / "fast.json")
    shell("--cost", str(tmp_path / "fast.json"), "--jobs", "40", "--workers", "1", code=2)
    assert shell.errors.startswith("fastserve: --load: 0.9 of the inf jobs a second") and "RuntimeW" not in shell.errors


def test_a_job_needs_the_blocks_that_its_max_tokens_may_need(shell: Shell, tmp_path: Path) -> None:
    trace = tmp_path / "jobs.jsonl"
    write_trace(trace, [SimJob(0.0, 9, 9), SimJob(0.0, 5, 5, max_tokens=100), SimJob(0.0, 5, 5, max_tokens=100_000)])
    words = ["--trace", str(trace), "--cost", "constant:1", "--policy", "fcfs", "--workers", "1"]

    def error(*more: str) -> str:
        shell(*words, *more, code=2)
        return shell.errors

    second = "job 2 may need: a prompt of 5 tokens and max_tokens 100, in a context of 2048"
    third = "job 3 may need: a prompt of 5 tokens and max_tokens 100000, in a context of 2048"
    assert error("--kv-blocks", "6") == f"fastserve: --kv-blocks: must be at least 7, which {second}\n"
    for few in ("7", "127"):
        assert error("--kv-blocks", few) == f"fastserve: --kv-blocks: must be at least 128, which {third}\n"
    # The engine agrees, to the block: what is told to be enough is.
    assert len(shell.runs(*words[:-2], "--kv-blocks", "128")) == 1
    write_trace(trace, [SimJob(arrival, 5, 5, max_tokens=100) for arrival in (0.0, 1.0)])
    assert "--kv-blocks: must be at least 7, which job 1 may" in error("--kv-blocks", "6", "--load", "0.5")
    assert len(shell.runs(*words[:-2], "--kv-blocks", "7", "--load", "0.5")) == 1


def test_no_option_asks_for_more_than_another_allows(shell: Shell, tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "long.jsonl", [(0.0, 2**29)])
    shell("--trace", trace, "--cost", "constant:1", "--policy", "fcfs", code=2)
    needs = "33, with at most 16777216 KV blocks, which job 1 of 536870916 tokens needs"
    assert shell.errors == f"fastserve: --block-size: must be at least {needs}\n"


def test_numbers_no_engine_takes_are_told_by_file_and_line(shell: Shell, tmp_path: Path) -> None:
    trace = tmp_path / "jobs.jsonl"
    trace.write_text('{"arrival":0,"prompt_tokens":5,"output_tokens":5,"max_tokens":20000000000}\n')
    shell("--trace", str(trace), "--cost", "constant:1", code=2)
    assert shell.errors == (
        f"fastserve: --trace: {trace}, line 1: max_tokens must be at most 2147483647, got 20000000000\n"
    )
