"""A row's result depends on its own tokens and positions and on nothing else (DESIGN, "Preemption is invisible")."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import CUDA, MACHINES, examples, supports, use
from synthetic import VOCAB, Driver, PoisonedModel, SyntheticModel, gpt_spec, llama_spec, neox_spec, plan, whole

from fastserve.native import instruction_sets

SPECS = {
    "llama": llama_spec(),
    "qwen3": llama_spec(qk_norm=True, num_kv_heads=3),
    "mqa": llama_spec(num_heads=7, num_kv_heads=1, head_dim=16, rope_inv_freq=(1.0, 0.3, 0.1)),
    # Heads of the widths that tiles take, of two and of three of them, and more at one position than tiles have rows.
    "tiled": llama_spec(head_dim=64, rope_inv_freq=tuple(0.7**i for i in range(32))),
    "tiled-odd": llama_spec(num_layers=1, num_heads=3, num_kv_heads=3, head_dim=96, rope_inv_freq=(1.0, 0.1)),
    "tiled-mqa": llama_spec(num_layers=1, num_heads=40, num_kv_heads=1, head_dim=32, rope_inv_freq=(1.0, 0.3)),
    "gpt2": gpt_spec(),
    "neox": neox_spec(),
}


def _tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", SPECS)
def test_logits_equal_a_plain_decoder(name: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = use(machine, monkeypatch)
    source, tokens = SyntheticModel(SPECS[name]), _tokens(600, seed=1)  # three segments of attention
    np.testing.assert_allclose(
        whole(source, tokens, device=device), reference.logits(source, tokens), rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("machine", instruction_sets())
@pytest.mark.parametrize(("dtype", "kv_cache_dtype"), [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8")])
@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_no_bit_depends_on_batch_chunks_blocks_or_threads(
    name: str, dtype: str, kv_cache_dtype: str, machine: str, data: st.DataObject
) -> None:
    _check_no_bit_depends(name, dtype, kv_cache_dtype, machine, data)


@pytest.mark.parametrize("machine", [CUDA])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=examples(3), deadline=None)
@given(data=st.data())
def test_no_bit_depends_on_batch_chunks_or_blocks_on_cuda(
    name: str, dtype: str, machine: str, data: st.DataObject
) -> None:
    _check_no_bit_depends(name, dtype, "auto", machine, data)


def _check_no_bit_depends(name: str, dtype: str, kv_cache_dtype: str, machine: str, data: st.DataObject) -> None:
    source = SyntheticModel(SPECS[name])
    most, longest = (4, 300) if machine == "cuda" else (9, 560)  # which is emulated, for most of us
    lengths = data.draw(st.lists(st.integers(1, longest), min_size=1, max_size=most))
    sequences = [_tokens(length, seed=index) for index, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        device = use(machine, patch)
        driver = Driver(
            source,
            sequences,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            device=device,
            block_size=data.draw(st.sampled_from([1, 3, 16, 48])),
            threads=data.draw(st.integers(1, 3)),
            seed=data.draw(st.integers(0, 99)),
        )
        left = {slot: len(tokens) for slot, tokens in enumerate(sequences)}
        while left:
            running = data.draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
            sizes = st.one_of(st.integers(1, 20), st.integers(1, 600))
            chunks = {slot: min(left[slot], data.draw(sizes)) for slot in running}
            driver.step(chunks)
            left = {slot: left[slot] - chunks.get(slot, 0) for slot in left if left[slot] > chunks.get(slot, 0)}
        for slot, tokens in enumerate(sequences):
            alone = whole(source, tokens, dtype=dtype, kv_cache_dtype=kv_cache_dtype, device=device)
            assert np.array_equal(driver.all_logits(slot), alone)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", SPECS)
def test_bfloat16_is_close_to_a_plain_decoder(name: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding to 8 bits in every product, each about 2^-9 of a value; where attention wavers, much comes of it."""
    device = use(machine, monkeypatch)
    source, tokens = SyntheticModel(SPECS[name]), _tokens(600, seed=1)
    expected = reference.logits(source, tokens)
    errors = whole(source, tokens, dtype="bfloat16", device=device) - expected
    error = np.sqrt(np.mean(errors**2, axis=1)) / expected.std()
    assert np.median(error) < 16 * 2**-9
    assert error.max() < 0.4


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("dtype", "kv_cache_dtype"), [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8")])
@pytest.mark.parametrize("name", ["llama", "tiled"])
def test_garbage_in_a_recycled_block_reaches_nobody(
    name: str, dtype: str, kv_cache_dtype: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job's NaN must not leak into the next holder of its blocks through a slot that is not yet written."""
    if not supports(machine, kv_cache_dtype):
        pytest.skip("not on this machine")
    device = use(machine, monkeypatch)
    spec = replace(SPECS[name], num_layers=1)
    clean = SyntheticModel(spec)

    options = dict(dtype=dtype, kv_cache_dtype=kv_cache_dtype, device=device)
    driver = Driver(PoisonedModel(spec, np.nan), [[0] * 20], **options)
    runtime = driver.runtime
    runtime.submit(plan(1, [(0, 0, 20, 0)], [0] * 20, opened=[(0, 20)], table=[(0, 0, 0), (0, 1, 1)]))
    runtime.poll()
    tokens = _tokens(18, seed=3)
    tokens = [max(1, token) for token in tokens]
    _, logits = runtime.logits(
        plan(2, [(1, 0, 18, 18)], tokens, opened=[(1, 18)], table=[(1, 0, 1), (1, 1, 0)], closed=[0])
    )
    assert np.array_equal(logits, whole(clean, tokens, **options))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "tiled", "tiled-mqa"])
def test_a_later_token_of_the_same_chunk_changes_nothing(
    name: str, dtype: str, poison: float, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one that is not a number; those behind it are none either."""
    device = use(machine, monkeypatch)
    source, tokens = PoisonedModel(SPECS[name], poison), [max(1, token) for token in _tokens(300, seed=4)]
    sound = whole(source, tokens, dtype=dtype, device=device)
    assert np.isfinite(sound).all()
    for place in (3, 21, 270):
        spoilt = whole(source, [*tokens[:place], 0, *tokens[place + 1 :]], dtype=dtype, device=device)
        assert np.array_equal(spoilt[:place], sound[:place])
        assert np.isnan(spoilt[place:]).all()
