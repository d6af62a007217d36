"""OPT-175B on 16 A100: what pipelined scheduling and preemption are worth there, on runs of a second."""

from __future__ import annotations

import pytest
from reproduction.cases import Case, measured_capacity, simulate
from reproduction.opt175b import CONTENDERS, PAPER_CURVES, PAPER_RATES, case, paper_rate
from reproduction.search import MEAN, TAIL

ALONE, PIPED = "skip-join, one batch at a time", "skip-join"


def few(contender: str, workload: str, jobs: int) -> Case:
    return case(workload, jobs, contender)


def test_the_stages_are_both_at_work() -> None:
    """Decodes that are all alike: two batches of 16 in two stages get done twice what one batch through both does."""
    done = {name: measured_capacity(few(name, "constant:16,64", 160), 0)["jobs_per_second"] for name in (PIPED, ALONE)}
    assert done[PIPED] / done[ALONE] == pytest.approx(2.0, rel=0.03)
    # 32 rows in two stages of 20.6 ms (see test_presets), and a little for prefills and for KV that is read.
    assert done[PIPED] == pytest.approx(32 / (64 * 0.0411), rel=0.05)


@pytest.mark.parametrize("workload", ["sharegpt", "alpaca"])
def test_preemption_and_pipelining_both_shorten_the_wait(workload: str) -> None:
    """At one and a half times what fcfs gets done, as seconds a token: each without the other is worse than both."""
    rate = 1.5 * measured_capacity(few(PIPED, workload, 150), 0)["jobs_per_second"]
    latency = {
        name: simulate(few(name, workload, 150), CONTENDERS[name].policy, rate, 0)[MEAN]
        for name in ("fcfs, one batch at a time", "fcfs", ALONE, PIPED)
    }
    assert latency[PIPED] < 0.9 * latency["fcfs"] < latency["fcfs, one batch at a time"]
    assert latency[PIPED] < 0.6 * latency[ALONE] < latency["fcfs, one batch at a time"]


@pytest.mark.parametrize(
    ("workload", "rates"),
    [
        ("sharegpt", {"FasterTransformer": 0.159, "vLLM": 0.76, "FCFS": 2.18, "FastServe": 5.31}),
        ("alpaca", {"FasterTransformer": 2.12, "vLLM": 6.04, "FCFS": 12.4, "FastServe": 20.1}),
    ],
)
def test_the_published_curves_cross_the_limit_where_it_is_published(workload: str, rates: dict[str, float]) -> None:
    for system, rate in rates.items():
        assert paper_rate(workload, MEAN, system) == pytest.approx(rate, rel=0.01), system


def test_published_curves_have_no_more_points_than_rates() -> None:
    for (workload, _), curves in PAPER_CURVES.items():
        assert all(len(curve) <= len(PAPER_RATES[workload]) for curve in curves.values())
    assert paper_rate("alpaca", TAIL, "FCFS") is None  # there is no such curve
