"""The runtime's boundary: what a plan and a weight must be, and what a bad one leaves behind."""

from __future__ import annotations

import itertools
from typing import Any

import gguf
import numpy as np
import pytest
from synthetic import VOCAB, PoisonedModel, SyntheticModel, llama_spec, plan

from fastserve import _C
from fastserve.config import RuntimeConfig
from fastserve.loaders.spec import ModelError
from fastserve.native import NativeRuntime, block_bytes
from fastserve.types import InvalidRequest, StepResult

SPEC = llama_spec(num_layers=1)


def _runtime(**options: Any) -> NativeRuntime:
    return NativeRuntime(
        SyntheticModel(SPEC), RuntimeConfig(dtype="float32", num_blocks=4, max_num_batched_tokens=40, **options)
    )


OPEN = dict(opened=[(0, 5)], table=[(0, 0, 2)])


@pytest.mark.parametrize(
    ("rows", "tokens", "options", "message"),
    [
        ([(0, 0, 2, 1)], [1, VOCAB], OPEN, "token 151 outside the vocabulary"),
        ([(0, 0, 2, 1)], [1, -1], OPEN, "token -1 outside"),
        ([(0, 0, 1, 1)], [-1], OPEN, "token -1 outside"),  # nothing was sampled yet
        ([(0, 0, 2, 1)], [1], OPEN, "lacks tokens"),
        ([(0, 0, 1, 1)], [1, 2], OPEN, "2 tokens for rows of 1"),
        ([(0, 1, 1, 1)], [1], OPEN, "starts at 1 with only 0"),
        ([(0, 0, 17, 1)], [1] * 17, OPEN, "lacks blocks for position 16"),
        ([(0, 0, 1, 2)], [1], OPEN, "1 tokens and 2 logits"),
        ([(0, 0, 1, 1), (0, 1, 1, 1)], [1, 1], OPEN, "runs slot 0 twice"),
        ([(1, 0, 1, 1)], [1], OPEN, "runs slot 1, which is not open"),
        ([], [], dict(opened=[(0, 5)], table=[(0, 0, 4)]), "block 4 of slot 0 is outside the pool of 4"),
        ([], [], dict(opened=[(0, 5)], table=[(0, 1, 0)]), "hole before index 1"),
        ([], [], dict(table=[(3, 0, 0)]), "slot 3, which is not open"),
        ([], [], dict(closed=[3]), "closes slot 3, which is not open"),
        ([], [], dict(opened=[(0, 5), (0, 5)]), "opens slot 0, which is open"),
        (
            [(0, 0, 41, 1)],
            [1] * 41,
            dict(opened=[(0, 41)], table=[(0, 0, 0), (0, 1, 1), (0, 2, 2)]),
            "41 tokens; the limit is 40",
        ),
    ],
)
def test_a_bad_plan_is_refused_and_changes_nothing(
    rows: list[tuple[int, int, int, int]], tokens: list[int], options: dict[str, Any], message: str
) -> None:
    runtime = _runtime()
    good = plan(1, [(7, 0, 3, 1)], [5, 6, 7], opened=[(7, 3)], table=[(7, 0, 1)])
    runtime.submit(good)
    first = runtime.poll()
    runtime.submit(plan(2, rows, tokens, **options))
    with pytest.raises(_C.Error, match=message):
        runtime.poll()
    runtime.submit(plan(3, [(7, 2, 1, 1)], [7]))
    again = runtime.poll()
    assert first is not None and again is not None
    assert again.tokens.tolist() == first.tokens.tolist()


def test_a_slot_may_begin_behind_what_another_has_computed() -> None:
    """It samples what it would have sampled had it computed all by itself."""
    tokens = [(7 * i + 3) % VOCAB for i in range(20)]
    runtime = _runtime()
    runtime.submit(plan(1, [(0, 0, 20, 1)], tokens, opened=[(0, 20)], table=[(0, 0, 2), (0, 1, 1)]))
    runtime.submit(plan(2, [(1, 16, 4, 1)], tokens[16:], opened=[(1, 20)], table=[(1, 0, 2), (1, 1, 3)]))
    first, second = runtime.poll(), runtime.poll()
    assert first is not None and second is not None
    assert first.tokens.tolist() == second.tokens.tolist()


def test_wrong_array_types_are_refused_at_submit() -> None:
    bad = plan(1, [], [])
    bad.rows = np.zeros((0, 4), np.int64)  # type: ignore[assignment]
    with pytest.raises(_C.Error, match=r"plan\.rows"):
        _runtime().submit(bad)


def test_poll_times_out_with_nothing() -> None:
    assert _runtime().poll(0.0) is None


def test_results_come_in_submission_order() -> None:
    runtime = _runtime()
    runtime.submit(plan(1, [(0, 0, 2, 1)], [1, 2], **OPEN))  # type: ignore[arg-type]
    for plan_id in range(2, 6):
        runtime.submit(plan(plan_id, [(0, plan_id, 1, 1)], [-1]))
    results = [runtime.poll() for _ in range(5)]
    assert [result.plan_id for result in results if result] == [1, 2, 3, 4, 5]


def test_a_row_that_cannot_be_sampled_fails_alone() -> None:
    def tokens_of(second: int) -> StepResult:
        runtime = NativeRuntime(PoisonedModel(SPEC, np.inf), RuntimeConfig(dtype="float32", num_blocks=4))
        rows = [(0, 0, 2, 1), (1, 0, 2, 1)]
        opened = dict(opened=[(0, 2), (1, 2)], table=[(0, 0, 0), (1, 0, 1)])
        runtime.submit(plan(1, rows, [5, 6, 7, second], **opened))  # type: ignore[arg-type]
        runtime.submit(plan(2, [(0, 2, 1, 1), (1, 2, 1, 1)], [-1, -1]))  # queued before the failure is known
        first, after = runtime.poll(), runtime.poll()
        assert first is not None and after is not None
        assert after.tokens[0] >= 0
        return first

    good, bad = tokens_of(8), tokens_of(0)
    assert bad.tokens.tolist() == [good.tokens[0], -1]
    assert good.errors == {}
    assert list(bad.errors) == [1] and "not a number" in bad.errors[1]


def test_a_tensor_may_come_in_slices_of_rows() -> None:
    whole, sliced = _runtime(), _C.Runtime(SPEC, "float32", "float32", 16, 4, 40, 2)
    for tensor in SyntheticModel(SPEC).tensors():
        rows, size = tensor.shape[0], tensor.data.nbytes
        cuts = [0, rows // 3, rows // 3 + 1, rows] if len(tensor.shape) == 2 else [0, rows]
        for first, last in itertools.pairwise(cuts):
            data = tensor.data[first * size // rows : last * size // rows]
            sliced.load_tensor(tensor.name, tensor.dtype, tensor.shape, data, first)
    sliced.finish_loading()
    step = plan(1, [(0, 0, 5, 5)], [1, 2, 3, 4, 5], **OPEN)  # type: ignore[arg-type]
    sliced.submit(step, logits=True)
    assert np.array_equal(sliced.poll(-1)[5], whole.logits(step)[1])


def test_a_gap_between_slices_is_refused() -> None:
    runtime = _C.Runtime(SPEC, "float32", "float32", 16, 4, 40, 2)
    with pytest.raises(_C.Error, match=r"'lm_head\.weight' goes on at row 3, not 0"):
        runtime.load_tensor("lm_head.weight", "f32", (VOCAB, 44), np.zeros(44 * 4, np.uint8), 3)


class Altered(SyntheticModel):
    """One tensor replaced, or dropped when the replacement is None."""

    def __init__(self, name: str, change: Any) -> None:
        super().__init__(SPEC)
        self._name, self._change = name, change

    def tensors(self):  # type: ignore[no-untyped-def]
        for tensor in super().tensors():
            if tensor.name == self._name:
                if self._change is None:
                    continue
                tensor = tensor._replace(**self._change)
            yield tensor


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("layers.0.k.weight", None, "lacks 1 tensors: layers.0.k.weight"),
        ("lm_head.weight", dict(name="head"), "tensor 'head' does not belong"),
        ("layers.0.q.weight", dict(name="layers.0.o.weight"), r"shape \[60, 44\]; .* asks for \[44, 60\]"),
        ("layers.0.up.weight", dict(data=np.zeros(8, np.uint8)), "'layers.0.up.weight' has 8 bytes"),
        ("layers.0.up.weight", dict(dtype="q6_k"), "tensor type 'q6_k'"),
        ("layers.0.up.weight", dict(dtype="q8_0"), "multiple of 32"),
    ],
)
def test_a_bad_tensor_is_named(name: str, change: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        NativeRuntime(Altered(name, change), RuntimeConfig(dtype="float32", num_blocks=2))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_dequantize_equals_the_gguf_library(kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    values[0, :3] = 0.0, 6e-8, -1e-6  # float16 zero and subnormals
    quantization = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(values, quantization)
    stored = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    expected = gguf.quants.dequantize(data, quantization).astype(np.float32).reshape(-1)
    np.testing.assert_allclose(_C.dequantize(kind.lower(), stored, values.size), expected, rtol=1e-6, atol=1e-7)


def test_block_bytes_of_smollm2() -> None:
    """30 layers × 3 heads × 64 wide × 16 slots × 2 (K and V) × 2 bytes; the paper's 4·l·h a token, with GQA."""
    spec = llama_spec(num_layers=30, num_kv_heads=3, num_heads=9, head_dim=64, hidden_size=576)
    assert block_bytes(spec, "bfloat16", 16) == 30 * 3 * 64 * 16 * 2 * 2
    assert block_bytes(spec, "float32", 16) == 2 * block_bytes(spec, "bfloat16", 16)
    assert block_bytes(spec, "int8", 16) == block_bytes(spec, "bfloat16", 16) // 2 + 30 * 3 * 16 * 2 * 4  # scales
    with pytest.raises(_C.Error, match="a KV cache type must be float32, bfloat16, float16 or int8, got 'auto'"):
        block_bytes(spec, "auto", 16)


def test_unknown_instruction_set_lists_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_ISA", "mmx")
    with pytest.raises(InvalidRequest, match=r"FASTSERVE_ISA is 'mmx'; this machine runs: .*portable"):
        _runtime()
