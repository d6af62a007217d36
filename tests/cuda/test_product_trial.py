"""When another library's product may stand in for ours: only if nobody can tell by a bit."""

from __future__ import annotations

import math
from collections import Counter
from types import ModuleType
from typing import Any

import numpy as np
import pytest

OURS = [10.0, 11.0, 50.0, 200.0]  # at 1, 32, 512 and 2048 rows


def _trial(kernels: ModuleType, seconds: list[float], *, ours: bool = True, runs: bool = True) -> Any:
    return kernels.ProductTrial("candidate", runs, ours, seconds)


@pytest.mark.parametrize(
    ("seconds", "ours", "taken", "from_rows", "verdict"),
    [
        # From where it is faster.
        ([30.0, 30.0, 40, 100], True, 0, 512, "taken"),
        ([30.0, 30.0, 60, 100], True, 0, 2048, "taken"),
        ([30.0, 9.0, 40, 100], True, 0, 32, "taken"),
        ([9.0, 9.0, 40, 100], True, 0, 0, "taken"),
        ([9.0, 9.0, 60, 100], True, 0, 2048, "taken"),
        ([1.0, 1.0, 1, 201], True, -1, 0, "not faster for many rows"),
        # However fast: that would make the bits a matter of time.
        ([1.0, 1.0, 1, 1], False, -1, 0, "its bits are not ours"),
    ],
)
def test_what_is_taken(
    kernels: ModuleType, seconds: list[float], ours: bool, taken: int, from_rows: int, verdict: str
) -> None:
    assert kernels.TIMED_ROWS == [1, 32, 512, 2048]
    choice, first, verdicts = kernels.choose_product([_trial(kernels, seconds, ours=ours)], OURS)
    assert (choice, first) == (taken, from_rows)
    assert len(verdicts) == 1
    assert verdict in verdicts[0]


def test_the_fastest_for_many_rows_is_taken(kernels: ModuleType) -> None:
    trials = [
        _trial(kernels, [10, 11, 45, 120]),
        _trial(kernels, [0.0] * 4, runs=False),
        _trial(kernels, [30, 30, 45, 90]),
        _trial(kernels, [10, 11, 45, 80], ours=False),
        _trial(kernels, [10, 11, 45, 110]),
    ]
    choice, first, verdicts = kernels.choose_product(trials, OURS)
    assert (choice, first) == (2, 512)
    assert verdicts == [
        "may be taken",
        "cannot do every number of rows",
        "taken",
        "its bits are not ours",
        "may be taken",
    ]
    assert kernels.choose_product([], OURS) == (-1, 0, [])


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(
    ("kind", "runs", "ours"),
    [
        ("same", True, True),
        ("differs", True, False),
        ("depends", True, False),
        ("adds", True, False),
        ("many", True, False),
        ("cannot", False, False),
    ],
)
def test_what_is_measured(kernels: ModuleType, kind: str, wide: bool, runs: bool, ours: bool) -> None:
    """On stand-ins made of our own kernels."""
    if kind == "adds" and not wide:
        ours = True  # which is never added to anything
    trial = kernels.measure_product("bfloat16", 24, 128, wide, kind, most_rows=2100 if kind == "many" else 1)
    assert (trial.runs, trial.same_as_ours) == (runs, ours)
    if ours:
        # The median of 0, 3, 1, 4, 2; of few rows a run has eight products.
        assert trial.seconds == [2 / 8, 2 / 8, 2, 2]


@pytest.mark.parametrize("shape", [(24, 128), (64, 192)])
def test_weights_are_not_in_the_cache_when_they_are_timed(kernels: ModuleType, shape: tuple[int, int]) -> None:
    """Before a weight is multiplied by again, others come that are twice what the device's cache holds, or more."""
    if not hasattr(kernels, "simt"):
        pytest.skip("so many products as to see it only where the cache is small")
    products = kernels.timed_products("bfloat16", *shape)
    last: dict[int, int] = {}
    for i, (_, weight) in enumerate(products):
        assert (i - last.get(weight, -(2**40))) * 2 * math.prod(shape) > 2 * kernels.cache_bytes()
        last[weight] = i
    counts = Counter(rows for rows, _ in products)
    assert counts[1] == counts[32] > counts[512] > 0


@pytest.mark.parametrize("window", [64, 128, 1024])
def test_sums_become_an_output_in_windows(kernels: ModuleType, window: int) -> None:
    rng = np.random.default_rng(0)
    sums, onto = (rng.standard_normal((5, 203)).astype(np.float32) for _ in range(2))
    bias = rng.standard_normal(203).astype(np.float32)
    assert np.array_equal(kernels.finish_product(sums, bias, onto, window), onto + (sums + bias))
