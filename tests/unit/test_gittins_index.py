"""The Gittins index against brute force."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.policies.hazards import bucket, edge
from fastserve.policies.indices import gittins


def brute_force(prefill: float, age: int, lengths: list[int], stops: Iterable[int]) -> float:
    """min over stops of E[seconds until done or stopped] / P(done by then), a decode taking a second."""
    rest = [length - age for length in lengths if length > age]
    first = 1 if age == 0 else 0  # the first token comes with the prefill
    ratios = []
    for stop in (stop - age for stop in stops if stop > age):
        done = sum(left <= stop for left in rest)
        if done:
            ratios.append(sum(prefill + min(left, stop) - first for left in rest) / done)
    return min(ratios)


def empirical(lengths: list[int], index: int) -> float:
    reached = sum(length > edge(index) for length in lengths)
    return sum(edge(index) < length <= edge(index + 1) for length in lengths) / reached if reached else 0.5


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=30), st.integers(0, 7), st.floats(0.1, 50))
def test_the_index_is_that_of_brute_force(lengths: list[int], age: int, prefill: float) -> None:
    if max(lengths) <= age:
        return
    prefill = prefill if age == 0 else 0.0
    index, remaining, decodes = gittins(prefill, age, 60, lambda b: empirical(lengths, b), lambda b: 1.0)
    assert index == pytest.approx(brute_force(prefill, age, lengths, range(1, 9)))
    rest = [length - age - (age == 0) for length in lengths if length > age]
    assert decodes == pytest.approx(sum(rest) / len(rest))
    assert remaining == pytest.approx(prefill + decodes)


@pytest.mark.parametrize("age", [0, 1, 8, 20, 48, 128, 256])
def test_the_index_of_buckets_is_that_of_brute_force(age: int) -> None:
    """Lengths spread evenly over each bucket, and very unevenly over the buckets; a stretch ends at an edge."""
    draw = random.Random(age)
    lengths = [
        length
        for index in range(bucket(512))
        for _ in range(draw.choice([0, 1, 1, 9]))
        for length in range(edge(index) + 1, edge(index + 1) + 1)
    ]
    edges = [edge(index) for index in range(1, bucket(512) + 1)]
    index, *_ = gittins(3.0, bucket(age), 60, lambda b: empirical(lengths, b), lambda b: 1.0)
    assert index == pytest.approx(brute_force(3.0, age, lengths, edges))


def test_the_longest_output_bounds_the_index() -> None:
    """Nothing ends by itself; a job that may emit 16 tokens has 1 + 15 s to go, after 12 tokens 4 s."""
    assert gittins(1.0, 0, bucket(15), lambda b: 0.0, lambda b: 1.0)[1] == pytest.approx(1 + 13 + 1.5)
    assert gittins(0.0, bucket(12), bucket(15), lambda b: 0.0, lambda b: 1.0)[0] == pytest.approx(2 + 1.5)
