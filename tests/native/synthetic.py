"""A random model held in memory, and a driver that feeds the native runtime hand-made plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from fastserve.config import RuntimeConfig
from fastserve.loaders.spec import ModelSpec, TokenizerData, WeightTensor
from fastserve.native import NativeRuntime
from fastserve.types import BatchPlan, StepResult

VOCAB = 151


def llama_spec(**changes: Any) -> ModelSpec:
    """Grouped heads of an odd width and an odd inner size, with room for several attention segments."""
    options: dict[str, Any] = dict(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=44,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=10,
        intermediate_size=53,
        max_position=1200,
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        rope_inv_freq=tuple(10000.0 ** (-i / 5) for i in range(5)),
    )
    return ModelSpec(**{**options, **changes})


def gpt_spec(**changes: Any) -> ModelSpec:
    """Learned positions, layer norm and biases everywhere."""
    options: dict[str, Any] = dict(
        family="gpt2",
        num_kv_heads=6,
        norm="layer",
        activation="gelu_tanh",
        gated_mlp=False,
        rope_inv_freq=(),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=True,
    )
    return llama_spec(**{**options, **changes})


def neox_spec(**changes: Any) -> ModelSpec:
    """Parallel residual, partial rotation and the exact GELU."""
    return gpt_spec(
        **{**dict(family="gpt_neox", activation="gelu", parallel_residual=True, tied_embeddings=False), **changes},
        rope_inv_freq=(1.0, 0.1),
    )


class SyntheticModel:
    """A ModelSource of seeded random weights, spread so that attention is peaked and logits differ."""

    name = "synthetic"
    weights_dtype = "f32"
    num_parameters = 0

    def __init__(self, spec: ModelSpec, seed: int = 0) -> None:
        self.spec = spec
        self._seed = seed

    @property
    def dtypes(self) -> dict[str, str]:
        return dict.fromkeys(self.shapes(), "f32")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        s = self.spec
        q, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (s.vocab_size, s.hidden_size)}
        if not s.rope_inv_freq:
            shapes["position_embedding.weight"] = (s.max_position + s.position_offset, s.hidden_size)
        if not s.tied_embeddings:
            shapes["lm_head.weight"] = (s.vocab_size, s.hidden_size)
        norms = ["final_norm"]
        for layer in range(s.num_layers):
            p = f"layers.{layer}."
            norms += [p + "attn_norm", p + "mlp_norm"]
            linears = {"q": (q, s.hidden_size), "k": (kv, s.hidden_size), "v": (kv, s.hidden_size)}
            biased = ["q", "k", "v"] if s.qkv_bias else []
            linears["o"] = (s.hidden_size, q)
            biased += ["o"] if s.out_bias else []
            if s.gated_mlp:
                linears["gate"] = (s.intermediate_size, s.hidden_size)
            linears["up"] = (s.intermediate_size, s.hidden_size)
            linears["down"] = (s.hidden_size, s.intermediate_size)
            biased += [n for n in ("gate", "up", "down") if n in linears] if s.mlp_bias else []
            shapes |= {f"{p}{n}.weight": shape for n, shape in linears.items()}
            shapes |= {f"{p}{n}.bias": (linears[n][0],) for n in biased}
            if s.qk_norm:
                shapes |= {f"{p}{n}_norm.weight": (s.head_dim,) for n in ("q", "k")}
        for norm in norms:
            shapes[norm + ".weight"] = (s.hidden_size,)
            if s.norm == "layer":
                shapes[norm + ".bias"] = (s.hidden_size,)
        return shapes

    def tensors(self) -> Iterator[WeightTensor]:
        rng = np.random.default_rng(self._seed)
        for name, shape in self.shapes().items():
            scale = 0.2 if len(shape) == 1 else 1.6 / np.sqrt(shape[1])
            values = rng.standard_normal(shape) * scale + (1.0 if "norm.weight" in name else 0.0)
            data = np.ascontiguousarray(values, np.float32)
            yield WeightTensor(name, "f32", shape, data.view(np.uint8).reshape(-1))

    def samples(self) -> Iterator[bytes]:
        yield str(self._seed).encode()

    def tokenizer_data(self) -> TokenizerData | None:
        return None


class QuantizedModel(SyntheticModel):
    """Matrices stored as GGUF's `kind` (Q8_0, Q4_0, Q4_1), where their rows are whole blocks."""

    def __init__(self, spec: ModelSpec, kind: str, seed: int = 0) -> None:
        gguf = pytest.importorskip("gguf")  # which a machine that is lent for its GPU may lack

        super().__init__(spec, seed)
        self._quantize = gguf.quants.quantize
        self._kind = gguf.GGMLQuantizationType[kind.upper()]

    def _quantized(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and shape[1] % 32 == 0

    @property
    def dtypes(self) -> dict[str, str]:
        kind = self._kind.name.lower()
        return {name: kind if self._quantized(shape) else "f32" for name, shape in self.shapes().items()}

    def tensors(self) -> Iterator[WeightTensor]:
        for tensor in super().tensors():
            if self._quantized(tensor.shape):
                values = tensor.data.view(np.float32).reshape(tensor.shape)
                data = self._quantize(values, self._kind)
                tensor = tensor._replace(dtype=self._kind.name.lower(), data=data.reshape(-1))  # type: ignore[arg-type]
            yield tensor


class PoisonedModel(SyntheticModel):
    """Token 0 embeds to `poison`, an infinity or a NaN; every other token is sound."""

    def __init__(self, spec: ModelSpec, poison: float) -> None:
        super().__init__(spec)
        self._poison = poison

    def tensors(self) -> Iterator[WeightTensor]:
        for tensor in super().tensors():
            if tensor.name == "token_embedding.weight":
                values = tensor.data.view(np.float32).copy().reshape(tensor.shape)
                values[0] = self._poison
                tensor = tensor._replace(data=values.view(np.uint8).reshape(-1))
            yield tensor


def plan(
    plan_id: int,
    rows: Sequence[tuple[int, int, int, int]],
    tokens: Sequence[int],
    *,
    opened: Sequence[tuple[int, int]] = (),
    table: Sequence[tuple[int, int, int]] = (),
    closed: Sequence[int] = (),
) -> BatchPlan:
    """A plan whose opened slots, (slot, prompt length), sample greedily."""
    return BatchPlan(
        plan_id=plan_id,
        rows=np.array(rows, np.int32).reshape(-1, 4),
        tokens=np.array(tokens, np.int32),
        opened=np.array([(slot, length, 0, 0, -1, 0, 0, 0) for slot, length in opened], np.int32).reshape(-1, 8),
        opened_params=np.array([(0, 1, 0, 1, 0, 0)] * len(opened), np.float32).reshape(-1, 6),
        opened_seeds=np.zeros(len(opened), np.uint64),
        table=np.array(table, np.int32).reshape(-1, 3),
        closed=np.array(closed, np.int32),
    )


class Driver:
    """Runs sequences through a runtime in any mixture of chunks. Sequence i lives in slot i, in blocks of its own,
    which lie scattered over the pool."""

    def __init__(
        self,
        source: Any,
        sequences: Sequence[Sequence[int]],
        *,
        dtype: str = "float32",
        kv_cache_dtype: str = "auto",
        quantization: str = "auto",
        device: str = "cpu",
        block_size: int = 16,
        threads: int = 2,
        seed: int = 0,
        runtime: Callable[[Any, RuntimeConfig], NativeRuntime] = NativeRuntime,
    ) -> None:
        self.sequences = sequences
        self.block_size = block_size
        blocks = [-(-len(tokens) // block_size) for tokens in sequences]
        pool = sum(blocks) + 3
        self.runtime = runtime(
            source,
            RuntimeConfig(
                dtype=dtype,  # type: ignore[arg-type]
                kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type]
                quantization=quantization,  # type: ignore[arg-type]
                device=device,
                block_size=block_size,
                num_blocks=pool,
                max_num_batched_tokens=sum(len(tokens) for tokens in sequences),
                threads=threads,
            ),
        )
        order = iter(np.random.default_rng(seed).permutation(pool).tolist())
        self._tables = [[next(order) for _ in range(count)] for count in blocks]
        self._computed = [0] * len(sequences)
        self._plans = 0
        self.logits: list[list[np.ndarray]] = [[] for _ in sequences]

    def step(self, chunks: dict[int, int]) -> StepResult:
        """Run the next `tokens` tokens of each given sequence; collects the logits of every token."""
        rows, tokens, opened, table = [], [], [], []
        for slot, count in chunks.items():
            start = self._computed[slot]
            rows.append((slot, start, count, count))
            tokens += list(self.sequences[slot][start : start + count])
            if start == 0:
                opened.append((slot, len(self.sequences[slot])))
                table += [(slot, index, block) for index, block in enumerate(self._tables[slot])]
            self._computed[slot] += count
        self._plans += 1
        result, logits = self.runtime.logits(plan(self._plans, rows, tokens, opened=opened, table=table))
        for slot, count in chunks.items():
            self.logits[slot].append(logits[:count])
            logits = logits[count:]
        return result

    def all_logits(self, slot: int = 0) -> np.ndarray:
        """[tokens run so far, vocabulary]"""
        return np.concatenate(self.logits[slot])


def whole(source: Any, tokens: Sequence[int], **options: Any) -> np.ndarray:
    """Logits of every position of one sequence, run alone and in one piece."""
    driver = Driver(source, [tokens], **options)
    driver.step({0: len(tokens)})
    return driver.all_logits()
