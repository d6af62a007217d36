"""Sampling on the device: against the CPU's sampler, and against the same rules in float64 NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sampling_batches import NOT_WRITTEN
from sampling_batches import logits_of as _logits
from sampling_batches import on_cpu as _on_cpu
from sampling_batches import sample as _sample
from sampling_reference import DOUBT, Case, Params, adjusted, draw, logprobs, probabilities, top_tokens

from fastserve import _C

MAX_VOCAB = 2**20


def _uniform(case: Case) -> float:
    return _C.uniform(case.params.seed, case.index)


def _check_logprobs(case: Case, result: tuple[int, float, str], top: list[tuple[int, float]]) -> None:
    if case.params.logprobs < 0:
        assert np.isnan(result[1])
        return
    expected = logprobs(case)
    np.testing.assert_allclose(result[1], expected[result[0]], rtol=1e-6, atol=1e-5)
    assert [token for token, _ in top] == top_tokens(case)
    np.testing.assert_allclose([p for _, p in top], expected[top_tokens(case)], rtol=1e-6, atol=1e-5)


def _decided(case: Case, count: int) -> list[Case]:
    """The case with the first seeds whose draws are not at a boundary."""
    cases = (dataclasses.replace(case, params=dataclasses.replace(case.params, seed=seed)) for seed in range(4 * count))
    decided = [c for c in cases if draw(c, _uniform(c))[1] > DOUBT][:count]
    assert len(decided) == count
    return decided


def _check_draws(batch: list[Case], results: list[tuple[int, float, str]]) -> None:
    for case, result in zip(batch, results, strict=True):
        assert result[2] == ""
        assert result[0] == draw(case, _uniform(case))[0]
        assert result[0] == _on_cpu(case)[0]


# ---- against the CPU and float64, whatever the parameters


@st.composite
def cases(draw_: Any, vocab: int) -> Case:
    tokens = st.integers(0, vocab - 1)
    logits = _logits(draw_(st.integers(0, 10**6)), vocab, draw_(st.sampled_from([0.1, 1.0, 3.0, 10.0])))
    if draw_(st.booleans()):
        logits = np.round(logits)  # many equals
    some = st.lists(tokens, max_size=8)
    return Case(
        logits,
        Params(
            temperature=draw_(st.one_of(st.just(0.0), st.floats(0.01, 4.0), st.sampled_from([1e-30, 1e-4, 50.0, 1e6]))),
            top_k=draw_(st.one_of(st.just(0), st.integers(1, vocab + 1))),
            top_p=draw_(st.one_of(st.just(1.0), st.floats(1e-6, 0.9999))),
            min_p=draw_(st.one_of(st.just(0.0), st.floats(0.0001, 1.0))),
            repetition_penalty=draw_(st.one_of(st.just(1.0), st.floats(0.5, 2.0))),
            presence_penalty=draw_(st.one_of(st.just(0.0), st.floats(-2.0, 2.0))),
            frequency_penalty=draw_(st.one_of(st.just(0.0), st.floats(-2.0, 2.0))),
            logprobs=draw_(st.integers(-1, 20)),
            min_tokens=draw_(st.integers(0, 4)),
            seed=draw_(st.integers(0, 2**64 - 1)),
            bias=list(draw_(st.dictionaries(st.integers(0, vocab + 2), st.floats(-100.0, 100.0, width=32))).items()),
            stop_tokens=draw_(st.lists(st.integers(0, vocab + 2), max_size=4)),
        ),
        draw_(some),
        draw_(some),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data(), vocab=st.sampled_from([1, 2, 3, 31, 64, 211, 513, 1000]))
def test_tokens_are_the_cpus(kernels: Any, data: st.DataObject, vocab: int) -> None:
    batch = data.draw(st.lists(cases(vocab), min_size=1, max_size=3))
    order = data.draw(st.permutations(range(len(batch))))
    results, tops, last, _ = _sample(kernels, batch, list(order))
    for case, result, top, sampled in zip(batch, results, tops, last, strict=True):
        if adjusted(case).max() == -np.inf:
            assert result[0] == -1 and result[2] == NOTHING and sampled == 0
            continue
        assert result[2] == ""
        assert sampled == result[0]
        _check_logprobs(case, result, top)
        token, doubt = draw(case, _uniform(case))
        if case.params.temperature > 0:
            assert probabilities(case)[result[0]] > 0 or doubt < DOUBT
        assume(doubt > DOUBT)
        assert result[0] == token
        assert result[0] == _on_cpu(case)[0]


NOTHING = "every token is masked: logit_bias or min_tokens leaves nothing to choose"


@pytest.mark.parametrize("vocab", [1, 7, 64, 511, 512, 513, 997])
@pytest.mark.parametrize(
    "params",
    [
        Params(),
        Params(temperature=2.5),
        Params(top_k=1),
        Params(top_k=5),
        Params(top_p=1e-6),
        Params(top_p=0.7),
        Params(top_p=0.9999),
        Params(min_p=0.2),
        Params(temperature=0.6, top_k=40, top_p=0.9, min_p=0.01),
    ],
    ids=str,
)
def test_many_draws_are_the_cpus(kernels: Any, vocab: int, params: Params) -> None:
    batch = _decided(Case(_logits(vocab, vocab), params), 40)
    _check_draws(batch, _sample(kernels, batch)[0])


def test_all_that_is_kept_is_drawn_and_nothing_else(kernels: Any) -> None:
    """At a high temperature what is kept is about equally likely."""
    logits = _logits(5, 300)
    for params in (Params(top_k=12), Params(top_p=0.03), Params(top_k=30, top_p=0.4)):
        batch = [Case(logits, dataclasses.replace(params, temperature=500.0, seed=seed)) for seed in range(160)]
        drawn = {result[0] for result in _sample(kernels, batch)[0]}
        assert drawn == set(np.flatnonzero(probabilities(batch[0])))


# ---- a vocabulary of today's size


@pytest.mark.parametrize(
    "params",
    [
        Params(temperature=0.0, logprobs=5),
        Params(logprobs=20),
        Params(top_k=50, top_p=0.9, temperature=0.8),
        Params(top_p=0.95),
        Params(top_k=20000, temperature=3.0),  # more candidates than shared memory holds
        Params(top_p=0.9, temperature=4.0),
        Params(top_k=30000, top_p=0.8, temperature=5.0),
        Params(min_p=0.05, repetition_penalty=1.3, frequency_penalty=0.1),
    ],
    ids=str,
)
def test_a_large_vocabulary(kernels: Any, params: Params) -> None:
    vocab = 128_256
    batch = _decided(Case(_logits(3, vocab, 2.5), params, prompt=[1, 5], output=[70_000, 5, 5]), 2)
    results, tops, _, _ = _sample(kernels, batch)
    _check_draws(batch, results)
    for case, result, top in zip(batch, results, tops, strict=True):
        _check_logprobs(case, result, top)


def test_a_vocabulary_that_is_too_large_is_refused(kernels: Any) -> None:
    with pytest.raises(RuntimeError, match=f"1 to {MAX_VOCAB}"):
        kernels.sample(
            logits=np.zeros((1, 64), np.float32),
            vocab=MAX_VOCAB + 1,
            rows=[kernels.SampleRow()],
            biases=[],
            stop_tokens=[],
            last_sampled=np.zeros(1, np.int32),
            counts=np.zeros((0, 64), np.uint32),
        )


# ---- equals


@pytest.mark.parametrize("vocab", [1, 300, 1000, 9000])  # the last does not fit in shared memory
def test_equal_logits_are_ranked_by_token(kernels: Any, vocab: int) -> None:
    """Every token weighs 1: half of them is the lower ids, and a draw of u is token u · (how many are kept)."""
    half = -(-vocab // 2)
    batch = [Case(np.full(vocab, 2.5, np.float32), Params(top_p=0.5, seed=seed)) for seed in range(6)]
    batch += [Case(np.full(vocab, 2.5, np.float32), Params(top_k=1, seed=seed)) for seed in range(6)]
    results, _, _, _ = _sample(kernels, batch)
    for i, (case, result) in enumerate(zip(batch, results, strict=True)):
        kept = half if i < 6 else vocab  # equals of the last stay, for top-k
        assert result[0] == int(_uniform(case) * kept)
    assert [r[0] for r in results[:6]] == [_on_cpu(case)[0] for case in batch[:6]]


def test_equals_beyond_the_nucleus_are_left_out(kernels: Any) -> None:
    """Ten tokens weigh 1 and a hundred, on both sides of them, almost as much: a share of 0.45, of 49.5 tokens, is the
    ten and the first 40 of the others."""
    logits = np.ones(110, np.float32)
    logits[50:60] = 3
    batch = _decided(Case(logits, Params(temperature=1000.0, top_p=0.45)), 60)
    results, _, _, _ = _sample(kernels, batch)
    _check_draws(batch, results)
    assert {r[0] for r in results} <= {*range(40), *range(50, 60)}


def test_greedy_is_the_first_of_equal_maxima_and_zeros_are_equal(kernels: Any) -> None:
    logits = np.full(1200, -1.0, np.float32)
    logits[[700, 900]] = 4
    zeros = np.full(1200, -1.0, np.float32)
    zeros[600], zeros[601] = -0.0, 0.0
    batch = [Case(x, Params(temperature=0.0)) for x in (logits, zeros)]
    assert [r[0] for r in _sample(kernels, batch, draws=False)[0]] == [700, 600]


def test_alternatives_are_most_likely_first_and_ties_by_token(kernels: Any) -> None:
    logits = np.round(_logits(8, 1500)).astype(np.float32)
    case = Case(logits, Params(temperature=0.0, logprobs=20))
    results, tops, _, _ = _sample(kernels, [case])
    _check_logprobs(case, results[0], tops[0])
    for (token, logprob), (expected, by_cpu) in zip(tops[0], _on_cpu(case)[2], strict=True):
        assert (token, logprob) == (expected, pytest.approx(by_cpu, abs=1e-5))


def test_alternatives_end_with_the_vocabulary(kernels: Any) -> None:
    logits = np.array([1, -np.inf, 3, -np.inf], np.float32)
    results, tops, _, _ = _sample(kernels, [Case(logits, Params(temperature=0.0, logprobs=20))])
    assert [token for token, _ in tops[0]] == [2, 0, 1, 3]
    assert tops[0][2][1] == tops[0][3][1] == -np.inf
    assert results[0][:2] == (2, pytest.approx(-np.log1p(np.exp(-2)), abs=1e-6))


# ---- extremes


@pytest.mark.parametrize("temperature", [1e-38, 1e-30, 1e-3, 1e3, 1e20, 3e38])
@pytest.mark.parametrize("params", [Params(), Params(top_k=3), Params(top_p=0.5), Params(top_k=9, top_p=0.8)], ids=str)
@pytest.mark.parametrize("spread", [1e-30, 1.0, 1e37])
def test_extreme_temperatures(kernels: Any, temperature: float, params: Params, spread: float) -> None:
    batch = [
        Case(_logits(9, 100, spread), dataclasses.replace(params, temperature=temperature, seed=seed))
        for seed in range(3)
    ]
    for case, result in zip(batch, _sample(kernels, batch)[0], strict=True):
        token, doubt = draw(case, _uniform(case))
        if doubt > DOUBT:
            assert (result[0], result[2]) == (token, "")
            assert result[0] == _on_cpu(case)[0]


def test_output_positions_beyond_32_bits_have_draws_of_their_own(kernels: Any) -> None:
    batch = [Case(_logits(2, 50), Params(seed=2**63 + 5), output_index=index) for index in (3, 2**32 + 3, 2**40)]
    for case, result in zip(batch, _sample(kernels, batch)[0], strict=True):
        assert result[0] == draw(case, _uniform(case))[0]


# ---- what cannot be sampled


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logprob", [-1, 2])
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {3: np.nan},
        {3: -np.nan},
        {600: np.inf},
        {600: np.inf, 0: np.nan},
        {i: -np.inf for i in range(700)},
        {i: -np.inf for i in range(699)},
        {20: np.nan},  # which the mask of min_tokens hides, but not from log-probabilities
        {20: np.inf, 3: np.nan},
        {21: np.inf},  # minus infinity is no number
    ],
    ids=lambda values: str(sorted(values.items(), key=lambda item: item[0])[:2]),
)
def test_errors_are_the_cpus(
    kernels: Any, temperature: float, logprob: int, truncated: bool, values: dict[int, float]
) -> None:
    logits = _logits(1, 700)
    for token, value in values.items():
        logits[token] = value
    params = Params(
        temperature=temperature, logprobs=logprob, top_k=5 if truncated else 0, stop_tokens=[20], min_tokens=1
    )
    params.bias = [(21, -np.inf)]
    good = Case(_logits(2, 700), Params(temperature=0.0))
    results, _, last, _ = _sample(kernels, [Case(logits, params), good])
    try:
        token = _on_cpu(Case(logits, params))[0]
    except RuntimeError as error:
        assert results[0][0] == -1 and np.isnan(results[0][1])
        assert results[0][2] and str(error).startswith(results[0][2])
        assert last[0] == 0  # a batch that is queued already may look at it
    else:
        assert (results[0][0], results[0][2]) == (token, "")
    assert results[1][0] == adjusted(good).argmax()  # another row's trouble is not its own


# ---- what an iteration leaves behind


def test_histories_and_last_tokens_grow_by_what_is_sampled(kernels: Any) -> None:
    vocab = 90
    batch = [
        Case(_logits(1, vocab), Params(presence_penalty=0.5, seed=1), prompt=[4, 4, 8], output=[8, 3, 3]),
        Case(_logits(2, vocab), Params(seed=2)),
        Case(_logits(3, vocab), Params(temperature=0.0, repetition_penalty=1.2), prompt=[1]),
    ]
    results, _, last, counts = _sample(kernels, batch)
    assert last.tolist() == [r[0] for r in results]
    expected = np.zeros((2, 128), np.uint32)
    expected[0, [4, 8]] = 2**31
    expected[0, 8] += 1
    expected[0, 3] += 2
    expected[1, 1] = 2**31
    expected[0, results[0][0]] += 1
    expected[1, results[2][0]] += 1
    np.testing.assert_array_equal(counts, expected)


def test_histories_ignore_tokens_outside_of_the_vocabulary(kernels: Any) -> None:
    tokens = np.array([-1, 5, 4, 2**31 - 1, 4, 7, -3], np.int32)
    counts = kernels.count_tokens(vocab=5, tokens=tokens, prompt=4, outputs=3)
    assert np.flatnonzero(counts).tolist() == [4]
    assert counts[4] == 2**31 + 1


def test_rows_that_fill_a_batch_up_leave_no_trace(kernels: Any) -> None:
    row = kernels.SampleRow()
    results, _, last, _ = kernels.sample(
        logits=np.full((1, 64), np.nan, np.float32),
        vocab=64,
        rows=[row, row],
        biases=[],
        stop_tokens=[],
        last_sampled=np.full(3, NOT_WRITTEN, np.int32),
        counts=np.zeros((0, 64), np.uint32),
    )
    assert [r[0] for r in results] == [NOT_WRITTEN] * 2
    assert last.tolist() == [NOT_WRITTEN] * 3


def test_a_row_has_the_same_bits_in_every_batch(kernels: Any) -> None:
    own = Case(_logits(1, 1100), Params(top_p=0.8, logprobs=7, seed=5, bias=[(3, 1.5)]))
    others = [Case(_logits(s, 1100), Params(temperature=s / 3, top_k=s, logprobs=s, seed=s)) for s in range(5)]
    alone = _sample(kernels, [own])
    among = _sample(kernels, [*others[:3], own, *others[3:]], [4, 0, 5, 2, 1, 3])
    assert among[0][3] == alone[0][0]
    assert among[1][3] == alone[1][0]
