"""The length distribution: against the lengths it was drawn from, with censoring, forgetting and drift."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastserve.policies.hazards import Hazards, bucket, edge, excess
from fastserve.policies.lengths import LengthDistribution


def test_buckets_are_exact_then_four_an_octave() -> None:
    assert [edge(index) for index in range(21)] == [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64,
    ]  # fmt: skip
    for age in [*range(3000), 2**20 - 1, 2**20, 2**30]:
        assert edge(bucket(age)) <= age < edge(bucket(age) + 1)


def tell(distribution: LengthDistribution, lengths: np.ndarray) -> None:
    for length in lengths.tolist():
        distribution.ended(0, length)


def test_hazards_are_those_of_the_lengths() -> None:
    lengths = np.random.default_rng(1).geometric(0.02, 3000)
    hazards = Hazards(1e9)
    for length in lengths.tolist():
        hazards.survived(0, bucket(length - 1))
        hazards.ended(bucket(length - 1))
    for index in range(len(hazards)):
        reached, ended = (lengths > edge(index)).sum(), ((lengths > edge(index)) & (lengths <= edge(index + 1))).sum()
        assert hazards.counts(index) == pytest.approx((reached, ended), rel=1e-4)


def test_censored_jobs_count_while_they_were_seen() -> None:
    """Half of the jobs are cut at 40 tokens. Those that would have been longer are not taken to end there."""
    lengths = np.random.default_rng(2).geometric(0.02, 8000)
    cut, free = Hazards(1e9), Hazards(1e9)
    for number, length in enumerate(lengths.tolist()):
        index = bucket(length - 1)
        free.survived(0, index)
        free.ended(index)
        if number % 2 and length > 40:
            cut.survived(0, bucket(40))
            cut.censored(bucket(40), 0.0)
        else:
            cut.survived(0, index)
            cut.ended(index)
    for index in range(bucket(150)):
        reached, _ = cut.counts(index)
        hazard = free.hazard(index)
        assert abs(cut.hazard(index) - hazard) < 4 * math.sqrt(hazard * (1 - hazard) / reached) + 1e-3


def test_what_was_reported_too_early_is_taken_back() -> None:
    """A job that emitted 4 tokens was taken to be alive in bucket 4, and then the fourth was its last."""
    distribution, plain = LengthDistribution(1), LengthDistribution(1)
    distribution.survived(0, bucket(4))
    distribution.ended(bucket(4), 4)
    plain.ended(0, 4)
    assert distribution.hazards[:4] == plain.hazards[:4]


def test_the_past_is_forgotten() -> None:
    hazards = Hazards(100)
    for number in range(2000):
        hazards.ended(0 if number < 1000 else 1)
    reached, ended = hazards.counts(0)
    assert reached == pytest.approx(0, abs=0.01) and ended == pytest.approx(0, abs=0.01)
    weights = sum(0.99**age for age in range(1, 1001))
    assert hazards.counts(1) == (pytest.approx(weights), pytest.approx(weights))


def test_forgetting_for_long_stays_within_floats() -> None:
    hazards = Hazards(2)
    for _ in range(5000):
        hazards.survived(0, 1)
        hazards.ended(1)
    assert hazards.counts(0) == pytest.approx((1, 0)) and hazards.counts(1) == pytest.approx((1, 1))  # 1/2 + 1/4 + …


def test_enough_is_learned_after_so_many_completions() -> None:
    distribution = LengthDistribution(50)
    for number in range(50):
        assert distribution.learned is False, number
        distribution.ended(0, 10)
    assert distribution.learned is True
    assert distribution.hazard(bucket(9)) > 0.4 > 0.2 > distribution.hazard(bucket(5))
    for _ in range(10):
        distribution.censored(0, 5, complete=False)
    assert distribution.version == 1  # aborted jobs complete nothing


stationary = {
    "constant": lambda draw, n: np.full(n, 200),
    "bimodal": lambda draw, n: np.where(draw.random(n) < 0.9, 32, 1000),
    "log-normal": lambda draw, n: np.exp(draw.normal(5.3, 1.1, n)).astype(int) + 1,
    "geometric": lambda draw, n: draw.geometric(0.01, n),
    "pareto": lambda draw, n: (draw.pareto(1.0, n) + 1).clip(1, 2048).astype(int),
}


@pytest.mark.parametrize("kind", stationary)
def test_a_stationary_trace_is_not_taken_for_drift(kind: str) -> None:
    for seed in range(3):
        distribution = LengthDistribution(200)
        for length in stationary[kind](np.random.default_rng(seed), 10_000).tolist():
            learned = distribution.learned
            distribution.ended(0, length)
            assert not learned or distribution.learned


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_drift_is_noticed_within_a_few_hundred_completions(factor: float) -> None:
    draw = np.random.default_rng(3)
    distribution = LengthDistribution(200)
    tell(distribution, np.exp(draw.normal(5, 0.8, 3000)).astype(int) + 1)
    assert distribution.learned
    needed = 0
    while distribution.learned and needed < 1000:
        distribution.ended(0, int(factor * math.exp(draw.normal(5, 0.8))) + 1)
        needed += 1
    assert 20 < needed < 600
    tell(distribution, (factor * np.exp(draw.normal(5, 0.8, 250))).astype(int) + 1)
    assert distribution.learned


def test_excess_is_in_standard_deviations() -> None:
    """Of samples of the same lengths, the largest deviation is that of a Brownian motion: median 1.15, 99 % < 2.81."""
    draw = np.random.default_rng(4)

    def told(lengths: list[int]) -> Hazards:
        hazards = Hazards(1e9)
        for length in lengths:
            hazards.survived(0, bucket(length - 1))
            hazards.ended(bucket(length - 1))
        return hazards

    found = []
    before = draw.geometric(0.02, 2000).tolist()
    for _ in range(200):
        recent = draw.geometric(0.02, 200).tolist()
        found.append(excess(told(recent), told(before + recent))[0])
    assert 0.8 < float(np.median(found)) < 1.4
    assert float(np.mean(np.array(found) > 2.81)) < 0.04
