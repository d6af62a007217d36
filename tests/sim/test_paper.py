"""The paper's experiments: searching, keeping and telling; none of the long runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from reproduction import grid, headline, opt13b, opt175b, slowdown, swapping
from reproduction.cases import AZURE, Case, measured_capacity, simulate
from reproduction.command import EXPERIMENTS, regenerate
from reproduction.common import ORCA, Missing, Scale, contender, table, text, values
from reproduction.lab import Data, Lab, Task
from reproduction.page import data_path, render
from reproduction.search import SLO, crossing, sustained
from typer.main import get_command
from typer.testing import CliRunner

from fastserve.bench.experiment import Experiment
from fastserve.bench.simulation import Setting
from fastserve.cli.app import app

TINY = Case(workload="constant:64,16", jobs=30)


# --- search ----------------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 60.0), st.floats(0.1, 10.0), st.floats(0.5, 4.0))
def test_the_crossing_of_a_known_curve_is_found(where: float, start: float, power: float) -> None:
    found = crossing(lambda rate: (rate / where) ** power, 1.0, start, most=64.0)
    assert found.rate is not None and found.rate == pytest.approx(where, rel=0.04)
    below = [rate for rate, value in found.tried if value <= 1.0]
    above = [rate for rate, value in found.tried if value > 1.0]
    assert max(below) <= min(above) <= max(below) * 1.07


def test_a_step_is_found_too() -> None:
    found = crossing(lambda rate: float(rate > 3.7), 0.5, 1.0, most=100.0)
    assert found.rate == pytest.approx(3.7, rel=0.04)


def test_no_crossing_below_the_highest_rate_is_no_rate() -> None:
    found = crossing(lambda rate: 0.2, SLO, 1.5, most=10.0)
    assert found.rate is None
    assert max(rate for rate, _ in found.tried) == 10.0  # which was tried


def test_a_curve_above_the_limit_everywhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="at any rate"):
        crossing(lambda rate: 1.0, SLO, 1.0, most=10.0)


def test_a_sustained_rate_is_one_that_is_sustained() -> None:
    case = Case(workload="alpaca", jobs=80, max_num_seqs=4)
    capacity = measured_capacity(case, 1)["jobs_per_second"]
    rate = sustained(case, "fcfs", 1, capacity, 32 * capacity)["rate"]
    latencies = [simulate(case, "fcfs", factor * rate, 1)["mean_normalized_latency"] for factor in (0.95, 1.05)]
    assert latencies[0] <= SLO < latencies[1]


# --- data ------------------------------------------------------------------------------------------------------------


def _note(log: Path, value: int) -> dict[str, Any]:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{value}\n")
    if value < 0:
        raise RuntimeError("broken")
    return {"square": value**2}


def _tasks(log: Path, *numbers: int) -> list[Task]:
    return [Task({"number": number}, _note, (log, number)) for number in numbers]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_known_is_not_done_again(tmp_path: Path, workers: int) -> None:
    path, log = tmp_path / "data" / "some.json", tmp_path / "log"
    first = Lab(Data.load(path), path, workers)
    with first.processes():
        assert first.run(_tasks(log, 3, 1, 3)) == [{"square": 9}, {"square": 1}, {"square": 9}]
    again = Lab(Data.load(path), path, 1)
    assert again.run(_tasks(log, 2, 1)) == [{"square": 4}, {"square": 1}]
    assert sorted(log.read_text().split()) == ["1", "2", "3"]
    again.forget_unused()
    assert [what for what, _ in Data.load(path).points.values()] == [{"number": 1}, {"number": 2}]


def test_what_was_done_before_a_failure_is_kept(tmp_path: Path) -> None:
    path, log = tmp_path / "some.json", tmp_path / "log"
    with pytest.raises(RuntimeError, match="broken"):
        Lab(Data.load(path), path, 1).run(_tasks(log, 5, -1, 6))
    assert Data.load(path).values("square") == [25]


def test_values_come_by_seed(tmp_path: Path) -> None:
    data = Data("some")
    for seed in (2, 0, 1):
        what = {"case": TINY.as_dict(), "policy": "fcfs", "seed": seed}
        data.points[json.dumps(what)] = what, {"mean_jct": 10.0 + seed}
    assert values(data, "mean_jct", TINY, "fcfs") == [10.0, 11.0, 12.0]
    with pytest.raises(Missing):
        values(data, "mean_jct", TINY, "srpt")


# --- cases -----------------------------------------------------------------------------------------------------------


def test_orca_is_fcfs_that_reserves() -> None:
    case, policy = contender(TINY, ORCA)
    assert (policy, case.setting().config.admission) == ("fcfs", "reserve")
    assert contender(TINY, "srpt") == (TINY, "srpt")


def test_a_case_survives_the_data() -> None:
    case = Case(workload="zipf:2", jobs=50, starvation_limit="0.3", slowdown_limit="none", kv_blocks=300)
    assert Case.from_dict(json.loads(json.dumps(case.as_dict()))) == case


def test_azure_needs_its_trace() -> None:
    with pytest.raises(ValueError, match="--azure"):
        Case(workload=AZURE, jobs=10).setting()


STATED = {
    "headline": headline.case(Scale()),
    "batch": headline.case(Scale(), batch=64),
    "stages": opt175b.case("alpaca", 400),
    "one stage at a time": opt175b.case("alpaca", 400, "skip-join, one batch of 32 at a time"),
    "alpha": opt13b.case("sharegpt", 400, "paper"),
    "recompute": swapping.case("recompute", "0.3", 0.0, Scale()),
    "grid": grid.case("bimodal:32,512,0.1,128", 256, Scale()),
    "slowdown": slowdown.case("16", Scale()),
}


class _Asked(Exception):
    """Instead of running."""


@pytest.mark.parametrize("case", STATED.values(), ids=STATED)
def test_the_command_on_the_page_is_the_run(case: Case) -> None:
    """The command line, parsed by fastserve's own parser, asks for the very setting that was run."""
    given: list[Experiment] = []

    def stop(self: Experiment) -> Setting:
        given.append(self)
        raise _Asked

    words = case.command("fcfs gittins", "--rate 2", 3).split()
    assert words[0] == "fastserve"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Asked):
        patch.setattr(Experiment, "setting", stop)
        get_command(app).main(words[1:], standalone_mode=False)
    asked, ran = given[0].setting(), case.setting()
    assert (asked.config, asked.jobs, asked.warmup_jobs) == (ran.config, ran.jobs, ran.warmup_jobs)
    assert (asked.cost, asked.link, asked.workload.name) == (ran.cost, ran.link, ran.workload.name)
    assert asked.pipeline_stages == ran.pipeline_stages
    assert given[0].policies == ["fcfs", "gittins"] and list(given[0].seeds) == [0, 1, 2] and given[0].rates == [2.0]


def test_the_issue_says_how_much_is_run() -> None:
    main = headline.case(Scale())
    assert main.jobs - main.warmup_jobs >= 10_000 and headline.SEEDS >= 5 and headline.LOAD < 1
    assert {opt13b.SHORT, opt13b.LONG} == {400, 3000}
    assert opt175b.SHORT == {"sharegpt": 400, "alpaca": 300} and opt175b.LONG == 3000 and opt175b.SEEDS >= 5
    assert len(grid.WORKLOADS) == 8 and grid.LOADS == (0.5, 0.7, 0.9, 1.0, 1.2) and grid.BATCHES == (16, 64, 256)
    for batch in grid.BATCHES:
        case = grid.case("sharegpt", batch, Scale())
        assert case.jobs - case.warmup_jobs >= 2000 and grid.SEEDS >= 2
        # By the time the first job that counts has arrived, at the highest load, 500 have completed.
        assert case.warmup_jobs / max(grid.LOADS) - batch >= 500


# --- the page --------------------------------------------------------------------------------------------------------


def test_a_table_is_markdown() -> None:
    assert table(("a", "b"), [("x", "1")]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n"


def test_an_interval_has_the_digits_of_its_mean() -> None:
    # Student's t of 2 degrees of freedom is 4.303: 4.303 · 1 / √3 = 2.48.
    assert text([11.0, 12.0, 13.0]) == "12.0 ± 2.5"
    assert text([5.0]) == "5.00"


def _grid_data(gittins: float) -> Data:
    """One point of the grid: fcfs 10 s, skip-join 8 s, srpt 4 s."""
    data, scale = Data("grid", quick=True), Scale(quick=True)
    jct = {"fcfs": 10.0, "skip-join-mlfq": 8.0, "gittins": gittins, "srpt": 4.0}
    for policy, seconds in jct.items():
        for seed, factor in ((0, 0.9), (1, 1.1)):
            what = {"case": grid.case("zipf:2", 16, scale).as_dict(), "policy": policy, "seed": seed, "load": 0.9}
            data.points[json.dumps(what, sort_keys=True)] = what, {"mean_jct": seconds * factor}
    return data


@pytest.mark.parametrize(
    ("gittins", "broken"),
    [
        (4.1, []),
        (3.9, []),
        (8.2, ["farther from SRPT than skip-join"]),
        (8.5, ["1.062 × skip-join", "farther from SRPT than skip-join"]),
        (10.5, ["1.050 × fcfs", "1.312 × skip-join", "farther from SRPT than skip-join"]),
    ],
)
def test_the_grid_tells_what_is_broken(gittins: float, broken: list[str]) -> None:
    data = _grid_data(gittins)
    (cell,) = grid.cells(data)
    assert list(cell.violations) == broken
    said = grid.section(data)
    assert all(each in said for each in broken)
    assert ("No promise is broken" in said) is (not broken)
    assert "skip-join-mlfq takes up to 0.80 ×" in said


def test_the_page_is_made_of_the_data(tmp_path: Path) -> None:
    _grid_data(4.1).save(data_path(tmp_path, "grid"))
    page = render(EXPERIMENTS, tmp_path).read_text()
    assert "No promise is broken at any of the 1 points" in page and "0.410" in page and "A quick run" in page
    assert (tmp_path / "grid.svg").stat().st_size > 1000
    assert page.count("Not run yet") == len(EXPERIMENTS) - 1
    first = (tmp_path / "grid.svg").read_bytes()
    assert render(EXPERIMENTS, tmp_path).read_text() == page and (tmp_path / "grid.svg").read_bytes() == first


def test_data_of_another_configuration_are_not_told(tmp_path: Path) -> None:
    data = _grid_data(4.1)
    data.quick = False  # the full grid has longer cases
    data.save(data_path(tmp_path, "grid"))
    assert "Not complete" in render(EXPERIMENTS, tmp_path).read_text()


def test_a_rate_that_nothing_limits_is_told_as_such() -> None:
    assert opt13b.rate_text([math.inf, 3.0], 64.0) == "≥ 64"
    assert opt13b.gain_text([math.inf, 3.0], [4.0, 2.0], 64.0) == "≥ 16 ×"
    assert opt13b.gain_text([6.0, 4.0], [3.0, 2.0], 64.0) == "2.00 ± 0.00 ×"


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slowdown, "case", lambda limit, scale: Case(**TINY.as_dict(), slowdown_limit=limit))
    monkeypatch.setattr(grid, "WORKLOADS", {"constant:64,16": "constant", AZURE: "Azure conversation"})
    monkeypatch.setattr(grid, "case", lambda workload, batch, scale: Case(**TINY.as_dict() | {"workload": workload}))


def _command(*words: str) -> Any:
    paper = typer.Typer()
    paper.command()(regenerate)
    return CliRunner().invoke(paper, list(words), catch_exceptions=False)


def test_only_runs_one_and_keeps_the_others(tmp_path: Path, small: None) -> None:
    out = ("--quick", "--out", str(tmp_path))
    assert _command("--only", "slowdown", *out).exit_code == 0
    kept = data_path(tmp_path, "slowdown").read_bytes()
    assert _command("--only", "grid", *out).exit_code == 0
    assert data_path(tmp_path, "slowdown").read_bytes() == kept
    page = (tmp_path / "README.md").read_text()
    assert page.count("Not run yet") == len(EXPERIMENTS) - 2
    assert "Azure conversation was skipped" in page
    assert _command("--render", *out).exit_code == 0
    assert (tmp_path / "README.md").read_text() == page


def test_an_unknown_experiment_is_named(tmp_path: Path) -> None:
    result = _command("--only", "none", "--out", str(tmp_path))
    assert result.exit_code == 2 and "'none'" in result.output
