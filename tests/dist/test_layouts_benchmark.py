"""build/bench/layouts: what it prints, writes and refuses. Not how fast anything is."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "build" / "bench" / "layouts"

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="not built: make build-bench")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, "--cold", "8", *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("ranks", [2, 3])  # SmolLM2's 9 heads are 4 and 5, or 3 and 3 and 3
def test_a_table_and_the_same_as_json(ranks: int, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    size = ["--ranks", str(ranks), "--threads", str(ranks), "--rows", "1,2", "--context", "4", "--steps", "2"]
    done = run("--preset", "smollm2", "--weights", "q8_0", "--repeats", "1", *size, "--json", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(file.read_text())
    assert (result["benchmark"], result["preset"], result["weights"]) == ("layouts", "smollm2", "q8_0")
    assert (result["ranks"], result["threads"], result["steps"]) == (ranks, ranks, 2)
    rows = result["results"]
    assert [(row["layout"], row["in_flight"], row["rows"], row["against"]) for row in rows] == [
        way
        for jobs in (1, 2)
        for way in (
            ("1 process", 2, jobs, "-"),
            (f"TP={ranks}", 2, jobs, "1 process"),
            (f"PP={ranks}", 1, jobs, "-"),
            (f"PP={ranks}", ranks, jobs, "1 in flight"),
        )
    ]
    enough_cores = (os.cpu_count() or 1) >= ranks
    assert [row["goal"] for row in rows[:4]] == [
        None, 0.9 if enough_cores else None, None, pytest.approx(0.85 * ranks) if enough_cores else None,
    ]  # fmt: skip
    for row in rows:
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(row["rows"], rel=1e-6)
    for first in (0, 4):  # one round: the ratio of the medians is the round's
        alone, tensor, one, several = rows[first : first + 4]
        assert tensor["ratio"] == pytest.approx(alone["seconds"] / tensor["seconds"], rel=1e-6)
        assert several["ratio"] == pytest.approx(one["seconds"] / several["seconds"], rel=1e-6)
    for key in ("rank_read_gb_s", "all_read_gb_s", "rank_gflop_s", "all_gflop_s"):
        assert result[key] is None or result[key] > 0
    assert len(done.stdout.splitlines()) >= 1 + len(rows) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "--ranks takes whole numbers from 2 to 64, got '1'"),
        (["--threads", "3"], "--threads (3) must be a multiple of --ranks (2), each of which has as many"),
        (["--ranks", "17", "--threads", "17"], "--ranks: llama-1b has 32 heads and 16 layers, and each rank needs one"),
        (["--preset", "smollm2,llama-1b"], "one --preset with one kind of --weights at a time"),
        (["--memory", "5"], "these models take 7.6 GB side by side; name fewer --weights or raise --memory"),
        (["--steps", "1"], "--steps takes whole numbers from 2 to 128, got '1'"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"layouts: {message}\n"
