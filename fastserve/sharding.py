"""Which part of a model each rank of a grid holds: a range of layers, and of those a share of heads, of the MLP's inner
outputs and of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from .loaders.spec import ModelSpec
from .loaders.weights import tensor_shapes
from .types import InvalidRequest

# Inner outputs go to ranks in groups of so many: quantized inputs lie in groups of 32, and vectors are as long as 64.
_INNER_GROUPS: Final = (64, 32, 1)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one rank holds of a model. Ranges are of the whole model's indices.

    Query heads are shared out as evenly as they divide, and a rank holds the KV heads that its query heads read: where
    a KV head's queries are on two ranks, so is the KV head. Norms are on all ranks of a stage; biases that are added to
    a sum over ranks are the first one's.
    """

    tensor_rank: int
    stage: int
    layers: range
    heads: range
    kv_heads: range
    inner: range
    vocab: range  # rows of the embedding and of the LM head
    first_stage: bool  # holds the embedding
    last_stage: bool  # holds the final norm and the LM head
    query_group: int  # query heads that read one KV head

    @property
    def query_offset(self) -> int:
        """Query heads of this rank's first KV head that are with the rank before."""
        return self.heads.start - self.kv_heads.start * self.query_group

    @property
    def adds_biases(self) -> bool:
        """Whether this is the rank that adds biases to sums over all ranks of its stage."""
        return self.tensor_rank == 0

    def local(self, spec: ModelSpec) -> ModelSpec:
        """The shape of what this rank holds. The vocabulary is the whole one, which its jobs' tokens are of."""
        return replace(
            spec,
            num_layers=len(self.layers),
            num_heads=len(self.heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.inner),
        )

    def local_name(self, name: str) -> str:
        """What a tensor is called here: layers are counted from this stage's first."""
        if not name.startswith("layers."):
            return name
        _, layer, rest = name.split(".", 2)
        return f"layers.{int(layer) - self.layers.start}.{rest}"

    def local_formats(self, formats: Mapping[str, str], spec: ModelSpec) -> dict[str, str]:
        """Of the matrices that this rank holds of, by local name."""
        return {
            self.local_name(name): formats[name]
            for name, shape in tensor_shapes(spec)
            if name in formats and self.part_of(name, shape, spec) is not None
        }

    def part_of(self, name: str, shape: Sequence[int], spec: ModelSpec) -> tuple[range, range] | None:
        """Rows and columns of a canonical tensor that this rank holds; None: nothing of it. A vector has one column."""
        rows, columns = range(shape[0]), range(shape[1] if len(shape) == 2 else 1)
        if not name.startswith("layers."):
            held = {
                "token_embedding": self.first_stage or (self.last_stage and spec.tied_embeddings),
                "position_embedding": self.first_stage,
                "final_norm": self.last_stage,
                "lm_head": self.last_stage,
            }[name.split(".", 1)[0]]
            if not held:
                return None
            return (self.vocab if name in ("token_embedding.weight", "lm_head.weight") else rows), columns
        _, layer, part, kind = name.split(".")
        if int(layer) not in self.layers:
            return None
        if part == "q":
            return scaled(self.heads, spec.head_dim), columns
        if part in ("k", "v"):
            return scaled(self.kv_heads, spec.head_dim), columns
        if part in ("gate", "up"):
            return self.inner, columns
        if part in ("o", "down"):
            if kind == "bias":
                return (rows, columns) if self.adds_biases else None
            return rows, scaled(self.heads, spec.head_dim) if part == "o" else self.inner
        return rows, columns


def whole(spec: ModelSpec) -> Shard:
    """All of it."""
    return cut(spec, tensor_rank=0, tensor_size=1, stage=0, stages=[range(spec.num_layers)])


def cut(spec: ModelSpec, *, tensor_rank: int, tensor_size: int, stage: int, stages: Sequence[range]) -> Shard:
    """The shard of a rank of the tensor-parallel group of a stage; `stages` are the layers of each.

    Raises InvalidRequest where there is not one head, one inner output or one token for each rank.
    """
    for what, count in (
        ("heads", spec.num_heads),
        ("tokens in its vocabulary", spec.vocab_size),
        ("inner outputs", spec.intermediate_size),
    ):
        if tensor_size > count:
            raise InvalidRequest(
                "tensor_parallel_size", f"must be at most {count}, for the model has as many {what}; got {tensor_size}"
            )
    group = spec.num_heads // spec.num_kv_heads
    heads = _share(spec.num_heads, tensor_rank, tensor_size)
    unit = next(unit for unit in _INNER_GROUPS if spec.intermediate_size >= unit * tensor_size)
    return Shard(
        tensor_rank=tensor_rank,
        stage=stage,
        layers=stages[stage],
        heads=heads,
        kv_heads=range(heads.start // group, (heads.stop - 1) // group + 1),
        inner=_share(spec.intermediate_size, tensor_rank, tensor_size, unit),
        vocab=_share(spec.vocab_size, tensor_rank, tensor_size),
        first_stage=stage == 0,
        last_stage=stage == len(stages) - 1,
        query_group=group,
    )


def stages_by_cost(num_layers: int, num_stages: int, *, layer: float, first: float, last: float) -> list[range]:
    """Layers of each stage, such that the slowest takes as little time as possible.

    Seconds: `layer` of each layer, `first` of what the first stage does besides (the embedding), `last` of what the
    last one does (the LM head and sampling). Every stage has a layer. Raises InvalidRequest for more stages than
    layers.
    """
    if num_stages > num_layers:
        raise InvalidRequest(
            "pipeline_parallel_size",
            f"must be at most {num_layers}, for the model has as many layers; got {num_stages}",
        )
    extra = [0.0] * num_stages
    extra[0] += first
    extra[-1] += last
    counts = [1] * num_stages
    for _ in range(num_layers - num_stages):  # each next layer to the stage that is soonest done with it
        stage = min(range(num_stages), key=lambda index: (extra[index] + (counts[index] + 1) * layer, -index))
        counts[stage] += 1
    ends = [sum(counts[: index + 1]) for index in range(num_stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def scaled(indices: range, width: int) -> range:
    """The rows of heads, each of `width` rows."""
    return range(indices.start * width, indices.stop * width)


def _share(count: int, rank: int, size: int, unit: int = 1) -> range:
    """The share of a rank in `count` things, in groups of `unit`; the last group may be smaller."""
    groups = -(-count // unit)
    return range(rank * groups // size * unit, min(count, (rank + 1) * groups // size * unit))
