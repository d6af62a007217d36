"""The command `fastserve bench serve`."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sse_server import Request, Wire, honest, refusing, serving

from fastserve.bench.serve.experiment import Experiment
from fastserve.bench.serve.plan import Plan
from fastserve.cli import main

UNIT = {
    "meta": {"n": 3},
    "requests": [
        {"id": 0, "t_unit": 0.5, "prompt_len": 20, "output_len": 15},
        {"id": 1, "t_unit": 1.5, "prompt_len": 4, "output_len": 7},
        {"id": 2, "t_unit": 4.5, "prompt_len": 177, "output_len": 69},
    ],
}


@pytest.fixture
def unit_trace(tmp_path: Path) -> Path:
    path = tmp_path / "unit.json"
    path.write_text(json.dumps(UNIT, indent=1))
    return path


# --- the command -----------------------------------------------------------------------------------------------------


class Shell:
    """Runs `bench serve` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object, code: int = 0) -> str:
        status = main(["bench", "serve", *map(str, words)])
        printed = self._capsys.readouterr()
        assert status == code, printed.err
        self.errors = printed.err
        return printed.out


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def test_json_holds_everything(shell: Shell, unit_trace: Path) -> None:
    with serving() as server:
        words = ("--base-url", server.url, "--trace", unit_trace, "--rate", "100", "--slo", "jct=60", "--label", "try")
        result = json.loads(shell(*words, "--json"))
        assert len(server.requests) == 3 + 3  # the warm-up is at most a trace
    assert (result["benchmark"], result["label"], result["load"], result["seed"]) == (
        "serve",
        "try",
        "unit.json, trace",
        0,
    )
    (run,) = result["runs"]
    assert (run["target"], run["model"], run["rate"], run["round"]) == ("server", "some/model", 100.0, 0)
    assert run["summary"]["completed"] == run["summary"]["goodput"]["jobs"] == 3
    assert [job["output_tokens"] for job in run["jobs"]] == [15, 7, 69]
    assert [job["arrival"] for job in run["jobs"]] == [0.0, 0.01, 0.04]
    for job in run["jobs"]:
        assert job["arrival"] <= job["sent"] <= job["first_token"] <= job["finish"]
        assert len(job["gaps"]) == job["output_tokens"] - 1
        assert job["finish"] == pytest.approx(job["first_token"] + sum(job["gaps"]), abs=1e-3)
        assert (job["error"], job["tokens_counted_by"], job["status"]) == (None, "usage", 200)
    assert result["levels"][0]["targets"][0]["median"]["mean_jct"] == run["summary"]["latency"]["jct"]["mean"]


def test_a_run_as_a_table(shell: Shell, unit_trace: Path) -> None:
    with serving() as server:
        text = shell("--base-url", server.url, "--trace", unit_trace, "--rate", "50", "--slo", "ttft=60", "--warmup", 0)
        assert len(server.requests) == 3
    for each in (
        "3 jobs, unit.json",
        "some/model at http",
        "output tokens/s",
        "JCT (s)",
        "≤ 64 tokens (2)",
        "p99".upper(),
    ):
        assert each in text
    assert "goodput: 100.0 % of jobs" in text
    assert "error" not in text


def test_servers_side_by_side(shell: Shell, unit_trace: Path, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "picture.svg"
    with serving() as one, serving() as other:
        targets = ("--target", f"one={one.url}", "--target", f"other={other.url}")
        load = ("--trace", unit_trace, "--rate", 40, "--rate", 80, "--rounds", 2, "--warmup", 1)
        text = shell(*targets, *load, "--plot", picture)
        # All get the same requests, and no prompt comes twice.
        first, second = ([json.dumps(request.body) for request in server.requests] for server in (one, other))
    assert sorted(first) == sorted(second)
    assert len(set(first)) == len(first) == 1 + 2 * 2 * 3
    for each in ("40 jobs/s", "80 jobs/s", "one", "other", "×", "medians of 2 rounds in turn", "better than one"):
        assert each in text
    assert picture.read_text(encoding="utf-8").startswith("<?xml")


def test_one_rate_is_drawn_as_distributions(shell: Shell, tmp_path: Path) -> None:
    picture = tmp_path / "one.png"
    with serving() as server:
        load = ("--workload", "constant:5,4", "--num-jobs", 3, "--arrival", "all-at-once", "--endpoint", "chat")
        assert f"drawn as {picture}" in shell("--base-url", server.url, *load, "--plot", picture)
        assert {request.path for request in server.requests} == {"/v1/chat/completions"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_errors_are_in_the_table(shell: Shell) -> None:
    async def script(request: Request, wire: Wire) -> None:
        if len(server.requests) % 2:
            await refusing(429, b'{"error": {"message": "too [much]"}}')(request, wire)
        else:
            await honest(request, wire)

    load = ("--workload", "constant:5,4", "--num-jobs", 4, "--concurrency-limit", 1, "--arrival", "all-at-once")
    with serving(script) as server:
        text = shell("--base-url", server.url, *load, "--warmup", 0)
        two = ("--target", f"a={server.url}", "--target", f"b={server.url}")
        both = shell(*two, *load, "--warmup", 0)
    assert "429" in text
    assert "too [much]" in text
    assert "2 of 4 jobs failed; latencies are those of the others." in text
    assert "failed jobs" in both
    assert "b, round 1: 2 of 4 jobs failed" in both


def test_a_server_that_fails_is_one_line(shell: Shell) -> None:
    with serving(refusing(401, b'{"error": {"message": "wrong key"}}')) as server:
        load = ("--base-url", server.url, "--workload", "constant:5,4", "--num-jobs", 2, "--rate", 1000)
        assert shell(*load, code=1) == ""
        assert shell.errors == f"fastserve: {server.url}: all 2 jobs of the warm-up failed: 401: wrong key\n"
        assert "401" in shell(*load, "--warmup", 0, code=1)
    assert shell(*load, code=1) == ""
    assert "is the server running?" in shell.errors
    assert shell.errors.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "0"], "--rate: "),
        (["--rate", "1", "--rate", "1"], "--rate: must not be given twice"),
        (["--rate", "1", "--arrival", "all-at-once"], "--rate: cannot be given with --arrival all-at-once"),
        (["--endpoint", "responses"], "--endpoint: must be completions or chat, got 'responses'"),
        (["--base-url", "localhost"], "--base-url: must be a URL"),
        (["--base-url", "http://h", "--target", "a=http://h"], "--base-url: cannot be given with --target"),
        (["--target", "a=http://h", "--target", "a=http://g"], "--target: must have names that differ"),
        (["--rounds", "0"], "--rounds: must be an integer between 1 and 1000"),
        (["--warmup", "-1"], "--warmup: must be an integer of at least 0"),
        (["--timeout", "0"], "--timeout: must be a number of seconds above 0"),
        (["--timeout", "nan"], "--timeout: must be a number of seconds above 0"),
        (["--concurrency-limit", "0"], "--concurrency-limit: must be an integer of at least 1"),
        (["--temperature", "-1"], "--temperature: must be a number between 0 and"),
        (["--extra-body", "[1]"], "--extra-body: must be a JSON object"),
        (["--extra-body", "{"], "--extra-body: must be a JSON object"),
        (["--slo", "fast"], "--slo: must be written"),
        (["--plot", "picture.txt"], "--plot: must end in .png, .svg, .pdf"),
        (["--num-jobs", "0"], "--num-jobs: "),
        (["--cv", "2"], "--cv: goes with"),
        (["--workload", "nothing"], "--workload: must be one of"),
        (["--trace", "/no/such/file"], "--trace: cannot read /no/such/file"),
    ],
)
def test_bad_input_is_one_line_that_names_the_option(shell: Shell, words: list[str], message: str) -> None:
    assert shell(*words, code=2) == ""
    assert shell.errors.startswith(f"fastserve: {message}")
    assert shell.errors.count("\n") == 1


def test_ctrl_c_prints_what_there_is() -> None:
    async def script(request: Request, wire: Wire) -> None:
        await wire.begin()
        await wire.token(request, 0)
        await pause.wait()

    pause = asyncio.Event()
    with serving(script) as server:
        words = ["--base-url", server.url, "--workload", "constant:5,4", "--num-jobs", "3", "--warmup", "0", "--json"]
        command = [sys.executable, "-m", "fastserve", "bench", "serve", *words, "--arrival", "all-at-once"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
        server.wait_for(3)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    result = json.loads(printed)
    summary = result["runs"][0]["summary"]
    assert (summary["interrupted"], summary["unfinished"], summary["completed"]) == (True, 3, 0)
    assert result["levels"] == []
    assert math.isfinite(summary["seconds"])


def test_an_experiment_knows_its_servers() -> None:
    experiment = Experiment([("a", "http://h")], Plan(num_jobs=2), label="mine", rates=(1.0, 2.0))
    assert experiment.title == "mine · 2 jobs, sharegpt, poisson · seed 0"
    assert list(experiment.loads) == [1.0, 2.0]
