"""How long an iteration takes by data sheet: a device, a model, and how the model is spread over devices.

Per iteration of R rows and N tokens that reads C cached positions and pairs Q queries with keys, on t × p devices
(t tensor-parallel within each of p pipeline stages, whose times add up):

    matrices    max(W / (t·B), (2·M·N + 2·V·h·R) / (t·F))    W bytes of weights read, M weights in the layers' matrices
    attention   C·K / (t·B) + 4·L·H·d·Q / (t·A)              K bytes of KV a position; QKᵀ and PV, 2 FLOPs each
    all-reduce  2·L·(a + 2·(t − 1)/t · N·h·w / S)            t > 1: two a layer, as a ring; w bytes an activation
    hops        (p − 1)·(b + N·h·w / T)                      p > 1: activations to the next stage
    overhead    launch·L + host                              kernels that do not overlap; scheduling and sampling

B, F and A are the data sheet's bandwidth and peak times what kernels reach of them (`*_efficiency`), S the bandwidth of
the links inside a node, T that of the network, a and b their latencies.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .cost import Floats, Ints, plan_totals


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder's sizes; biases and norms, less than a thousandth of the weights, are left out."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gated: bool = False  # three matrices in the MLP, not two
    tied: bool = True  # the head is the embedding
    positions: int = 0  # learned position embeddings

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of one layer."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        tables = self.head_weights * (1 if self.tied else 2) + self.positions * self.hidden
        return self.layers * self.layer_weights + tables

    def kv_bytes(self, dtype_bytes: int) -> int:
        """Of one position, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a data sheet says, and how much of it is reached. Bytes, bytes/s, FLOP/s and seconds, each direction."""

    name: str
    memory: float
    bandwidth: float
    flops: float  # 16-bit matrix products, dense
    host_link: float  # to host memory
    node_link: float  # to the other devices of the node
    network: float  # to other nodes
    node_size: int  # devices in a node, the most that tensor parallelism can use
    memory_efficiency: float
    compute_efficiency: float  # of matrix products
    attention_efficiency: float  # of flops, in attention
    link_efficiency: float
    node_latency: float
    network_latency: float
    copy_latency: float  # of one copy to or from host memory
    layer_overhead: float
    iteration_overhead: float


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Satisfies cost.Cost; the module says how."""

    model: ModelShape
    device: Device
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    dtype_bytes: int = 2
    _fixed: float = field(init=False, repr=False)
    _weights: float = field(init=False, repr=False)
    _flops_per_token: float = field(init=False, repr=False)
    _flops_per_row: float = field(init=False, repr=False)
    _per_token: float = field(init=False, repr=False)
    _per_read: float = field(init=False, repr=False)
    _per_pair: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        model, device, t, p = self.model, self.device, self.tensor_parallel, self.pipeline_parallel
        bandwidth = t * device.bandwidth * device.memory_efficiency
        compute = t * device.flops * device.compute_efficiency
        activation = model.hidden * self.dtype_bytes
        reduces = 2 * model.layers if t > 1 else 0
        on_links = 2 * (t - 1) / t * activation / (device.node_link * device.link_efficiency)
        on_network = (p - 1) * activation / (device.network * device.link_efficiency)
        read = (model.layers * model.layer_weights + model.head_weights) * self.dtype_bytes
        for name, seconds in {
            "_fixed": device.iteration_overhead
            + model.layers * device.layer_overhead
            + reduces * device.node_latency
            + (p - 1) * device.network_latency,
            "_weights": read / bandwidth,
            "_flops_per_token": 2 * model.layers * model.layer_weights / compute,
            "_flops_per_row": 2 * model.head_weights / compute,
            "_per_token": reduces * on_links + on_network,
            "_per_read": model.kv_bytes(self.dtype_bytes) / bandwidth,
            "_per_pair": 4 * model.layers * model.heads * model.head_dim
            / (t * device.flops * device.attention_efficiency),
        }.items():  # fmt: skip
            object.__setattr__(self, name, seconds)

    def prefill_seconds(self, start: int, tokens: int) -> float:
        """Solo time of computing positions start … start + tokens - 1 in one iteration; 0 for no tokens."""
        if tokens <= 0:
            return 0.0
        return self._seconds(1, tokens, start + tokens, tokens * start + tokens * (tokens + 1) / 2)

    def prefill_charge(self, start: int, end: int) -> float:
        """What positions start … end - 1 add to the solo time of a prefill of which start are charged."""
        return self.prefill_seconds(0, end) - self.prefill_seconds(0, start)

    def decode_seconds(self, context: int) -> float:
        """Solo time of one token that attends to `context` positions, its own included."""
        return self._seconds(1, 1, context, context)

    def decode_each(self, contexts: Ints) -> Floats:
        """decode_seconds of each context."""
        return self._seconds(1, 1, 0, 0) + (self._per_read + self._per_pair) * contexts.astype(np.float64)

    def plan_seconds(self, starts: Ints, tokens: Ints) -> float:
        """Time of one iteration of rows (starts[i], tokens[i]); 0 for none."""
        if len(starts) == 0:
            return 0.0
        return self._seconds(len(starts), *plan_totals(starts, tokens))

    def _seconds(self, rows: int, tokens: float, reads: float, pairs: float) -> float:
        products = max(self._weights, self._flops_per_token * tokens + self._flops_per_row * rows)
        attention = self._per_read * reads + self._per_pair * pairs
        return self._fixed + products + attention + self._per_token * tokens
