"""When another library's product may stand in for ours: never if a row's bits would depend on the number of rows."""

from __future__ import annotations

import math
from collections import Counter
from types import ModuleType
from typing import Any

import numpy as np
import pytest

OURS = [10.0, 11.0, 50.0, 200.0]  # at 1, 32, 512 and 2048 rows


def _trial(
    kernels: ModuleType, seconds: list[float], *, across: bool = True, ours: bool = False, runs: bool = True
) -> Any:
    return kernels.ProductTrial("candidate", runs, across, ours, seconds)


@pytest.mark.parametrize(
    ("seconds", "across", "ours", "taken", "from_rows", "verdict"),
    [
        # Other bits than ours: for every number of rows or for none.
        ([10.4, 11.5, 40, 100], True, False, 0, 0, "taken"),
        ([10.6, 11.0, 40, 100], True, False, -1, 0, "slower for few rows"),
        ([10.0, 11.6, 40, 100], True, False, -1, 0, "slower for few rows"),
        ([10.0, 11.0, 90, 100], True, False, 0, 0, "taken"),
        ([5.0, 5.0, 20, 200], True, False, -1, 0, "not faster for many rows"),
        # The same bits: from where it is faster.
        ([30.0, 30.0, 40, 100], True, True, 0, 512, "taken"),
        ([30.0, 30.0, 60, 100], True, True, 0, 2048, "taken"),
        ([30.0, 9.0, 40, 100], True, True, 0, 32, "taken"),
        ([9.0, 9.0, 40, 100], True, True, 0, 0, "taken"),
        ([9.0, 9.0, 60, 100], True, True, 0, 2048, "taken"),
        ([1.0, 1.0, 1, 201], True, True, -1, 0, "not faster for many rows"),
        # However fast:
        ([1.0, 1.0, 1, 1], False, False, -1, 0, "depend on the number of rows"),
    ],
)
def test_what_is_taken(
    kernels: ModuleType, seconds: list[float], across: bool, ours: bool, taken: int, from_rows: int, verdict: str
) -> None:
    assert kernels.TIMED_ROWS == [1, 32, 512, 2048]
    trial = _trial(kernels, seconds, across=across, ours=ours)
    choice, first, verdicts = kernels.choose_product([trial], OURS)
    assert (choice, first) == (taken, from_rows)
    assert len(verdicts) == 1
    assert verdict in verdicts[0]


def test_the_fastest_for_many_rows_is_taken(kernels: ModuleType) -> None:
    trials = [
        _trial(kernels, [10, 11, 45, 120]),
        _trial(kernels, [0.0] * 4, runs=False),
        _trial(kernels, [30, 30, 45, 90], ours=True),
        _trial(kernels, [10, 11, 45, 80], across=False),
        _trial(kernels, [10, 11, 45, 110]),
    ]
    choice, first, verdicts = kernels.choose_product(trials, OURS)
    assert (choice, first) == (2, 512)
    assert verdicts == [
        "may be taken",
        "cannot do every number of rows",
        "taken",
        "a row's bits depend on the number of rows",
        "may be taken",
    ]
    assert kernels.choose_product([], OURS) == (-1, 0, [])


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(
    ("kind", "runs", "across", "ours"),
    [
        ("same", True, True, True),
        ("differs", True, True, False),
        ("depends", True, False, False),
        ("cannot", False, True, True),
    ],
)
def test_what_is_measured(kernels: ModuleType, kind: str, wide: bool, runs: bool, across: bool, ours: bool) -> None:
    """On stand-ins made of our own kernels."""
    trial = kernels.measure_product("bfloat16", 24, 128, wide, kind)
    assert trial.runs == runs
    if runs:
        assert (trial.same_across_rows, trial.same_as_ours) == (across, ours)
    if runs and across:
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
