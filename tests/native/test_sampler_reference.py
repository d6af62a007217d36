"""The sampler of every instruction set against a plain one in float64 that sorts the vocabulary."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastserve import _C

# Around every vector width and block of 256, and a real vocabulary.
SIZES = [1, 2, 3, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300, 1000, 4096, 49152, 50257]
PRECISION = 1e-6  # of a probability: float32 weights, float64 sums over blocks


@pytest.fixture(params=_C.instruction_sets(), autouse=True)
def isa(request: pytest.FixtureRequest) -> str:
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTSERVE_ISA", request.param)
    request.addfinalizer(patch.undo)
    return str(request.param)


def make_params(**values: object) -> _C.SamplingParams:
    params = _C.SamplingParams()
    for name, value in values.items():
        setattr(params, name, value)
    return params


def make_logits(seed: int, size: int, spread: float, step: float = 0.0, masked: float = 0.0) -> npt.NDArray[np.float32]:
    """Normal logits; in multiples of `step`, so that many are equal, and some -infinity."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(size) * spread
    if step:
        logits = np.round(logits / step) * step
    logits[rng.random(size) < masked] = -np.inf
    logits[rng.integers(size)] = 0.25  # something to choose
    return logits.astype(np.float32)


class Reference:
    """Every step as its definition has it: one sort, best first, ties by token id."""

    def __init__(self, logits: npt.NDArray[np.float32], temperature: float, top_k: int, min_p: float) -> None:
        exact = logits.astype(np.float64)
        exponents = (exact - exact.max()) / np.float64(np.float32(temperature))
        weights = np.exp(exponents)
        if min_p:
            weights[exponents < np.log(np.float64(np.float32(min_p)))] = 0
        order = np.lexsort((np.arange(len(logits)), -exact))
        if 0 < top_k < len(logits):
            weights[logits < logits[order[top_k - 1]]] = 0
        self.order, self.weights = order, weights
        self.shares = np.cumsum(weights[order]) / weights.sum()

    def top_p(self, place: float) -> float:
        """A top_p whose cut no rounding moves: halfway between two partial sums, `place` of the way down."""
        kept = int((self.weights > 0).sum())
        index = min(int(place * kept), kept - 1)
        before = self.shares[index - 1] if index else 0.0
        return float((before + self.shares[index]) / 2)

    def probabilities(self, top_p: float) -> npt.NDArray[np.float64]:
        kept = self.weights.copy()
        if top_p < 1:
            kept[self.order[int(np.searchsorted(self.shares, top_p)) + 1 :]] = 0
        return kept / kept.sum()


cases = {
    "seed": st.integers(0, 2**32 - 1),
    "size": st.sampled_from(SIZES),
    "spread": st.sampled_from([0.0, 0.3, 1.0, 3.0, 20.0]),
    "step": st.sampled_from([0.0, 0.0, 0.5]),
    "masked": st.sampled_from([0.0, 0.0, 0.5, 0.999]),
    "temperature": st.sampled_from([0.01, 0.3, 0.8, 1.0, 2.0, 50.0]),
    "top_k": st.one_of(st.just(0), st.integers(1, 300), st.integers(1, 60_000)),
    "min_p": st.one_of(st.just(0.0), st.sampled_from([1e-6, 0.001, 0.05, 0.7, 1.0])),
    "place": st.one_of(st.none(), st.floats(0, 1), st.floats(0, 0.01)),
}


@settings(max_examples=150, deadline=None)
@given(**cases)
@example(seed=0, size=49152, spread=1.0, step=0.0, masked=0.0, temperature=2.0, top_k=0, min_p=0.0, place=0.9)
@example(seed=1, size=49152, spread=0.0, step=0.0, masked=0.0, temperature=1.0, top_k=0, min_p=0.0, place=0.5)
@example(seed=2, size=49152, spread=3.0, step=0.5, masked=0.0, temperature=0.8, top_k=0, min_p=0.0, place=0.001)
@example(seed=3, size=49152, spread=3.0, step=0.0, masked=0.0, temperature=0.8, top_k=5000, min_p=0.0, place=0.3)
def test_distribution_and_draws(
    seed: int,
    size: int,
    spread: float,
    step: float,
    masked: float,
    temperature: float,
    top_k: int,
    min_p: float,
    place: float | None,
) -> None:
    logits = make_logits(seed, size, spread, step, masked)
    reference = Reference(logits, temperature, top_k, min_p)
    top_p = 1.0 if place is None else reference.top_p(place)
    expected = reference.probabilities(float(np.float32(top_p)))
    params = make_params(temperature=temperature, top_k=top_k, min_p=min_p, top_p=top_p)
    actual = _C.distribution(logits, params)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=PRECISION)
    elsewhere = (actual > 0) != (expected > 0)  # where the cut lies among tokens lighter than the precision
    assert reference.weights[elsewhere].sum() <= 4 * PRECISION * reference.weights.sum()

    cumulative = np.cumsum(expected)
    for index in range(3):
        params.seed = seed
        token = _C.sample(logits, params, [], [0] * index)[0]
        uniform = _C.uniform(seed, index)
        assert actual[token] > 0
        low = cumulative[token - 1] if token else 0.0
        assert low - PRECISION <= uniform <= cumulative[token] + PRECISION


@pytest.mark.parametrize("size", SIZES)
def test_top_p_keeps_the_first_of_equals(size: int) -> None:
    for share in (0.1, 0.5, 0.9):
        kept = int(np.ceil(share * size - 1e-4))
        actual = _C.distribution(np.full(size, 1.5, np.float32), make_params(top_p=kept / size - 0.3 / size))
        np.testing.assert_allclose(actual, (np.arange(size) < kept) / kept, atol=PRECISION)


def test_top_p_just_below_one_may_never_be_reached() -> None:
    """Rounding may leave the sum of all weights short of the target: then all stay."""
    for seed in range(40):
        logits = np.maximum(make_logits(seed, 3000 + 37 * seed, 1.0), 0.0)  # half of them equal, and the smallest
        params = make_params(temperature=0.9, top_p=float(np.nextafter(np.float32(1), np.float32(0))))
        expected = Reference(logits, 0.9, 0, 0.0).probabilities(1.0)
        np.testing.assert_allclose(_C.distribution(logits, params), expected, rtol=0, atol=PRECISION)


@settings(max_examples=60, deadline=None)
@given(seed=cases["seed"], size=cases["size"], spread=cases["spread"], step=cases["step"], count=st.integers(0, 400))
def test_logprobs(seed: int, size: int, spread: float, step: float, count: int) -> None:
    logits = make_logits(seed, size, spread, step)
    exact = logits.astype(np.float64)
    expected = exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())
    for params in (make_params(logprobs=count), make_params(logprobs=count, top_p=0.5, bias=[(0, 1.0)])):
        token, logprob, top = _C.sample(logits, params)
        assert logprob == pytest.approx(expected[token], abs=PRECISION * (1 + abs(expected[token])))
        order = np.lexsort((np.arange(size), -exact))[:count]
        assert [index for index, _ in top] == order.tolist()
        np.testing.assert_allclose([value for _, value in top], expected[order], rtol=PRECISION, atol=PRECISION)


def test_logprobs_reach_masked_tokens() -> None:
    logits = np.full(600, -np.inf, np.float32)
    logits[[300, 599]] = 1.0, 2.0
    top = _C.sample(logits, make_params(logprobs=4))[2]
    assert [token for token, _ in top] == [599, 300, 0, 1]
    assert top[2][1] == -np.inf


@pytest.mark.parametrize("size", SIZES)
def test_greedy_takes_the_first_of_the_largest(size: int) -> None:
    rng = np.random.default_rng(size)
    greedy = make_params(temperature=0.0)
    for _ in range(10):
        logits = np.round(rng.standard_normal(size) * 2).astype(np.float32)
        assert _C.sample(logits, greedy)[0] == logits.argmax()
    assert _C.sample(np.where(np.arange(size) % 2, 0.0, -0.0).astype(np.float32), greedy)[0] == 0


@pytest.mark.parametrize("size", [size for size in SIZES if size <= 1000])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_not_a_number_is_found_anywhere(size: int, temperature: float) -> None:
    clean = make_logits(size, size, 3.0)
    for place in range(size):
        logits = clean.copy()
        logits[place] = np.nan
        with pytest.raises(_C.Error, match="not a number"):
            _C.sample(logits, make_params(temperature=temperature))


def test_infinite_and_masked_logits() -> None:
    params = make_params(top_p=0.9)
    with pytest.raises(_C.Error, match="infinite logit"):
        _C.sample(np.array([0.0, np.inf, 1.0], np.float32), params)
    with pytest.raises(_C.Error, match="every token is masked"):
        _C.sample(np.full(300, -np.inf, np.float32), params)
    only = np.full(49152, -np.inf, np.float32)
    only[40_000] = -3e38
    for seed in range(5):
        assert _C.sample(only, make_params(seed=seed, temperature=0.8))[0] == 40_000


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6, 3e38])
def test_extreme_temperatures(temperature: float) -> None:
    logits = make_logits(5, 3000, 3.0)
    actual = _C.distribution(logits, make_params(temperature=temperature))
    if temperature < 1:
        assert actual[logits.argmax()] == pytest.approx(1, abs=PRECISION)
    else:
        np.testing.assert_allclose(actual, 1 / 3000, atol=PRECISION)


def test_a_row_gives_the_same_bits_wherever_it_lies() -> None:
    """Alignment in memory, and the larger row sampled before, which leaves its list behind, change nothing."""
    logits = make_logits(9, 5003, 2.0)
    params = make_params(temperature=1.3, top_p=0.97)
    expected = _C.distribution(logits, params)
    for shift in range(1, 5):
        _C.distribution(make_logits(shift, 50_257, 1.0), params)
        shifted = np.concatenate([np.zeros(shift, np.float32), logits])[shift:]
        assert np.array_equal(_C.distribution(shifted, params), expected)
