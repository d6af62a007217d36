"""Streaming statistics against NumPy, Student's quantiles against printed tables."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.bench import stats
from fastserve.bench.stats import EXACT_VALUES, RELATIVE_ERROR, Stream, estimate, student_quantile

PERCENTS = (0, 1, 50, 95, 99, 99.9, 100)


def stream_of(values: list[float]) -> Stream:
    stream = Stream()
    for value in values:
        stream.add(value)
    return stream


@given(st.lists(st.floats(0.0, 1e9), min_size=1, max_size=300))
def test_few_values_are_exact(values: list[float]) -> None:
    stream = stream_of(values)
    assert len(stream) == len(values)
    assert stream.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-15)
    assert stream.maximum == max(values)
    assert stream.percentiles(*PERCENTS) == np.percentile(values, PERCENTS).tolist()


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=300), st.integers(1, 50))
def test_many_values_are_within_the_error(values: list[float], exact: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "EXACT_VALUES", exact)
        stream = stream_of(values)
        assert stream.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-14)
        assert stream.maximum == max(values) and len(stream) == len(values)
        wanted = np.percentile(values, PERCENTS)
        assert stream.percentiles(*PERCENTS) == pytest.approx(wanted.tolist(), rel=RELATIVE_ERROR * (1 + 1e-9))
        for value in values:  # and it goes on after it was asked
            stream.add(value)
        assert stream.percentiles(50)[0] == pytest.approx(float(np.median(values * 2)), rel=RELATIVE_ERROR * (1 + 1e-9))


def test_a_heavy_tail_beyond_what_is_exact() -> None:
    values = np.random.default_rng(0).pareto(1.2, 3 * EXACT_VALUES) + 1e-3
    stream = stream_of(values.tolist())
    assert stream.percentiles(*PERCENTS) == pytest.approx(np.percentile(values, PERCENTS).tolist(), rel=RELATIVE_ERROR)
    assert stream.mean == pytest.approx(math.fsum(values.tolist()) / len(values), rel=1e-14)


def test_no_value_has_no_statistics() -> None:
    stream = Stream()
    assert len(stream) == 0 and math.isnan(stream.mean) and math.isnan(stream.maximum)
    assert all(map(math.isnan, stream.percentiles(50, 99)))


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_what_is_no_duration_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite number of at least 0"):
        Stream().add(value)


@pytest.mark.parametrize(  # from printed tables, two-sided 95 % and 99 %
    ("degrees", "t95", "t99"),
    [
        (1, 12.706, 63.657),
        (2, 4.303, 9.925),
        (3, 3.182, 5.841),
        (4, 2.776, 4.604),
        (5, 2.571, 4.032),
        (9, 2.262, 3.250),
        (10, 2.228, 3.169),
        (29, 2.045, 2.756),
        (30, 2.042, 2.750),
        (120, 1.980, 2.617),
    ],
)
def test_students_quantiles(degrees: int, t95: float, t99: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(t95, abs=6e-4)
    assert student_quantile(0.995, degrees) == pytest.approx(t99, abs=6e-4)


def test_students_quantiles_become_normal() -> None:
    assert student_quantile(0.975, 100_000) == pytest.approx(NormalDist().inv_cdf(0.975), rel=1e-4)


def test_estimates() -> None:
    # Mean 3, deviation √2.5, five values: 2.776 · √2.5 ÷ √5.
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.runs) == (3.0, 5)
    assert found.half_width == pytest.approx(2.7764 * math.sqrt(0.5), rel=1e-4)
    assert estimate([4.0]).half_width is None
    assert estimate([4.0, 4.0]).half_width == 0.0
    with pytest.raises(ValueError, match="no value"):
        estimate([])


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draw = np.random.default_rng(1)
    samples = draw.normal(10.0, 2.0, (2000, 4)).tolist()
    held = sum(abs(found.mean - 10.0) <= (found.half_width or 0.0) for found in map(estimate, samples))
    assert abs(held - 1900) < 4 * math.sqrt(2000 * 0.95 * 0.05)
