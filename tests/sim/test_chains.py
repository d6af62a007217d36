"""Programs in the simulator: who comes when, what prompts hold, and what is told of it all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulate_shell import Shell, policies

from fastserve.bench.simulation import Point, Setting, capacity, run
from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel
from fastserve.simulator import SimulationTotals, simulate
from fastserve.types import InvalidRequest, Job
from fastserve.workloads import SimJob, calls_of, parse_load, read_trace, write_trace
from fastserve.workloads.content import ContentPrompt

ROOMY = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=8192, num_blocks=100_000, max_model_len=8192)
SECOND = CostModel.constant(1.0)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("COLUMNS", "160")
    return Shell(capsys)


def simulated(
    jobs: Iterable[SimJob], config: SchedulerConfig = ROOMY, **more: Any
) -> tuple[list[Job], SimulationTotals]:
    done: list[Job] = []
    totals = simulate(jobs, config, SECOND, on_finish=done.append, **more)
    return sorted(done, key=lambda job: job.index), totals


def test_a_call_comes_when_the_one_before_has_ended_and_it_was_thought_about() -> None:
    last = SimJob(0.0, 9, 1)
    chain = SimJob(0.5, 4, 3, then=SimJob(0.0, 4, 2, then=last, think_time=0.25), think_time=2.0)
    done, totals = simulated([chain, SimJob(1.0, 4, 8)], replace(ROOMY, policy="fcfs", max_num_seqs=1))
    # Alone in the device: the first until 3.5, the other until 11.5, and then the calls that came at 5.5 and 13.75.
    assert [(job.arrival, job.metrics.finish, len(job.output)) for job in done] == [
        (0.5, 3.5, 3), (1.0, 11.5, 8), (5.5, 13.5, 2), (13.75, 14.75, 1)
    ]  # fmt: skip
    assert [job.job_id for job in done] == ["0", "1", "2", "3"] and totals.jobs == 4


def test_a_call_of_the_same_time_as_a_job_comes_behind_it() -> None:
    chain = SimJob(0.0, 4, 3, then=SimJob(0.0, 5, 1), think_time=2.0)
    done, _ = simulated([chain, SimJob(5.0, 6, 1), SimJob(5.0, 7, 1)], replace(ROOMY, max_num_seqs=1))
    assert [(len(job.prompt), job.arrival) for job in done] == [(4, 0.0), (6, 5.0), (7, 5.0), (5, 5.0)]


def test_the_next_prompt_holds_the_last_one_and_what_was_put_out_to_it() -> None:
    (job,) = parse_load("chat:5,1,0,20,30,40", "poisson").jobs(3, 5, 1.0)
    done, totals = simulated([job])
    assert [job.output[-1] for job in done] == [1] * 5, "each ends by itself"
    for before, after in pairwise(done):
        both = [*before.prompt, *before.output]
        assert list(after.prompt)[: len(both)] == both
        assert len(after.prompt) > len(both)
    fresh = list(ContentPrompt(list(calls_of(job))[-1], 2, 2**31 - 1))
    lengths = [(len(each.prompt), len(each.output)) for each in done[:-1]]
    for start, tokens in lengths:
        fresh[start : start + tokens] = [0] * (tokens - 1) + [1]
    assert list(done[-1].prompt) == fresh, "all but the answers is what the content says"
    assert totals.prompt_tokens == sum(len(each.prompt) for each in done)


def test_an_answer_that_a_limit_cut_is_in_the_prompt_as_it_is() -> None:
    content = tuple(range(8))
    after = SimJob(0.0, 30, 1, content=content, content_block=4)
    before = SimJob(0.0, 10, 9, max_tokens=4, content=content[:3], content_block=4, then=after)
    first, second = simulated([before])[0]
    assert first.output == [0, 0, 0, 0]
    assert list(second.prompt)[:14] == [*first.prompt, 0, 0, 0, 0] and 0 not in list(second.prompt)[14:]


def test_prompts_without_content_hold_no_tokens() -> None:
    (job,), _ = simulated([SimJob(0.0, 5000, 1)])
    assert isinstance(job.prompt, range)


def test_jobs_tell_whose_they_are_and_programs_where_they_are_wanted() -> None:
    load = parse_load("chat:2,2,0,5,5,16", "poisson")
    done, _ = simulated(load.jobs(0, 6, 1.0))
    assert {(job.program, job.tenant) for job in done} == {
        ("chat-0", "user-0"), ("chat-1", "user-1"), ("chat-2", "user-0")
    }  # fmt: skip
    done, _ = simulated(load.jobs(0, 6, 1.0), program_ids=False)
    assert {job.program for job in done} == {None}


def test_a_call_that_nobody_can_serve_is_named() -> None:
    chain = SimJob(0.0, 4, 1, then=SimJob(0.0, 5, 0))
    with pytest.raises(InvalidRequest, match="output_tokens: must be at least 1, got 0") as caught:
        simulated([chain])
    assert caught.value.request == 1


def test_programs_and_users_are_told() -> None:
    class Load:
        name, longest = "by hand", 16

        def jobs(self, seed: int, count: int, rate: float) -> Iterable[SimJob]:
            second = SimJob(0.0, 4, 1, "ann", program="a")
            yield SimJob(0.0, 4, 2, "ann", program="a", then=second, think_time=5.0)
            yield SimJob(1.0, 4, 4, "bob", program="b")

    setting = Setting(workload=Load(), jobs=3, config=ROOMY, cost=SECOND)
    told = run(setting, Point("fcfs", 1.0, 0)).as_dict()
    # The first program from 0 over 2 and 7 to 8, the other from 1 to 5.
    assert (told["programs"], told["mean_program_completion"]) == (2, 6.0)
    assert told["p95_program_completion"] == np.percentile([8.0, 4.0], 95)
    assert told["users"] == {
        "ann": {"jobs": 2, "mean_jct": 1.5, "p95_jct": np.percentile([2.0, 1.0], 95)},
        "bob": {"jobs": 1, "mean_jct": 4.0, "p95_jct": 4.0},
    }
    assert told["hit_rate"] is None
    # Without the first job, its program is no longer a whole one.
    told = run(replace(setting, warmup_jobs=1), Point("fcfs", 1.0, 0)).as_dict()
    assert (told["programs"], told["mean_program_completion"], told["users"]["ann"]["jobs"]) == (1, 4.0, 1)


def test_programs_of_two_users_are_two_whatever_their_names() -> None:
    class Load:
        name, longest = "by hand", 16

        def jobs(self, seed: int, count: int, rate: float) -> Iterable[SimJob]:
            yield SimJob(0.0, 4, 2, "ann", program="agent")
            yield SimJob(100.0, 4, 4, "bob", program="agent")
            yield SimJob(200.0, 4, 6, program="agent")

    setting = Setting(workload=Load(), jobs=3, config=ROOMY, cost=SECOND)
    told = run(setting, Point("fcfs", 1.0, 0)).as_dict()
    assert (told["programs"], told["mean_program_completion"]) == (3, 4.0)
    told = run(replace(setting, warmup_jobs=1), Point("fcfs", 1.0, 0)).as_dict()
    assert (told["programs"], told["mean_program_completion"]) == (2, 5.0), "one of them began in the warm-up"


def test_a_call_finds_the_prompt_before_and_what_was_put_out_to_it() -> None:
    job = next(parse_load("agents:9,1", "poisson").jobs(1, 90, 1.0))
    done, totals = simulated([job])
    assert done[0].metrics.cached_tokens == 0 and len(done) >= 2
    for before, after in pairwise(done):
        held = len(before.prompt) + len(before.output) - 1  # the last token put out has no KV
        assert after.metrics.cached_tokens == held // 16 * 16
    assert totals.cached_tokens == sum(each.metrics.cached_tokens for each in done)


@pytest.mark.parametrize("spec", ["chat:4,3,2", "agents:6,0.5"])
def test_with_memory_for_all_as_much_is_found_as_can_be(spec: str) -> None:
    setting = Setting(workload=parse_load(spec, "poisson"), jobs=200, config=ROOMY, cost=CostModel.constant(0.001))
    told = run(setting, Point("skip-join-mlfq", 1.0, 0))
    assert told.hit_rate is not None and told.hit_rate_bound is not None and told.hit_rate_bound > 0.5
    assert 0.99 * told.hit_rate_bound <= told.hit_rate <= told.hit_rate_bound


def test_nothing_is_found_where_nothing_is_kept() -> None:
    load = parse_load("chat:3,1,0,20,30,40", "poisson")
    config = replace(ROOMY, enable_prefix_caching=False)
    told = run(Setting(workload=load, jobs=30, config=config, cost=SECOND), Point("fcfs", 1.0, 0))
    assert told.hit_rate == 0.0 and told.hit_rate_bound is not None and told.hit_rate_bound > 0.5


def test_the_capacity_of_programs_is_that_of_their_calls() -> None:
    """Where every iteration takes a second and every call two tokens, four places do two calls a second."""
    load = parse_load("chat:4,1,1000,1,2,0", "poisson")

    class Two:
        name, longest = "two", load.longest

        def jobs(self, seed: int, count: int, rate: float) -> Iterable[SimJob]:
            for number in range(count // 4):
                job = SimJob(0.0, 5, 2)
                for _ in range(3):
                    job = SimJob(float(number), 5, 2, then=job, think_time=1000.0)
                yield job

    setting = Setting(workload=Two(), jobs=400, config=ROOMY, cost=SECOND)
    assert capacity(setting, 0) == pytest.approx(2.0, rel=0.01)


# --- the command ------------------------------------------------------------------------------------------------------

QUICK = ["--cost", "constant:0.01", "--jobs", "60", "--max-num-seqs", "4", "--workers", "1"]


def test_a_workload_becomes_a_trace_of_mooncakes(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    words = ["--workload", "chat:3,2,1,700,300,512", *QUICK]
    text = shell(*words, "--rate", "4", "--write-trace", str(path))
    assert text == f"60 jobs written as {path}\n"
    assert len(json.loads(path.read_text().splitlines()[-1])["hash_ids"]) >= 1
    jobs = list(read_trace(path))
    # A call comes behind the one before by what that takes alone, a hundredth of a second a token, and the think-time.
    (program, *_) = parse_load("chat:3,2,1,700,300,512", "poisson").jobs(0, 60, 4.0)
    first, second, _ = calls_of(program)
    found = next(job for job in jobs if job.prompt_tokens == second.prompt_tokens)
    assert found.arrival == pytest.approx(0.01 * first.output_tokens + first.think_time, abs=0.002)
    (told,) = shell.runs("--trace", str(path), *QUICK[:2], "--policy", "fcfs")
    assert told["jobs"] == 60 and 0 < told["hit_rate_bound"] < 1 and 0 <= told["hit_rate"] <= told["hit_rate_bound"]
    assert shell(*words, "--write-trace", str(path)).startswith("60 jobs"), "at load 0.9"


def test_a_trace_may_be_written_over_itself(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(path, [SimJob(float(number), 600, 4, content=(7, number)) for number in range(20)])
    assert shell("--trace", str(path), *QUICK[:2], "--write-trace", str(path)) == f"20 jobs written as {path}\n"
    assert [job.content for job in read_trace(path)] == [(0, number) for number in range(1, 21)]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--write-trace x --rate 1 --rate 2", "--write-trace: writes one workload"),
        ("--write-trace x --seeds 2", "--write-trace: writes one workload"),
        ("--write-trace /no/such/folder/x --rate 1", "--write-trace: cannot write /no/such/folder/x: No such file"),
        ("--tenant-weight ann", "--tenant-weight: must be NAME=WEIGHT with a number above 0, such as ann=2, got 'ann'"),
        ("--workload chat:0,1", "--workload: the turns of chat"),
    ],
)
def test_options_are_explained(shell: Shell, words: str, message: str) -> None:
    shell(*QUICK, *words.split(), code=2)
    assert message in " ".join(shell.errors.split())


def test_a_table_tells_programs_users_and_what_was_cached(shell: Shell) -> None:
    words = ["--workload", "chat:3,2", *QUICK, *policies("fcfs", "srpt"), "--no-enable-prefix-caching"]
    text = shell(*words, "--tenant-weight", "user-0=2", "--no-program-ids")
    assert "program (s)" in text and "0.0 of " in text and "user-0" in text and "user-1" in text
    assert "no prefix cache · no program ids" in text
    assert "program (s)" not in shell("--workload", "alpaca", *QUICK, *policies("fcfs"))


def test_a_trace_of_programs_is_simulated(shell: Shell, tmp_path: Path) -> None:
    load = parse_load("agents:4,0.5", "poisson")
    path = tmp_path / "agents.jsonl"
    write_trace(path, load.jobs(0, 60, 1.0))
    words = [*QUICK[:2], "--policy", "fcfs", "--max-num-seqs", "4"]
    (replayed,), (drawn,) = (
        shell.runs("--trace", str(path), *words),
        shell.runs("--workload", "agents:4,0.5", "--rate", "1", "--jobs", "60", *words),
    )
    for each in (replayed, drawn):
        for name in ("workload", "rate"):
            del each[name]
    assert replayed == drawn
