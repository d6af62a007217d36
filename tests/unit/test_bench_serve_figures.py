"""What `fastserve bench serve` plans to send, and its figures, worked out by hand."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastserve.bench.serve.comparison import compare
from fastserve.bench.serve.plan import Plan
from fastserve.bench.serve.record import UNFINISHED, JobRecord
from fastserve.bench.serve.replay import Replayed
from fastserve.bench.serve.results import ServeRun, parse_slo, summarize, warnings
from fastserve.bench.serve.target import Address, Target
from fastserve.types import InvalidRequest
from fastserve.workloads.arrivals import Gamma, Poisson

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


# --- plans -----------------------------------------------------------------------------------------------------------


def arrivals(plan: Plan, rate: float | None = None) -> list[float]:
    return [job.arrival for job in plan.jobs(rate)]


def test_a_trace_is_sent_at_its_times_or_stretched(unit_trace: Path, tmp_path: Path) -> None:
    """Times of a JSON document are on the clock of one job a second; of others, as long as all jobs take."""
    plan = Plan(trace=unit_trace)
    assert [(job.prompt_tokens, job.output_tokens) for job in plan.jobs(None)] == [(20, 15), (4, 7), (177, 69)]
    assert arrivals(plan) == arrivals(plan, 1.0) == [0.0, 1.0, 4.0]
    assert arrivals(plan, 4.0) == [0.0, 0.25, 1.0]
    lines = tmp_path / "own.jsonl"
    lines.write_text("".join(f'{{"arrival": {at}, "prompt_tokens": 5, "output_tokens": 6}}\n' for at in (7, 8, 11)))
    plan = Plan(trace=lines)
    assert arrivals(plan) == [0.0, 1.0, 4.0]
    assert arrivals(plan, 1.0) == [0.0, 0.5, 2.0]  # two gaps in two seconds


def test_a_trace_may_come_at_other_times(unit_trace: Path) -> None:
    assert arrivals(Plan(trace=unit_trace, arrival="all-at-once")) == [0.0, 0.0, 0.0]
    poisson = Plan(trace=unit_trace, arrival="poisson", seed=3)
    assert [job.prompt_tokens for job in poisson.jobs(2.0)] == [20, 4, 177]
    expected = np.cumsum(Poisson().gaps(np.random.default_rng(3), 0, 2)) / 2.0
    assert arrivals(poisson, 2.0) == [0.0, *expected]
    bursty = Plan(trace=unit_trace, arrival="gamma", cv=3.0, seed=3)
    assert arrivals(bursty) == [0.0, *np.cumsum(Gamma(3.0).gaps(np.random.default_rng(3), 0, 2))]
    assert arrivals(Plan(trace=unit_trace, arrival="gamma:3", seed=3)) == arrivals(bursty)
    assert arrivals(Plan(trace=unit_trace, arrival="burst:2")) == [0.0, 0.0, 2.0]


def test_drawn_jobs_are_the_same_at_every_rate_and_arrival() -> None:
    def lengths(plan: Plan, rate: float | None) -> list[tuple[int, int]]:
        return [(job.prompt_tokens, job.output_tokens) for job in plan.jobs(rate)]

    poisson = Plan(workload="zipf:1", num_jobs=50, seed=1)
    at_once = Plan(workload="zipf:1", num_jobs=50, seed=1, arrival="all-at-once")
    assert lengths(poisson, 1.0) == lengths(poisson, 9.0) == lengths(at_once, None)
    assert lengths(poisson, 1.0) != lengths(Plan(workload="zipf:1", num_jobs=50, seed=2), 1.0)
    assert arrivals(poisson, 2.0) == [time / 2 for time in arrivals(poisson, 1.0)]
    assert arrivals(poisson) == arrivals(poisson, 1.0)
    assert set(arrivals(at_once)) == {0.0}
    assert len(Plan().jobs(None)) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arrival": "trace"}, "arrival: trace needs a file"),
        (
            {"arrival": "sometimes"},
            "arrival: must be one of poisson, gamma, trace, all-at-once, gamma:CV, burst",
        ),
        ({"arrival": "burst:x"}, "arrival: must be written burst:SIZE, with numbers"),
        ({"cv": 2.0}, "cv: goes with --arrival gamma; the arrivals are poisson"),
        ({"arrival": "gamma", "cv": -1.0}, "cv: .* between 0 and 100"),
        ({"num_jobs": 0}, "num_jobs: "),
        ({"seed": -1}, "seed: "),
        ({"trace": Path("x"), "workload": "alpaca"}, "workload: cannot be given with --trace"),
    ],
)
def test_a_plan_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Plan(**options)


def test_a_trace_must_hold_what_is_asked_of_it(unit_trace: Path) -> None:
    assert len(Plan(trace=unit_trace, num_jobs=2).jobs(None)) == 2
    with pytest.raises(InvalidRequest, match="num_jobs: must be at most 3"):
        Plan(trace=unit_trace, num_jobs=4).jobs(None)
    with pytest.raises(InvalidRequest, match="rate: "):
        Plan(trace=unit_trace).jobs(0.0)
    for wrong in ({"t_unit": "soon"}, {"output_len": None}, {"prompt_len": 0}, {"t_unit": 0}):
        requests = [dict(each) for each in UNIT["requests"]]  # type: ignore[attr-defined]
        requests[2].update(wrong)
        unit_trace.write_text(json.dumps({"requests": requests}))
        with pytest.raises(InvalidRequest, match=r"^trace: .*unit.json, request 2: "):
            Plan(trace=unit_trace).jobs(None)
    unit_trace.write_text(json.dumps({"requests": [3]}))
    with pytest.raises(InvalidRequest, match="request 0: must be a JSON object, got 3"):
        Plan(trace=unit_trace).jobs(None)
    unit_trace.write_text(json.dumps({"requests": []}))
    with pytest.raises(InvalidRequest, match="holds no job"):
        Plan(trace=unit_trace).jobs(None)


# --- figures ---------------------------------------------------------------------------------------------------------


def record(index: int, arrival: float, times: list[float], **more: Any) -> JobRecord:
    values: dict[str, Any] = {"due": arrival, "started": arrival + 0.001, "sent": arrival + 0.002, "status": 200}
    values |= {"end": times[-1] if times else None, "usage_tokens": len(times), "finish_reason": "length"} | more
    return JobRecord(index, arrival, 10, len(times), times=array("d", times), **values)


def two_jobs() -> list[JobRecord]:
    # JCT 4, TTFT 1, TPOT 1, gaps 2 ½ ½; and JCT 1, TTFT 1, one token.
    return [record(0, 1.0, [2.0, 4.0, 4.5, 5.0]), record(1, 3.0, [4.0])]


def replayed(records: list[JobRecord], seconds: float = 4.0, interrupted: bool = False) -> Replayed:
    return Replayed(records, seconds, 0.002, sum(len(each.times) for each in records), 2, interrupted)


def test_figures_of_a_run() -> None:
    failed = record(2, 2.0, [], end=2.1, status=429, error="429", detail="later", usage_tokens=None)
    summary = summarize(replayed([*two_jobs(), failed]), parse_slo("ttft=1,tpot=1.5"))
    assert summary["seconds"] == 4.0
    latency = summary["latency"]
    assert (latency["jct"]["mean"], latency["jct"]["p50"], latency["jct"]["max"]) == (2.5, 2.5, 4.0)
    assert (latency["ttft"]["mean"], latency["ttft"]["count"]) == (1.0, 2)
    assert (latency["tpot"]["mean"], latency["tpot"]["count"]) == (1.0, 1)
    assert (latency["itl"]["mean"], latency["itl"]["count"], latency["itl"]["max"]) == (1.0, 3, 2.0)
    assert latency["normalized_latency"]["mean"] == (4 / 4 + 1 / 1) / 2
    assert latency["jct"]["p95"] == pytest.approx(1 + 0.95 * 3)
    assert summary["achieved"] == {
        "jobs_per_second": 0.5,
        "output_tokens_per_second": 1.25,
        "total_tokens_per_second": 6.25,
    }
    assert summary["offered"]["jobs_per_second"] == pytest.approx(2 / 2)  # two gaps in two seconds
    assert summary["errors"] == [{"error": "429", "jobs": 1, "detail": "later"}]
    assert summary["goodput"] == {
        "slo": {"ttft": 1.0, "tpot": 1.5}, "jobs": 2, "share": pytest.approx(2 / 3), "jobs_per_second": 0.5,
    }  # fmt: skip
    assert summary["client"]["cpu_microseconds_per_token"] == pytest.approx(400)
    assert summary["client"]["late"]["max"] == pytest.approx(0.001)
    assert warnings(summary) == ["1 of 3 jobs failed; latencies are those of the others."]


def test_short_and_long_answers_are_told_apart() -> None:
    lengths = (64, 65, 1)
    records = [record(i, 0.0, [float(j + 1) for j in range(length)]) for i, length in enumerate(lengths)]
    summary = summarize(replayed(records))
    assert (summary["short"]["jct"]["count"], summary["short"]["jct"]["max"]) == (2, 64.0)
    assert (summary["long"]["jct"]["count"], summary["long"]["jct"]["max"]) == (1, 65.0)


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        ("jct=4", 2),
        ("jct=3.9", 1),
        ("itl=1.9", 1),
        ("itl=2", 2),
        ("tpot=0.9", 1),
        ("normalized_latency=1", 2),
        ("ttft=0.9,jct=9", 0),
    ],
)
def test_goodput(slo: str, met: int) -> None:
    assert summarize(replayed(two_jobs()), parse_slo(slo))["goodput"]["jobs"] == met


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=", "ttft=x", "ttft=0", "ttft=-1", "ttft=nan", "ttft=inf", "e2el=1", "jct=1,jct=2"]
)
def test_what_is_no_slo(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"slo: must be written ttft=0\.5,tpot=0\.1"):
        parse_slo(text)


def test_a_client_that_is_late_or_busy_says_so() -> None:
    records = [record(i, float(i), [i + 1.0], started=i + 0.03) for i in range(3)]
    summary = summarize(Replayed(records, 1.0, 0.9, 3, 3))
    late, busy = warnings(summary)
    assert late.startswith("This client was late: 30 ms at the 99th percentile, 30 ms at most.")
    assert busy.startswith("This client took 0.90 of a core")
    chunks = summarize(replayed([record(0, 0.0, [1.0], usage_tokens=None)]))
    assert warnings(chunks) == ["1 answers came without usage: their tokens are counted by pieces."]


def test_nothing_at_all_has_no_figures() -> None:
    summary = summarize(replayed([record(0, 0.0, [], error=UNFINISHED, started=None)], 0.0, True), parse_slo("jct=1"))
    assert summary["latency"]["jct"] is summary["achieved"]["jobs_per_second"] is summary["goodput"]["share"] is None
    assert warnings(summary) == ["Interrupted: 1 jobs are unfinished and in none of the figures."]
    json.dumps(summary, allow_nan=False)


def serve_run(name: str, round: int, jct: float, rate: float = 2.0, interrupted: bool = False) -> ServeRun:
    target = Target(name, "http://h", "m", Address("127.0.0.1", 1, "h"), "")
    records = [record(0, 0.0, [jct / 2, jct])]
    return ServeRun(target, rate, round, summarize(replayed(records, jct, interrupted)), records)


def test_servers_are_compared_round_by_round() -> None:
    """The ratio is the median of the rounds' ratios, which is not that of the medians."""
    rounds = ((10.0, 5.0), (3.0, 12.0), (1.0, 2.0))
    runs = [serve_run(name, i, jct) for i, each in enumerate(rounds) for name, jct in zip("ab", each, strict=True)]
    (level,) = compare([*runs, serve_run("a", 3, 1e9, interrupted=True)])
    first, other = level.servers
    assert (level.rate, level.rounds, first.target, other.target) == (2.0, 3, "a", "b")
    assert (first.medians["mean_jct"], other.medians["mean_jct"]) == (3.0, 5.0)
    assert first.better == {}
    assert other.better["mean_jct"] == pytest.approx(np.median([10 / 5, 3 / 12, 1 / 2]))
    assert other.better["jobs_per_second"] == pytest.approx(np.median([10 / 5, 3 / 12, 1 / 2]))
    assert "mean_jct_long" not in other.medians
    assert [level.rate for level in compare([serve_run("a", 0, 1.0, rate) for rate in (3.0, 1.0)])] == [3.0, 1.0]
