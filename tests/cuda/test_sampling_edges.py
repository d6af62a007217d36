"""Where a group of tokens, a row or what is kept ends, and something of the next must not be taken for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sampling_batches import logits_of, on_cpu, sample
from sampling_reference import Case, Params, logprobs, top_tokens


@pytest.mark.parametrize("seed", range(4))
def test_logprobs_are_of_logits_before_any_bias(kernels: Any, seed: int) -> None:
    """A block adds the biases of four groups of 512 tokens, each of which another warp looks at first."""
    bias = [(int(token), 30.0) for token in np.random.default_rng(seed).permutation(2048)[:160]]
    batch = [Case(logits_of(9 * seed + i, 2048), Params(logprobs=20, bias=bias, seed=i)) for i in range(4)]
    results, tops, _, _ = sample(kernels, batch)
    for case, result, top in zip(batch, results, tops, strict=True):
        expected = logprobs(case)
        assert [token for token, _ in top] == top_tokens(case)
        np.testing.assert_allclose([p for _, p in top], expected[top_tokens(case)], rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(result[1], expected[result[0]], rtol=1e-6, atol=1e-5)


def test_a_bias_is_added_once_on_either_side_of_where_blocks_meet(kernels: Any) -> None:
    """Which have 2048 tokens each."""
    for token in (2047, 2048, 4095, 4096):
        logits = np.zeros(5000, np.float32)
        logits[9] = 1.5
        few, enough = (Case(logits, Params(temperature=0.0, logprobs=2, bias=[(token, bias)])) for bias in (1.0, 2.0))
        results, _, _, _ = sample(kernels, [few, enough])
        assert [result[0] for result in results] == [9, token]
        for case, result in zip([few, enough], results, strict=True):
            np.testing.assert_allclose(result[1], logprobs(case)[result[0]], rtol=1e-6, atol=1e-5)


def test_a_mask_is_heeded_where_logprobs_are_wanted(kernels: Any) -> None:
    """Which are of the logits without it."""
    logits = logits_of(3, 700)
    best, second = np.argsort(-logits)[:2].tolist()
    case = Case(logits, Params(temperature=0.0, logprobs=1, min_tokens=1, stop_tokens=[best]))
    results, tops, _, _ = sample(kernels, [case])
    assert (results[0][0], tops[0][0][0]) == (second, best)
    np.testing.assert_allclose(results[0][1], logprobs(case)[second], rtol=1e-6, atol=1e-5)


def test_logprobs_beside_groups_of_which_nothing_can_be_chosen(kernels: Any) -> None:
    logits = logits_of(4, 1536)
    logits[512:1024] = -np.inf
    case = Case(logits, Params(logprobs=5))
    results, tops, _, _ = sample(kernels, [case])
    np.testing.assert_allclose(results[0][1], logprobs(case)[results[0][0]], rtol=1e-6, atol=1e-5)
    assert [token for token, _ in tops[0][:5]] == top_tokens(case)


def test_what_is_beyond_the_vocabulary_is_masked_in_no_other_row(kernels: Any) -> None:
    """Without padding, that is where the next row begins."""
    masked = Case(logits_of(1, 64), Params(temperature=0.0, min_tokens=1, stop_tokens=[64]))
    first = np.zeros(64, np.float32)
    first[0] = 1
    results, _, _, _ = sample(kernels, [masked, Case(first, Params(temperature=0.0))])
    assert results[1][0] == 0


def test_min_p_keeps_nothing_below_its_share(kernels: Any) -> None:
    """Not even the float32 below the logarithm of it, which is no float32 itself."""
    share = next(
        p for p in np.linspace(0.2, 0.5, 40, dtype=np.float32) if np.float32(np.log(float(p))) < np.log(float(p))
    )
    logits = np.array([0, np.log(float(share))], np.float32)
    batch = [Case(logits, Params(min_p=float(share), seed=seed)) for seed in range(40)]
    assert [on_cpu(case)[0] for case in batch] == [0] * 40
    assert [result[0] for result in sample(kernels, batch)[0]] == [0] * 40


def test_a_nucleus_ends_where_its_share_is_reached_exactly(kernels: Any) -> None:
    """At such a temperature all weigh the same, to the last bit."""
    logits = np.array([2, 3, 4, 1], np.float32)
    batch = [Case(logits, Params(temperature=1e20, top_p=0.5, seed=seed)) for seed in range(40)]
    drawn = [result[0] for result in sample(kernels, batch)[0]]
    assert drawn == [on_cpu(case)[0] for case in batch]
    assert set(drawn) == {1, 2}


@pytest.mark.parametrize("prompt", [0, 2, 256, 300])  # a block takes 256
@pytest.mark.parametrize("outputs", [0, 3, 256, 257])
def test_histories_end_where_those_of_the_next_begin(kernels: Any, prompt: int, outputs: int) -> None:
    """The outputs come right after their prompt, and another job's prompt after them."""
    tokens = np.repeat([5, 6, 7], [prompt, outputs, 300]).astype(np.int32)
    counts = kernels.count_tokens(vocab=8, tokens=tokens, prompt=prompt, outputs=outputs)
    expected = np.zeros(64, np.uint32)
    expected[5] = 2**31 if prompt > 0 else 0
    expected[6] = outputs
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_cannot_be_sampled_is_counted_for_nobody(kernels: Any, value: float, temperature: float) -> None:
    """No token is -1, and what is counted there is another job's last token."""
    vocab = 64  # without padding
    good = Case(logits_of(1, vocab), Params(temperature=0.0, presence_penalty=0.5), prompt=[4], output=[8, 63])
    bad = Case(np.full(vocab, value, np.float32), Params(temperature=temperature, frequency_penalty=0.5), output=[2])
    results, _, _, counts = sample(kernels, [good, bad])
    assert [result[0] for result in results] == [on_cpu(good)[0], -1]
    expected = np.zeros((2, vocab), np.uint32)
    expected[0, 4] = 2**31
    expected[0, [8, 63]] = 1
    expected[0, results[0][0]] += 1
    expected[1, 2] = 1
    np.testing.assert_array_equal(counts, expected)
