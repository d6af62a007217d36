"""The benchmarks that scripts/gpu_check.sh runs: that they compare what they say, and the table at its end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_jct
import gpu_table
import pytest

BENCHMARKS = Path(gpu_table.__file__).parent
TINY = (
    "--device", "cpu", "--preset", "tiny", "--context", "48", "--jobs", "12", "--search-jobs", "12", "--rows", "2",
    "--batched-tokens", "32", "--blocks", "64", "--seconds", "2",
)  # fmt: skip


def test_policies_compared_under_memory_pressure(tmp_path: Path) -> None:
    file = tmp_path / "jct.json"
    assert gpu_jct.main([*TINY, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["needed_blocks"] > result["num_blocks"] > 0
    assert len(result["runs"]) == 4
    for run in result["runs"].values():
        assert (run["unfinished"], run["different"]) == (0, 0)
        assert 0 < run["mean_jct"] <= run["seconds"]
    for found in result["sustained"].values():
        assert found["points"] and found["different"] == 0
        assert found["rate"] == max((point["rate"] for point in found["points"] if point["met"]), default=0)


def test_a_rate_that_misses_the_limit_is_told(tmp_path: Path) -> None:
    file = tmp_path / "jct.json"
    assert gpu_jct.main([*TINY, "--slo", "1e-9", "--json", str(file)]) == 0
    for found in json.loads(file.read_text())["sustained"].values():
        assert found["rate"] == 0
        assert found["missed_at"] == min(point["rate"] for point in found["points"])


def test_an_engine_alone_needs_no_library_of_the_server() -> None:
    """As on a machine that lacks them."""
    refused = ("msgspec", "zmq", "fastapi", "uvicorn", "gguf", "prometheus_client", "torch", "transformers")
    code = f"""
import sys
for name in {refused!r}:
    sys.modules[name] = None
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu_jct
from fastserve import LLM
sys.exit(gpu_jct.main({list(TINY)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _results() -> dict[str, Any]:
    decode = [
        {"rows": 1, "weights": "bfloat16", "read_percent": 90.0, "idle_percent": 2.0},
        {"rows": 64, "weights": "bfloat16", "read_percent": 70.0, "idle_percent": 3.5},
    ]
    jct = {"unfinished": 0, "different": 0, "mean_jct": 2.0}
    return {
        "decode": {"results": decode},
        "prefill": {
            "limit_bfloat16_gflop_s": 700e3,
            "results": [{"tokens": 2048, "weights": "bfloat16", "compute_percent": 70.0, "gflop_s": 490e3}],
        },
        "gemm": {
            "wgmma": "admitted: all bits are those of the other kernels",
            "results": [
                {"matrix": matrix, "rows": rows, "n": n, "k": 4096, "weights": weights, "taken": taken}
                | {"mma_gflop_s": 400e3, "wgmma_gflop_s": wgmma, "library_gflop_s": 800e3}
                for matrix, n, wgmma in (
                    ("qkv", 100, 600e3),
                    ("out", 100, 600e3),
                    ("up", 400, 480e3),
                    ("down", 200, 600e3),
                )
                for rows, weights, taken in (
                    (2048, "bfloat16", "warpgroup192"),
                    (32, "bfloat16", ""),
                    (2048, "q4_0", ""),
                )
            ],
        },
        "transformers": {
            "tokens_per_second": {
                "1": {"fastserve": 220.0, "eager": 50.0, "graph": 180.0},
                "32": {"fastserve": 4000.0, "graph": None, "graph_error": "RuntimeError: no", "compiled": None},
            },
            "torch_gemm_gflop_s": 784e3,
        },
        "compiled": {"tokens_per_second": {"1": {"fastserve": 210.0, "compiled": 175.0}}},
        "jct": {
            "runs": {name: dict(jct) for name in ("fcfs, proactive", "skip-join-mlfq, proactive", "c", "d")},
            "sustained": {
                "proactive": {"rate": 8.0, "missed_at": 9.0, "different": 0},
                "reactive": {"rate": 4.0, "missed_at": 5.0, "different": 0},
            },
        },
        "steps": {"tests": "0"},
        "sanitizer": {"memcheck": ("3", "9"), "racecheck": ("-", "124")},
    }


@pytest.mark.parametrize(
    ("what", "figure", "verdict"),
    [
        ("tests pass on the device (1: all)", "1", "ok"),
        ("memcheck finds nothing (1: so)", "0", "short"),
        ("racecheck finds nothing (1: so)", "–", "open"),  # out of time
        ("decode, batch 1, of copy bandwidth", "90 %", "ok"),
        ("decode, batch 64, of copy bandwidth", "70 %", "short"),
        ("GPU idle, runtime, batch 64", "3.5 %", "short"),
        ("prefill of 2,048 tokens, of the GEMM rate", "62.5 %", "short"),  # of torch's, which is the faster one
        ("products of 2,048 rows: mma.sync, of cuBLASLt", "50 %", "ok"),
        ("products of 2,048 rows: wgmma, of cuBLASLt", "66.67 %", "ok"),  # 800 / 800 over 400 / 600 + 400 / 480
        ("batch 1 over transformers eager", "4.4 ×", "ok"),
        ("batch 1 over transformers captured or compiled", "1.2 ×", "ok"),  # of the better of the two
        ("batch 32 over transformers eager", "–", "open"),
        ("batch 32 over transformers captured or compiled", "–", "open"),  # both failed
        ("KV out, of pinned bandwidth", "–", "open"),
        ("jobs lost or with other tokens, a quarter of the KV", "0", "ok"),
        ("proactive over reactive at the paper's SLO", "2 ×", "ok"),
        ("mean JCT, fcfs over skip-join-mlfq", "1 ×", "ok"),
    ],
)
def test_figures_beside_their_limits(what: str, figure: str, verdict: str) -> None:
    (point,) = [point for point in gpu_table.POINTS if point.what == what]
    row = point.row(_results(), emulated=False)
    assert (row[2], row[4]) == (figure, verdict)
    assert point.row(_results(), emulated=True)[4] == ("open" if verdict == "open" else "emulated")


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ("memcheck 0 0", "ok"),
        ("memcheck 2 9", "short"),
        ("memcheck 0 1", "open"),  # a test failed by itself
        ("memcheck - 1", "open"),  # the device was refused
        ("memcheck - 124", "open"),
        ("memcheck - 127", "open"),
    ],
)
def test_only_what_the_sanitizer_says_counts(line: str, verdict: str, tmp_path: Path) -> None:
    (tmp_path / "sanitizer").write_text(line + "\n")
    (point,) = [point for point in gpu_table.POINTS if point.what.startswith("memcheck")]
    assert point.row(gpu_table.read_results(tmp_path, tmp_path), emulated=False)[4] == verdict


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("========= ERROR SUMMARY: 0 errors", "0"),
        ("========= RACECHECK SUMMARY: 4 hazards displayed (4 errors, 0 warnings)", "4"),
        ("========= Error: Device not supported. Please refer to the documentation", "-"),
    ],
)
def test_the_script_hears_what_the_sanitizer_says(said: str, found: str, tmp_path: Path) -> None:
    """The function of the script, with a stand-in on the path."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho '{said}'\nexit 1\n")
    program.chmod(0o755)
    script = (BENCHMARKS.parent / "scripts" / "gpu_check.sh").read_text()
    body = script[script.index("\nsanitize() {") :]
    function = body[: body.index("\n}\n") + 2]
    command = f"parts={tmp_path} OUT={tmp_path} python=python3 PATH={tmp_path}:$PATH; {function}\nsanitize"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == {"0": 0, "4": 9, "-": 124}[found]  # 124: not measured
    assert (tmp_path / "sanitizer").read_text() == f"memcheck {found} 1\nracecheck {found} 1\n"


@pytest.mark.parametrize("arguments", [["--only"], ["--only", ""], ["--only", "decode,everything"], ["decode"]])
def test_the_script_names_the_steps_there_are(arguments: list[str]) -> None:
    script = BENCHMARKS.parent / "scripts" / "gpu_check.sh"
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    taken = re.findall(r"^ *step (\w+) ", script.read_text(), re.MULTILINE)
    assert line.endswith(f", of: {' '.join(taken[1:])}") and taken[0] == "build"


def test_every_way_to_compute_products_is_told() -> None:
    assert gpu_table.ways(_results()) == [
        "products by warpgroups (wgmma): admitted: all bits are those of the other kernels",
        "qkv, 2048 rows: mma 400, wgmma 600, library 800 TFLOP/s; taken: warpgroup192",
        "out, 2048 rows: mma 400, wgmma 600, library 800 TFLOP/s; taken: warpgroup192",
        "up, 2048 rows: mma 400, wgmma 480, library 800 TFLOP/s; taken: warpgroup192",
        "down, 2048 rows: mma 400, wgmma 600, library 800 TFLOP/s; taken: warpgroup192",
    ]
    refused = {"gemm": {"results": [{"matrix": "up", "rows": 512, "taken": "large128", "wgmma_gflop_s": None}]}}
    assert gpu_table.ways(refused) == ["up, 512 rows: mma –, wgmma –, library – TFLOP/s; taken: large128"]


def test_a_trace_too_short_to_miss_the_limit_tells_nothing() -> None:
    results = _results()
    results["jct"]["sustained"]["proactive"]["missed_at"] = None
    (point,) = [point for point in gpu_table.POINTS if point.what.startswith("proactive over")]
    assert point.row(results, emulated=False)[4] == "open"


def test_a_table_of_nothing_is_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "decode.json").touch()  # a benchmark that was stopped
    assert gpu_table.main(["--parts", str(tmp_path), "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(gpu_table.POINTS)
    assert all(line.endswith("open") for line in lines[1:])
