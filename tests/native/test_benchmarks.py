"""The benchmark binaries: what they print and write, and what they refuse. Not how fast anything is."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastserve import _C

FOLDER = Path(__file__).parents[2] / "build" / "bench"
EMULATED = FOLDER.parent / "simt" / "_cuda.so"  # the CUDA backend, on the CPU
QUICK = {
    "gemm": ["--weights", "bfloat16,q4_0", "--rows", "1,65"],
    "attention": ["--dtype", "bfloat16,int8", "--rows", "2", "--context", "40", "--tokens", "30"],
    "decode": ["--weights", "q8_0", "--rows", "1,3", "--context", "20", "--steps", "2"],
    "prefill": ["--weights", "bfloat16", "--tokens", "20,33", "--chunk", "16"],
    "swap": ["--blocks", "3"],
}
ON_DEVICE = {
    "gemm": ["--matrix", "up,out", "--weights", "bfloat16,q4_0", "--rows", "1,130"],
    "attention": ["--rows", "2", "--context", "40", "--tokens", "30"],
    "decode": ["--rows", "1,3", "--context", "20", "--steps", "3"],
    "prefill": ["--tokens", "20,33", "--chunk", "16"],
    "swap": ["--blocks", "3", "--rows", "2", "--context", "20", "--steps", "3", "--beside", "1"],
}
ROWS = {"gemm": 5 * 2 * 2 - 2, "attention": 4, "decode": 2, "prefill": 2, "swap": 6}  # 65 rows: not of the head

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="not built: make build-bench")


def run(name: str, *arguments: str, plugin: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [FOLDER / name, "--cold", "8", *arguments]
    variables = dict(os.environ) if plugin is None else {**os.environ, "FASTSERVE_CUDA_PLUGIN": str(plugin)}
    return subprocess.run(command, capture_output=True, text=True, timeout=250, env=variables)


@pytest.mark.parametrize("name", QUICK)
def test_a_table_and_the_same_as_json(name: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = run(name, "--repeats", "1", "--threads", "2", "--json", str(file), *QUICK[name])
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    result = json.loads(file.read_text())
    assert (result["benchmark"], result["threads"], result["repeats"]) == (name, 2, 1)
    assert result["limit_read_gb_s"] > 0
    rows: list[dict[str, Any]] = result["results"]
    assert len(rows) == ROWS[name]
    table, limits = done.stdout.split("limits, 2 threads: read ")
    assert limits.startswith(f"{result['limit_read_gb_s']:.1f} GB/s")
    printed = [line.split() for line in table.splitlines()[1:]]
    assert len(printed) == len(rows)
    for cells, row in zip(printed, rows, strict=True):
        assert cells[0] == row["preset"] == "smollm2"
        assert f"{row['gb_s']:.1f}" in cells
        assert row["seconds"] > 0
        assert row["read_percent"] > 0


@pytest.mark.cuda
@pytest.mark.skipif(not EMULATED.is_file(), reason="not built: make build-cuda")
@pytest.mark.parametrize("name", ON_DEVICE)
def test_on_a_device(name: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    options = ["--device", "cuda", "--preset", "tiny", "--cold", "1", "--limit-gemm", "64", "--repeats", "1"]
    done = run(name, *options, "--json", str(file), *ON_DEVICE[name], plugin=EMULATED)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    result = json.loads(file.read_text())
    rows = result["results"]
    assert len(rows) == {"gemm": 8, "attention": 2, "decode": 2, "prefill": 2, "swap": 6}[name]
    assert all(row["seconds"] > 0 and row["preset"] == "tiny" for row in rows)
    if name == "swap":
        assert min(result[f"limit_{which}_gb_s"] for which in ("to_host", "to_device", "both_ways")) > 0
        assert all(row["memcpy_percent"] > 0 for row in rows)
        assert result["decode_seconds"] > 0 and result["decode_seconds_beside_copies"] > 0
        assert result["beside_offload_gb_s"] >= 0 and result["beside_upload_gb_s"] >= 0  # slow here: maybe none yet
        return
    assert result["gemm_library"] and result["limit_copy_gb_s"] > 0 and result["limit_bfloat16_gflop_s"] > 0
    for row in rows:
        assert row["read_percent"] > 0
        if row.get("weights") != "q4_0":
            assert row["compute_percent"] > 0
    if name == "gemm":  # many rows by 16-bit weights, by every way
        assert result["wgmma"].startswith("admitted")
        many = [row for row in rows if row["taken"]]
        assert [(row["rows"], row["weights"]) for row in many] == 2 * [(130, "bfloat16")]
        assert all(row["mma_gflop_s"] > 0 and row["wgmma_gflop_s"] > 0 for row in many)
        assert all(row["library_gflop_s"] is None for row in rows)
    if name == "decode":
        assert all(0 <= row["idle_percent"] < 100 for row in rows)


def test_a_build_without_the_device_says_so_in_one_line(tmp_path: Path) -> None:
    done = run("decode", "--device", "cuda", plugin=tmp_path / "_cuda.so")
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("decode: the CUDA backend cannot be used: ")


def test_what_a_decode_reads_and_computes(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    arguments = ["--weights", "bfloat16", "--rows", "3", "--context", "20", "--steps", "3", "--repeats", "1"]
    assert run("decode", *arguments, "--json", str(file)).returncode == 0
    (row,) = json.loads(file.read_text())["results"]
    layer = 576 * (9 + 2 * 3) * 64 + 9 * 64 * 576 + 3 * 576 * 1536
    weights = 30 * layer + 576 * 49152
    seen = 22  # positions a token looks at, in the middle one of three iterations
    read = 2 * weights + 3 * seen * 2 * 30 * 3 * 64 * 2
    computed = 3 * (2 * weights + 4 * 30 * 9 * 64 * seen)
    assert row["gb_s"] * 1e9 * row["seconds"] == pytest.approx(read, rel=1e-6)
    assert row["gflop_s"] * 1e9 * row["seconds"] == pytest.approx(computed, rel=1e-6)
    assert row["tokens_per_second"] * row["seconds"] == pytest.approx(3, rel=1e-6)


@pytest.mark.parametrize("isa", _C.instruction_sets())
def test_every_instruction_set_has_its_own_limits(isa: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    arguments = ["--isa", isa, "--matrix", "out", "--weights", "float32,bfloat16,int8", "--rows", "1", "--repeats", "1"]
    assert run("gemm", *arguments, "--json", str(file)).returncode == 0
    result = json.loads(file.read_text())
    assert result["isa"] == isa
    for kind in ("float32", "bfloat16", "int8"):
        limit = result[f"limit_{kind}_gflop_s"]
        assert limit is None if isa.endswith("_emulated") else limit > 0  # which has no instructions to measure


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gemm", ["--rows", "0"], "--rows takes whole numbers from 1 to 65536, got '0'"),
        ("gemm", ["--rows=1,two"], "--rows takes whole numbers from 1 to 65536, got 'two'"),
        ("gemm", ["--weights", "q5_0"], "--weights must be of float32, bfloat16, int8, q8_0, q4_0, q4_1, got 'q5_0'"),
        ("attention", ["--context"], "--context needs a value"),
        ("attention", ["--rows", "4000", "--context", "100000"], "take more than 4 GB"),
        ("decode", ["--preset", "gpt-5"], "--preset must be of smollm2, llama-1b, llama-8b, tiny, got 'gpt-5'"),
        ("decode", ["--preset", "llama-1b", "--weights", "float32,bfloat16"], "raise --memory"),
        ("prefill", ["--isa", "mmx"], "--isa must be of "),
        ("prefill", ["--json", "/no/such/folder/file"], "cannot write '/no/such/folder/file'"),
        ("swap", ["--layers", "3"], "there is no option '--layers'; --help lists them"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(name: str, arguments: list[str], message: str) -> None:
    done = run(name, *arguments)
    assert done.returncode == 2
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{name}: ") and message in line


def test_help_lists_every_option() -> None:
    for name in QUICK:
        done = run(name, "--help")
        assert done.returncode == 0 and not done.stderr
        assert done.stdout.startswith(f"usage: {name} ")
        for option in ("--threads", "--isa", "--repeats", "--cold", "--json", "--preset"):
            assert option in done.stdout
