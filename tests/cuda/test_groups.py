"""What the other tests take for GGUF's groups is what the `gguf` library takes for them."""

from __future__ import annotations

import groups
import numpy as np
import pytest

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", groups.BYTES)
def test_groups_are_ggufs(kind: str) -> None:
    theirs = gguf.GGMLQuantizationType[kind.upper()]
    assert gguf.GGML_QUANT_SIZES[theirs] == (groups.GROUP, groups.BYTES[kind])
    values = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    values[3] = 0
    blocks = gguf.quants.quantize(values, theirs)
    assert np.array_equal(groups.decode(blocks, kind), gguf.quants.dequantize(blocks, theirs))
    ours = groups.encode(values, kind)
    assert ours.shape == blocks.shape
    step = np.ptp(values.reshape(-1, groups.GROUP), axis=1).max() / (127 if kind == "q8_0" else 7)
    assert np.abs(gguf.quants.dequantize(ours, theirs) - values).max() <= step


@pytest.mark.parametrize("kind", groups.BYTES)
def test_any_bytes_are_read_as_gguf_reads_them(kind: str) -> None:
    data = np.random.default_rng(1).integers(0, 256, (64, 4 * groups.BYTES[kind]), dtype=np.uint8)
    halves = data.reshape(-1, groups.BYTES[kind])[:, :4].view(np.uint16)
    halves &= 0xBBFF  # scales and minima that are numbers
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(groups.decode(data, kind), theirs)
