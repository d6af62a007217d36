"""What a loader tells the runtime about a model: its shape, and its tensors one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


class ModelError(ValueError):
    """A model that cannot be loaded. The message names the file, the tensor or key, and what is supported."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The shape of a decoder-only transformer, for every supported family.

    Block: x + attention(norm(x)), then x + mlp(norm(x)); with `parallel_residual` both read the same x.
    """

    family: str  # gpt2, opt, llama, mistral, qwen2, qwen3, gpt_neox
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int  # longest context, in tokens
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]  # gelu is the exact one, with erf
    gated_mlp: bool  # act(gate(x)) * up(x); else act(up(x))
    # Rotary embedding, half-split ("rotate half") layout over the first 2 * len(rope_inv_freq) dimensions of a head,
    # every scaling already folded into the frequencies; empty: learned absolute positions.
    rope_inv_freq: tuple[float, ...] = ()
    rope_scale: float = 1.0  # multiplies cos and sin (YaRN's attention factor)
    position_offset: int = 0  # row of position_embedding that holds position 0 (OPT: 2)
    parallel_residual: bool = False
    qk_norm: bool = False  # RMS norm over each head of q and k, before rotation
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False  # no lm_head tensor
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


class WeightTensor(NamedTuple):
    """One tensor under its canonical name. A matrix is [outputs, inputs], row-major; rows of a block-quantized
    dtype lie back to back as GGUF stores them.

    Canonical names (N = layer; `.bias` only where the spec says so; norms have `.bias` when norm == "layer"):
    token_embedding.weight [vocab, hidden] · position_embedding.weight [positions, hidden] · lm_head.weight ·
    final_norm.{weight,bias} · layers.N.attn_norm.{weight,bias} · layers.N.{q,k,v,o}.{weight,bias} ·
    layers.N.{q,k}_norm.weight · layers.N.mlp_norm.{weight,bias} · layers.N.{gate,up,down}.{weight,bias}
    """

    name: str
    dtype: Literal["f32", "f16", "bf16", "q8_0", "q8_1", "q4_0", "q4_1"]
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]  # the bytes, contiguous; usually a view of a memory map
    # Tells that so many bytes of `data`, from its start, have been read and need not stay resident.
    release: Callable[[int], None] | None = None


class ModelSource(Protocol):
    """A model on disk, opened but not loaded."""

    @property
    def name(self) -> str:
        """What the user called it, or the directory or file name."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def weights_dtype(self) -> str:
        """The dtype most weights are stored in, for display."""

    @property
    def dtypes(self) -> Mapping[str, str]:
        """The dtype each tensor is stored in, by canonical name."""

    @property
    def num_parameters(self) -> int: ...

    def tensors(self) -> Iterator[WeightTensor]:
        """Every tensor once, in file order, each valid until the next is asked for."""

    def samples(self) -> Iterator[bytes]:
        """A few KB out of the weights, for telling two models of one shape apart; large ones are hardly read."""

    def tokenizer_data(self) -> TokenizerData | None:
        """What it takes to build the tokenizer; None when the model brings none."""


@dataclass(frozen=True, kw_only=True)
class TokenizerData:
    """Either the text of a `tokenizer.json`, or the pieces a GGUF file stores."""

    json: str | None = None
    gguf: dict[str, Any] | None = None  # the `tokenizer.*` keys of the file
    chat_template: str | None = None
    special_tokens: dict[str, str] | None = None  # bos_token, eos_token, … as text, for templates
    add_bos_token: bool = False
