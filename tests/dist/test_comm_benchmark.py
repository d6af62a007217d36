"""build/bench/comm: what it prints and writes. Not how fast anything is."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "build" / "bench" / "comm"

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="not built: make build-bench")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_table_and_the_same_as_json(ranks: int, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    arguments = ["--ranks", str(ranks), "--hidden", "8", "--rows", "1,64", "--count", "20", "--repeats", "1"]
    done = run(*arguments, "--json", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(file.read_text())
    assert (result["benchmark"], result["ranks"], result["repeats"]) == ("comm", ranks, 1)
    rows = result["results"]
    assert [(row["operation"], row["rows"], row["bytes"]) for row in rows[:6]] == [
        (operation, count, count * 8 * 4) for count in (1, 64) for operation in ("all_reduce", "broadcast", "message")
    ]
    # a header of 13 words; a row, a token and a table entry of each job
    assert [(row["operation"], row["rows"]) for row in rows[6:]] == [
        ("plan", 1), ("plan", 64), ("plan, parked", 1), ("plan, parked", 64), ("barrier", 0),
    ]  # fmt: skip
    assert rows[7]["bytes"] == 13 * 8 + 64 * (16 + 4 + 12)
    assert all(row["seconds"] > 0 for row in rows)
    assert len(done.stdout.splitlines()) >= 1 + len(rows)


def test_a_bad_option_is_one_line() -> None:
    done = run("--ranks", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "comm: --ranks takes whole numbers from 2 to 128, got '1'\n"
