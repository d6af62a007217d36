"""Who holds what of a model."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import gpt_spec, llama_spec

from fastserve.loaders.weights import tensor_shapes
from fastserve.sharding import Shard, cut, stages_by_cost, whole
from fastserve.types import InvalidRequest

SMOL = llama_spec(num_heads=9, num_kv_heads=3, head_dim=64, hidden_size=576, intermediate_size=1536, num_layers=30)


def shards(spec: object, tensor: int, pipeline: int) -> list[Shard]:
    stages = stages_by_cost(spec.num_layers, pipeline, layer=1.0, first=0.0, last=0.0)  # type: ignore[attr-defined]
    return [
        cut(spec, tensor_rank=rank, tensor_size=tensor, stage=stage, stages=stages)  # type: ignore[arg-type]
        for stage in range(pipeline)
        for rank in range(tensor)
    ]


def test_heads_that_do_not_divide() -> None:
    """SmolLM2: 9 query heads in 3 groups of 3. Two ranks: 4 and 5 queries, the middle group on both."""
    first, second = shards(SMOL, 2, 1)
    assert (first.heads, first.kv_heads, first.query_offset) == (range(4), range(2), 0)
    assert (second.heads, second.kv_heads, second.query_offset) == (range(4, 9), range(1, 3), 1)
    assert [(list(s.heads), list(s.kv_heads), s.query_offset) for s in shards(SMOL, 4, 1)] == [
        ([0, 1], [0], 0), ([2, 3], [0, 1], 2), ([4, 5], [1], 1), ([6, 7, 8], [2], 0),
    ]  # fmt: skip
    assert [s.inner for s in shards(SMOL, 4, 1)] == [range(i * 384, (i + 1) * 384) for i in range(4)]


def test_layers_go_where_they_are_done_soonest() -> None:
    """The LM head takes as long as two and a half layers, so the last of three stages gets fewer."""
    assert stages_by_cost(10, 3, layer=1.0, first=0.0, last=2.5) == [range(0, 4), range(4, 8), range(8, 10)]
    assert stages_by_cost(3, 3, layer=1.0, first=9.0, last=9.0) == [range(0, 1), range(1, 2), range(2, 3)]
    with pytest.raises(InvalidRequest, match="pipeline_parallel_size: must be at most 3"):
        stages_by_cost(3, 4, layer=1.0, first=0.0, last=0.0)


@given(
    tied=st.booleans(), gpt=st.booleans(), tensor=st.integers(1, 6), pipeline=st.integers(1, 3),
    groups=st.integers(1, 6), group=st.integers(1, 4),
)  # fmt: skip
def test_every_number_is_held_as_often_as_it_is_used(
    tied: bool, gpt: bool, tensor: int, pipeline: int, groups: int, group: int
) -> None:
    """Matrices once, but for KV heads whose queries are on several ranks; norms by all ranks of a stage, biases that
    are added to sums by one; a tied embedding in the first and in the last stage."""
    make = gpt_spec if gpt else llama_spec
    spec = make(num_layers=3, num_heads=groups * group, num_kv_heads=groups, tied_embeddings=tied)
    if tensor > groups * group:
        with pytest.raises(InvalidRequest, match="tensor_parallel_size: must be at most"):
            shards(spec, tensor, pipeline)
        return
    held = shards(spec, tensor, pipeline)
    for name, shape in tensor_shapes(spec):
        parts = [part for shard in held if (part := shard.part_of(name, shape, spec)) is not None]
        rows = Counter(row for rows, columns in parts for row in rows for _ in range(1 if columns else 0))
        elements = sum(len(rows) * len(columns) for rows, columns in parts)
        size = shape[0] * (shape[1] if len(shape) == 2 else 1)
        assert set(rows) == set(range(shape[0]))
        if "norm" in name or name == "position_embedding.weight":
            assert elements == tensor * size
        elif name == "token_embedding.weight":
            assert elements == size * (2 if tied and pipeline > 1 else 1)
        elif name.split(".")[-2] in ("k", "v"):
            assert elements >= size
        else:
            assert elements == size
    for shard in held:
        local = shard.local(spec)
        for head in range(local.num_heads):  # every query finds its KV head
            kv_head = (head + shard.query_offset) // shard.query_group + shard.kv_heads.start
            assert kv_head in shard.kv_heads and kv_head == (head + shard.heads.start) // group
    assert shards(spec, 1, 1) == [whole(spec)]
