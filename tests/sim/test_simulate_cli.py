"""`fastserve simulate`: hand-worked schedules, the JSON, sweeps, tables, pictures and errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from simulate_shell import Shell, policies, trace_of

from fastserve.bench.experiment import DEFAULT_POLICIES
from fastserve.bench.simulation import RunSummary, TimelineJob
from fastserve.bench.simulation_tables import estimate_text, gantt, levels_of, print_runs
from fastserve.bench.stats import Estimate
from fastserve.bench.tables import number
from fastserve.cost import CostModel
from fastserve.policies import POLICIES
from fastserve.presets import DEVICES, MODELS
from fastserve.workloads.specs import ARRIVALS, WORKLOADS
from fastserve.workloads.specs import PROGRAMS as PROGRAM_WORKLOADS

# Prompts of four tokens, which one iteration prefills: (arrival, output tokens).
THREE_JOBS = [(0.0, 3), (0.5, 3), (1.0, 1)]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("COLUMNS", "120")
    return Shell(capsys)


@pytest.fixture
def three_jobs(tmp_path: Path) -> str:
    return trace_of(tmp_path / "three.jsonl", THREE_JOBS)


# --- schedules worked out by hand, every iteration as long as the next -----------------------------------------------


@pytest.mark.parametrize(
    ("policy", "batch", "jcts"),
    [
        ("fcfs", 1, [3.0, 5.5, 6.0]),  # runs 000 111 2
        ("srpt", 1, [4.0, 6.5, 1.0]),  # 0 2 00 111: with one token to go, the third is the shortest at 1 s
        ("mlfq", 1, [5.0, 6.5, 2.0]),  # 0 1 2 00 11: one token in level 0, then two in level 1
        ("skip-join-mlfq", 1, [5.0, 6.5, 2.0]),  # a prefill fits the first quantum, so it is mlfq
        ("gittins", 1, [5.0, 6.5, 2.0]),  # has nothing learned yet
        ("fcfs", 2, [3.0, 3.5, 3.0]),  # the second joins at 1 s and ends at 4 s; the third takes the first's place
        ("fcfs", 3, [3.0, 3.5, 1.0]),
    ],
)
@pytest.mark.parametrize("seconds", [1.0, 0.25])
def test_jcts_worked_out_by_hand(
    shell: Shell, tmp_path: Path, policy: str, batch: int, jcts: list[float], seconds: float
) -> None:
    trace = trace_of(tmp_path / "jobs.jsonl", [(arrival * seconds, output) for arrival, output in THREE_JOBS])
    words = ["--trace", trace, "--cost", f"constant:{seconds}", "--max-num-seqs", str(batch), "--policy", policy]
    (run,) = shell.runs(*words, "--timeline")
    assert [job["finish"] - job["arrival"] for job in run["timeline"]] == [jct * seconds for jct in jcts]
    assert run["mean_jct"] == pytest.approx(sum(jcts) * seconds / 3, rel=1e-15)
    expected = np.percentile(np.array(jcts) * seconds, (50, 95, 99)).tolist()
    assert [run[f"{each}_jct"] for each in ("p50", "p95", "p99")] == pytest.approx(expected, rel=1e-15)
    normalized = [jct * seconds / output for jct, (_, output) in zip(jcts, THREE_JOBS, strict=True)]
    assert run["mean_normalized_latency"] == pytest.approx(sum(normalized) / 3, rel=1e-15)
    assert run["max_jct"] == max(jcts) * seconds


def test_long_prompts_are_cut_to_the_token_budget(shell: Shell, tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "jobs.jsonl", [(0.0, 2)], prompt_tokens=10)
    words = ["--trace", trace, "--cost", "constant:1", "--policy", "fcfs"]
    (run,) = shell.runs(*words, "--max-num-seqs", "1", "--max-num-batched-tokens", "4")
    assert (run["mean_ttft"], run["mean_jct"], run["mean_tpot"]) == (3.0, 4.0, 1.0)  # chunks of 4, 4 and 2
    (run,) = shell.runs(*words)
    assert (run["mean_ttft"], run["mean_jct"], run["iterations"]) == (1.0, 2.0, 2)


def test_the_stages_of_a_pipeline_reach_the_simulator(shell: Shell, tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "jobs.jsonl", [(0.0, 4), (0.0, 4)])
    words = ["--trace", trace, "--cost", "constant:1", "--policy", "fcfs", "--max-num-seqs", "1"]
    stages = ["--pipeline-parallel-size", "2"]
    (alone,), (piped,) = shell.runs(*words), shell.runs(*words, *stages)
    assert (alone["max_jct"], alone["iterations"]) == (8.0, 8)
    assert (piped["max_jct"], piped["iterations"]) == (4.5, 8)  # the second half a second behind the first
    assert shell.runs(*words, *stages, "--no-pipelining") == [alone]  # one batch through both stages


# --- JSON --------------------------------------------------------------------------------------------------------

PROMISED = [
    "policy", "workload", "rate", "seed", "jobs", "mean_jct", "p50_jct", "p95_jct", "p99_jct", "mean_ttft",
    "mean_normalized_latency", "p95_normalized_latency", "preemptions", "swapped_bytes",
]  # fmt: skip
QUICK = ["--cost", "constant:0.5", "--workload", "zipf:1.5,64", "--jobs", "60", "--max-num-seqs", "4"]


def test_json_has_what_was_promised(shell: Shell, three_jobs: str) -> None:
    result = shell.json(*QUICK, "--rate", "1", "--seed", "3", "--workers", "1")
    assert [run["policy"] for run in result["runs"]] == list(DEFAULT_POLICIES) and set(DEFAULT_POLICIES) == set(
        POLICIES
    )
    for run in result["runs"]:
        assert set(PROMISED) <= set(run)
        assert (run["workload"], run["rate"], run["seed"], run["jobs"]) == ("zipf:1.5,64", 1.0, 3, 60)
        assert run["load"] is None and run["finite_trace"] is False and "timeline" not in run
        assert 0 < run["p50_jct"] <= run["p95_jct"] <= run["p99_jct"] <= run["max_jct"]
        assert all(isinstance(run[key], (int, float, type(None), str)) for key in run)
        assert run["swapped_bytes"] == 0
    assert result["runs"][0]["preemptions"] == 0 < result["runs"][1]["preemptions"]
    (replayed,) = shell.runs("--trace", three_jobs, "--cost", "constant:1", "--policy", "fcfs")
    assert (replayed["rate"], replayed["workload"], replayed["jobs"]) == (None, "three.jsonl", 3)


def test_a_sweep_is_in_order_and_does_not_depend_on_its_workers(shell: Shell) -> None:
    words = [*QUICK, "--load", "0.6", "--load", "1.2", "--seeds", "2", *policies("fcfs", "mlfq"), "--json"]
    one = shell(*words, "--workers", "1")
    assert shell(*words, "--workers", "3") == one
    assert shell(*words, "--workers", "1", "--progress") == one and "simulating" in shell.errors
    result = json.loads(one)
    capacities = {each["seed"]: each["jobs_per_second"] for each in result["capacities"]}
    keys = [(run["load"], run["policy"], run["seed"]) for run in result["runs"]]
    assert keys == [(load, policy, seed) for load in (0.6, 1.2) for policy in ("fcfs", "mlfq") for seed in (0, 1)]
    for run in result["runs"]:
        assert run["rate"] == run["load"] * capacities[run["seed"]]
        assert run["finite_trace"] == (run["load"] >= 1)


def test_seeds_are_paired_over_policies_and_rates(shell: Shell) -> None:
    words = ["--cost", "constant:1", "--workload", "zipf:1.5,64", "--jobs", "50", "--max-num-seqs", "1", "--seeds", "2"]
    runs = shell.runs(*words, "--rate", "0.01", "--rate", "0.05", *policies("fcfs", "srpt"))
    # One job an iteration, one token an iteration: the iterations are the output tokens.
    assert len({run["iterations"] for run in runs if run["seed"] == 0}) == 1
    assert len({run["iterations"] for run in runs}) == 2


@pytest.mark.parametrize("batch", [1, 4])
def test_capacity_is_jobs_a_second_of_a_full_batch(shell: Shell, batch: int) -> None:
    words = ["--cost", "constant:2", "--workload", "constant:5,6", "--jobs", "43", "--max-num-seqs", str(batch)]
    result = shell.json(*words, "--load", "0.5", "--policy", "fcfs", "--workers", "1")
    assert result["capacities"] == [{"seed": 0, "jobs_per_second": pytest.approx(batch / 12)}]
    # All in one batch: as many as they are, over the time they take.
    result = shell.json(*words, "--max-num-seqs", "43", "--load", "0.5", "--policy", "fcfs", "--workers", "1")
    assert result["capacities"][0]["jobs_per_second"] == pytest.approx(43 / 12)


def test_warm_up_jobs_are_the_first_to_arrive(shell: Shell, three_jobs: str) -> None:
    words = ["--trace", three_jobs, "--cost", "constant:1", "--max-num-seqs", "1", "--policy", "srpt"]
    (run,) = shell.runs(*words, "--warmup-jobs", "1")  # JCTs 4, 6.5, 1: the first to arrive ends second
    assert (run["jobs"], run["mean_jct"], run["max_jct"]) == (2, 3.75, 6.5)
    assert run["iterations"] == 7, "what was done is counted whole"


def test_traces_can_be_cut_scaled_and_drawn_from(shell: Shell, three_jobs: str) -> None:
    words = ["--trace", three_jobs, "--cost", "constant:0.001", "--policy", "fcfs"]
    (cut,) = shell.runs(*words, "--jobs", "2", "--timeline")
    assert [job["arrival"] for job in cut["timeline"]] == [0.0, 0.5]
    (scaled,) = shell.runs(*words, "--rate", "20", "--timeline")
    assert [job["arrival"] for job in scaled["timeline"]] == pytest.approx([0.0, 0.05, 0.1])
    assert scaled["rate"] == 20
    drawn = shell.runs(*words, "--arrivals", "poisson", "--jobs", "200", "--seeds", "2", "--rate", "10")
    assert [run["jobs"] for run in drawn] == [200, 200]
    assert drawn[0]["mean_jct"] != drawn[1]["mean_jct"]
    assert all(run["mean_jct"] == pytest.approx(0.001 * 7 / 3, rel=0.3) for run in drawn)
    (loaded,) = shell.runs(*words, "--load", "0.5", "--max-num-seqs", "1")
    assert loaded["rate"] == pytest.approx(0.5 * 2 / 0.006)  # two jobs of three tokens before the last one starts


def test_presets_measured_profiles_and_limits(shell: Shell, tmp_path: Path) -> None:
    short = ["--workload", "constant:100,20", "--jobs", "20", "--policy", "fcfs", "--rate", "1"]
    (small,) = shell.runs(*short)
    (large,) = shell.runs(*short, "--model", "opt-175b", "--gpu", "a100-80g", "--tensor-parallel-size", "8")
    (fast,) = shell.runs(*short, "--hardware", "h100", "--model", "opt-13b")
    assert fast["mean_jct"] < small["mean_jct"] < large["mean_jct"]
    profile = tmp_path / "profile.json"
    CostModel(per_iteration=0.5).save(profile)
    (measured,) = shell.runs(*short, "--cost", str(profile))
    assert measured["mean_tpot"] == pytest.approx(0.5)
    (timed,) = shell.runs(*short, "--cost", str(profile), "--model", "opt-13b", "--starvation-limit", "none")
    assert timed["mean_tpot"] == pytest.approx(0.5)


# --- for people ----------------------------------------------------------------------------------------------------


def test_the_table_says_what_it_shows(shell: Shell) -> None:
    words = [*QUICK, "--load", "0.5", "--load", "1.2", "--seeds", "3", "--warmup-jobs", "5", *policies("fcfs", "srpt")]
    text = shell(*words, "--workers", "1")
    assert (
        text.splitlines()[0] == "zipf:1.5,64, poisson arrivals, 60 jobs · 0.5 s an iteration · batch 4, 7680 KV blocks"
    )
    assert re.search(r"^load 0\.5 · [\d.]+ jobs/s *$", text, re.MULTILINE)
    assert re.search(r"^load 1\.2 · [\d.]+ jobs/s · finite trace: no steady state *$", text, re.MULTILINE)
    assert re.search(r"^ +srpt +[\d.]+ ±\d+% +[\d.]+×", text, re.MULTILINE)
    assert "first 5 jobs left out · means over 3 seeds ± 95 % confidence interval · × is how many times better" in text
    assert shell.errors == "", "there is no progress where there is no terminal"


PROGRAMS = {
    "hit_rate": 0.9123, "hit_rate_bound": 0.9345, "programs": 77, "mean_program_completion": 1234.5,
    "p95_program_completion": 2345.6, "users": {f"user-{number}": {"p95_jct": 12.3} for number in range(3)},
}  # fmt: skip


def summary(policy: str, seed: int, jct: float, load: float | None = 0.9, rate: float = 2.0, **more: Any) -> RunSummary:
    numbers: dict[str, Any] = dict.fromkeys((each.name for each in fields(RunSummary) if each.default is MISSING), 1)
    given = {"policy": policy, "workload": "w", "load": load, "rate": rate, "seed": seed, "mean_jct": jct, **more}
    return RunSummary(**{**numbers, **given, "swapped_bytes": 3 * 10**9, "swapped_blocks": 5, "preemptions": 123456})


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_tables_fit_where_they_are_shown(width: int) -> None:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    print_runs(console, [summary(policy, seed, 1234.5) for policy in ("fcfs", "skip-join-mlfq") for seed in range(3)])
    text = console.export_text()
    assert "…" not in text and "skip-join-mlfq" in text
    assert max(map(len, text.splitlines()[:-1])) <= width
    assert ("3.00 GB" in text) == (width > 80)


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_tables_of_programs_fit_where_they_are_shown(width: int) -> None:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    runs = [summary(policy, seed, 1234.5, **PROGRAMS) for policy in ("fcfs", "skip-join-mlfq") for seed in range(3)]
    print_runs(console, runs)
    text = console.export_text()
    assert "…" not in text and "program (s)" in text and "user-2" in text
    assert max(map(len, text.splitlines()[:-1])) <= width
    assert ("91.2 of 93.5 %" in text) == (width > 60)


def test_levels_group_by_load_or_rate() -> None:
    by_load = levels_of(
        [summary("a", 0, 1.0, 0.5, 2.0), summary("a", 1, 3.0, 0.5, 4.0), summary("a", 0, 5.0, 1.0, 4.0)]
    )
    assert [(level.load, level.rate, level.steady) for level in by_load] == [(0.5, 3.0, True), (1.0, 4.0, False)]
    assert by_load[0].estimate("a", "mean_jct").mean == 2.0
    by_rate = levels_of([summary("a", 0, 1.0, None, 2.0), summary("b", 0, 1.0, None, 2.0)])
    assert [(level.load, level.rate, list(level.runs)) for level in by_rate] == [(None, 2.0, ["a", "b"])]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.012345, "0.0123"),
        (1.0, "1.00"),
        (12.345, "12.3"),
        (123.4, "123"),
        (98765.4, "98765"),
        (1e-12, "0.000000000"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_intervals_are_shares() -> None:
    assert estimate_text(Estimate(4.0, 0.5, 3)) == "4.00 ±12%"
    assert estimate_text(Estimate(4.0, None, 1)) == "4.00"


def test_gantt() -> None:
    job = TimelineJob(0, 1.0, 9.0, [(3.0, 5.5), (8.0, 9.0)])
    assert gantt(job, 10.0, 10) == " ··██▒··█ "
    assert gantt(job, 10.0, 5) == "·▒▒·█"


def test_the_timeline_shows_who_ran(shell: Shell, three_jobs: str) -> None:
    words = ["--trace", three_jobs, "--cost", "constant:1", "--max-num-seqs", "1", *policies("fcfs", "srpt")]
    text = shell(*words, "--timeline", "--workers", "1")
    bars = re.findall(r"^\d (.*) +([\d.]+) s$", text, re.MULTILINE)
    assert [float(jct) for _, jct in bars] == [3.0, 5.5, 6.0, 4.0, 6.5, 1.0]
    assert "·" not in bars[0][0] and "·" in bars[1][0]
    assert "fcfs · seed 0 · mean JCT 4.83 s" in text


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_is_drawn(shell: Shell, tmp_path: Path, ending: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "new" / f"sweep.{ending}"
    levels = ["--load", "0.5", "--load", "1.1", "--seeds", "2"] if ending == "png" else ["--rate", "0.1"]
    text = shell(*QUICK, *levels, *policies("fcfs", "srpt"), "--plot", str(file), "--workers", "1")
    assert file.read_bytes().startswith(magic) and f"drawn as {file}" in text


def test_only_plotting_loads_matplotlib() -> None:
    words = ["simulate", *QUICK, "--rate", "1", "--policy", "fcfs", "--workers", "1"]
    code = f"import sys; from fastserve.cli import main; main({words!r}); sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_help_teaches(shell: Shell) -> None:
    text = " ".join(shell("--help").split())
    for name in (*POLICIES, *WORKLOADS, *ARRIVALS, *MODELS, *DEVICES):
        assert name in text, name
    for entry in (*WORKLOADS.values(), *PROGRAM_WORKLOADS.values(), *ARRIVALS.values()):
        assert entry.usage in text
    assert text.count("fastserve simulate --") >= 4


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--policy lifo", "--policy: must be one of fcfs, mlfq, .*; got 'lifo'"),
        ("--workload zipff:2", "--workload: must be one of sharegpt, alpaca, zipf:THETA"),
        ("--workload zipf:2 --trace x", "--workload: cannot be given with --trace"),
        ("--arrivals gamma", "--arrivals: must be written gamma:CV"),
        ("--trace /no/such/file", "--trace: cannot read /no/such/file"),
        ("--jobs 0", "--jobs: must be an integer between 1 and"),
        ("--rate 0", "--rate: must be a number above 0"),
        ("--rate nan", "--rate: must be a number above 0"),
        ("--load 0.5 --rate 1", "--load: cannot be given with --rate"),
        ("--load -1", "--load: must be a number above 0"),
        ("--seed -1 --jobs 5", "--seed: a seed must be an integer between 0"),
        ("--seeds 0", "--seeds: must be an integer between 1 and 1000, got 0"),
        ("--seeds 3 --seed 1", "--seeds: cannot be given with --seed"),
        ("--warmup-jobs 5 --jobs 5", "--warmup-jobs: must leave some of the 5 jobs"),
        ("--model gpt-5", "--model: must be one of gpt3-2.7b"),
        ("--gpu v100", "--hardware: must be one of a100-40g"),
        ("--gpu a100-40g --cost constant:1", "--model: is needed with --hardware"),
        ("--model opt-175b", "--model: opt-175b needs .* GiB for its weights"),
        ("--tensor-parallel-size 3", "--tensor-parallel-size: must divide"),
        ("--tensor-parallel-size 2 --cost constant:1", "--tensor-parallel-size: needs --model"),
        ("--pipeline-parallel-size 0", "--pipeline-parallel-size: must be at least 1"),
        ("--cost constant:0", "--cost: must be a file or constant:SECONDS, .* 1e-09 and 1e.09; got 'constant:0'"),
        ("--cost constant:1e-320", "--cost: must be a file or constant:SECONDS, with seconds between 1e-09 and 1e.09"),
        ("--cost constant:1e300", "--cost: must be a file or constant:SECONDS, with seconds between 1e-09 and 1e.09"),
        ("--cost constant:1e9 --jobs 2", r"--load: 0.9 of the \S+e-1\d jobs a second .* must be between 1e-09 and 1e"),
        ("--cost constant:x", "--cost: must be a file or constant:SECONDS"),
        ("--cost /no/such.json", "--cost: cannot read /no/such.json"),
        ("--kv-blocks 0", "--kv-blocks: must be at least 1"),
        ("--kv-blocks 2000000000", "--kv-blocks: must be at most 16777216, got 2000000000"),
        ("--swap-blocks 16777217 --swap-seconds 1", "--swap-blocks: must be at most 16777216, got 16777217"),
        ("--swap-space 999T", "--swap-space: must be at most 219902325555200 bytes, 16777216 KV blocks of 13107200"),
        (
            "--kv-blocks 2 --workload constant:100,50",
            "--kv-blocks: must be at least 10, which job 1 of 150 tokens needs",
        ),
        ("--max-model-len 100 --workload constant:99,2", "--max-model-len: must be at least 101, the length of job 1"),
        ("--max-num-seqs 0", "--max-num-seqs: must be at least 1"),
        ("--max-num-batched-tokens 8", "--max-num-batched-tokens: must be at least max_num_seqs"),
        ("--block-size 0", "--block-size: must be at least 1"),
        ("--admission later", "--admission: must be one of paged, reserve"),
        ("--swap-mode never", "--swap-mode: must be one of proactive, reactive, recompute"),
        ("--starvation-limit soon", "--starvation-limit: must be a number or none, got 'soon'"),
        ("--slowdown-limit 0", "--slowdown-limit: must be above 0, or none"),
        ("--swap-space lots", "--swap-space: must be a size such as 512M"),
        ("--swap-space 1G --cost constant:1", "--swap-space: needs --model"),
        ("--swap-space 1G --swap-blocks 5", "--swap-blocks: cannot be given with --swap-space"),
        ("--swap-blocks 5 --cost constant:1", "--swap-seconds: is needed to swap with --cost and no --model"),
        ("--swap-blocks 5 --swap-seconds -1", "--swap-seconds: must be a number of at least 0"),
        ("--swap-seconds nan --cost constant:1", "--swap-seconds: must be a number of at least 0, got nan"),
        ("--swap-seconds inf", "--swap-seconds: must be a number of at least 0, got inf"),
        ("--swap-space 1K", "--swap-space: must be 0 or hold at least one KV block of 13107200 bytes on each device"),
        ("--swap-space -1G", "--swap-space: must be a size such as 512M"),
        ("--repayment -1", "--repayment: must be a number from 0 on, got -1.0"),
        ("--repayment nan", "--repayment: must be a number from 0 on, got nan"),
        ("--workers 0", "--workers: must be an integer of at least 1"),
        ("--timeline --jobs 65", "--timeline: shows at most 64 jobs"),
        ("--plot picture.txt", "--plot: must end in .png, .svg, .pdf; got picture.txt"),
        ("--plot /dev/null/sweep.png", "--plot: cannot write /dev/null/sweep.png"),
    ],
)
def test_an_error_is_one_line_and_code_2(shell: Shell, words: str, message: str) -> None:
    assert shell(*words.split(), *([] if "--workers" in words else ["--workers", "1"]), code=2) == ""
    assert shell.errors.startswith("fastserve: ") and shell.errors.count("\n") == 1
    assert re.search(message, shell.errors), shell.errors


def test_errors_about_traces(shell: Shell, tmp_path: Path, three_jobs: str) -> None:
    shell("--trace", three_jobs, "--seeds", "2", code=2)
    assert "--seed: changes nothing in a trace that is replayed" in shell.errors
    bad = tmp_path / "bad.csv"
    bad.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,x,1\n")
    shell("--trace", str(bad), code=2)
    assert shell.errors == f"fastserve: --trace: {bad}, line 2: ContextTokens must be a whole number, got 'x'\n"
    # A trace says itself how long its context must be, and errors of other processes are no different.
    trace = trace_of(tmp_path / "long.jsonl", [(0.0, 3000)])
    words = ["--trace", trace, "--cost", "constant:1", "--workers", "2", *policies("fcfs", "srpt")]
    assert len(shell.json(*words)["runs"]) == 2
    shell(*words, "--max-model-len", "2048", code=2)
    assert shell.errors == "fastserve: --max-model-len: must be at least 3004, the length of job 1\n"
