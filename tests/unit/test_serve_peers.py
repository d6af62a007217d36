"""The comparison of servers: what it refuses, and the tables it makes of what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import serve_peers


def run(server: str, fraction: float | None, number: int, jobs: float, jct: float, ttft: float) -> dict[str, Any]:
    times = {"mean": jct, "p95": 2 * jct, "p99": 3 * jct}
    latency = {"jct": times, "ttft": {"mean": ttft, "p95": ttft}, "normalized_latency": {"mean": jct / 100}}
    achieved = {"jobs_per_second": jobs, "output_tokens_per_second": 100 * jobs}
    summary = {"achieved": achieved, "latency": latency, "short": {"jct": None}, "failed": int(server == "c")}
    return {"server": server, "fraction": fraction, "round": number, "summary": summary}


def test_the_best_peer_at_each_figure_is_what_ratios_are_against(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Medians over three rounds: ours 4 jobs/s and a JCT of 10 s; b has 2 and 40, c 1 and 20."""
    runs = [run("ours", None, n, jobs, jct, 0.5) for n, (jobs, jct) in enumerate([(4, 10), (5, 9), (1, 80)])]
    runs += [run("b", None, n, 2, 40, 0.1) for n in range(3)] + [run("c", None, n, 1, 20, 2.0) for n in range(3)]
    runs += [run("ours", 0.5, 0, 1, 1234, 1)]
    result = {
        **{"model": "m", "trace": "t.json", "slots": 8, "threads": 2, "rounds": 3, "capacity": 2.0},
        **{"peers": ["b", "c"], "servers": [{"name": "ours"}, {"name": "b"}, {"name": "c"}], "runs": runs},
    }
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(result))
    assert serve_peers.main(["--table", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "medians of 3 rounds" in lines[0] and "The capacity is 2.000 jobs a second" in lines[0]
    assert "**All jobs at once**" in lines and "**50 % of the capacity**" in lines
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith(("| ours", "| b", "| c"))]
    assert [row[0] for row in rows] == ["ours", "b", "c, 3 failed", "ours"]
    assert rows[0][1:4] == ["4 (2.00)", "400 (2.00)", "10 (2.00)"]
    assert rows[0][6:8] == ["–", "0.5 (0.20)"]
    assert rows[2][3] == "20"
    assert rows[3][1:4] == ["1", "100", "1,234"]  # nobody to compare with


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--trace: name a trace"),
        (("--trace", "t.json", "--rates", "0.5,zero"), "must be numbers above 0, got '0.5,zero'"),
        (("--trace", "t.json", "--weights", "q2_k"), "q2_k"),
        (("--trace", "t.json", "--vllm-python", "no-such-python"), "--vllm-python: there is no program"),
        (("--trace", "t.json", "--policies", "fcfs", "lifo"), "invalid choice: 'lifo'"),
        (("--table", "no-such-file.json"), "--table: there is no file 'no-such-file.json'"),
    ],
)
def test_what_cannot_be_is_told_before_anything_starts(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        serve_peers.main(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
