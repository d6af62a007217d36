"""Sampling against independent implementations: transformers' processors, torch, SciPy-free statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from fastserve import _C

VOCAB = 211


def _logits(seed: int, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(VOCAB) * spread).astype(np.float32)


def _params(**values: object) -> _C.SamplingParams:
    params = _C.SamplingParams()
    for name, value in values.items():
        setattr(params, name, value)
    return params


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers published with Random123
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert list(_C.philox(counter, key)) == expected


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.05, 3.0),
    top_k=st.one_of(st.just(0), st.integers(1, VOCAB)),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
    penalty=st.one_of(st.just(1.0), st.floats(0.5, 2.0)),
    history=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),
)
def test_distribution_equals_the_processors_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, history: list[int]
) -> None:
    logits = _logits(seed)
    chain = [hf.RepetitionPenaltyLogitsProcessor(penalty), hf.TemperatureLogitsWarper(temperature)]
    if min_p:
        chain.append(hf.MinPLogitsWarper(min_p))
    if top_k:
        chain.append(hf.TopKLogitsWarper(top_k))
    scores = torch.from_numpy(logits.copy())[None]
    for processor in chain:
        scores = processor(torch.tensor([history]), scores)
    if top_p < 1:
        mass = torch.softmax(scores[0].double(), -1).sort(descending=True).values.cumsum(0)
        assume((mass - top_p).abs().min() > 1e-5)  # else rounding decides which side of the cut a token falls on
        scores = hf.TopPLogitsWarper(top_p)(torch.tensor([history]), scores)
    expected = torch.softmax(scores[0].double(), -1).numpy()
    params = _params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    actual = _C.distribution(logits, params, history[: len(history) // 2], history[len(history) // 2 :])
    np.testing.assert_allclose(actual, expected, rtol=5e-5, atol=1e-7)


def test_presence_and_frequency_count_outputs_only() -> None:
    """OpenAI's formula: logit - presence · (count > 0) - frequency · count, over generated tokens."""
    logits, prompt, output = _logits(1), [5, 6, 6], [6, 7, 7, 7]
    counts = np.bincount(output, minlength=VOCAB)
    expected = torch.softmax(torch.from_numpy(logits - 0.5 * (counts > 0) - 0.25 * counts).double(), -1).numpy()
    params = _params(presence_penalty=0.5, frequency_penalty=0.25)
    np.testing.assert_allclose(_C.distribution(logits, params, prompt, output), expected, rtol=1e-5, atol=1e-9)


def test_logit_bias_and_min_tokens() -> None:
    logits = _logits(2)
    best, second = np.argsort(-logits)[:2].tolist()
    greedy = _params(temperature=0.0)
    assert _C.sample(logits, greedy)[0] == best
    greedy.bias = [(second, 100.0)]
    assert _C.sample(logits, greedy)[0] == second
    masked = _params(temperature=0.0, min_tokens=2, stop_tokens=[best])
    assert _C.sample(logits, masked, [1], [3])[0] == second, "the second token may not stop yet"
    assert _C.sample(logits, masked, [1], [3, 3])[0] == best


def test_greedy_takes_the_first_of_equals() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[[17, 90]] = 4.0
    assert _C.sample(logits, _params(temperature=0.0))[0] == 17


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = _logits(3)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    params = _params(temperature=0.3, logprobs=5, bias=[(8, 50.0)], top_k=1)
    token, logprob, top = _C.sample(logits, params)
    assert token == 8
    assert logprob == pytest.approx(expected[8], abs=1e-5)
    order = np.argsort(-expected)[:5]
    assert [index for index, _ in top] == order.tolist()
    np.testing.assert_allclose([value for _, value in top], expected[order], atol=1e-5)
    assert np.isnan(_C.sample(logits, _params())[1])


def test_draws_follow_the_distribution() -> None:
    """Pearson's statistic of 20,000 draws; its expectation is the degrees of freedom, deviation √(2·dof)."""
    logits = _logits(4, spread=1.0)[:12]
    params = _params(temperature=0.8)
    expected = _C.distribution(logits, params) * 20_000
    counts = np.zeros(12)
    for seed in range(20_000):
        params.seed = seed * 0x9E3779B97F4A7C15 % 2**64
        counts[_C.sample(logits, params)[0]] += 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 11 + 5 * np.sqrt(2 * 11)


def test_draw_depends_on_seed_and_output_index_only() -> None:
    draws = {(seed, index): _C.uniform(seed, index) for seed in range(40) for index in range(40)}
    assert len(set(draws.values())) == len(draws)
    assert all(0 <= value < 1 for value in draws.values())
    assert _C.uniform(7, 3) == draws[7, 3]


def test_nothing_left_to_choose_is_an_error() -> None:
    logits = np.full(4, -np.inf, np.float32)
    with pytest.raises(_C.Error, match="every token is masked"):
        _C.sample(logits, _params())
    with pytest.raises(_C.Error, match="not a number"):
        _C.sample(np.array([0.0, np.nan], np.float32), _params(temperature=0.0))
