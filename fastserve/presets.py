"""Devices and models by name, and what one makes of the other: time, swapping speed and room for KV cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from .config import MAX_BLOCKS, check_integer
from .cost import Link
from .roofline import Device, ModelShape, Roofline
from .types import InvalidRequest

_GIB: Final = 2.0**30

# NVIDIA A100 Tensor Core GPU data sheet (2021), SXM: 312 TFLOPS dense bf16 and fp16; 1,555 GB/s (40 GB) and 2,039 GB/s
# (80 GB); NVLink 600 GB/s and PCIe 4 ×16 64 GB/s, both directions together, hence half of each, and of PCIe 31.5 GB/s
# after its 128b/130b code. Network: one 200 Gb/s port a GPU, over which each sends all of a hop's activations; an AWS
# p4d.24xlarge (eight of 40 GB) has 400 Gb/s for all, which carry them in half the time if each sends an eighth. The
# efficiencies and latencies are not of the data sheet: they are what well-made kernels and NCCL commonly reach, and are
# to be taken as assumptions.
_A100: Final = Device(
    name="a100-40g",
    memory=40 * _GIB,
    bandwidth=1555e9,
    flops=312e12,
    host_link=31.5e9,
    node_link=300e9,
    network=25e9,
    node_size=8,
    memory_efficiency=0.8,
    compute_efficiency=0.6,
    attention_efficiency=0.4,
    link_efficiency=0.8,
    node_latency=15e-6,
    network_latency=20e-6,
    copy_latency=20e-6,
    layer_overhead=20e-6,
    iteration_overhead=1e-3,
)

DEVICES: Final[Mapping[str, Device]] = {
    device.name: device
    for device in (
        _A100,
        replace(_A100, name="a100-80g", memory=80 * _GIB, bandwidth=2039e9),
        # NVIDIA H100 data sheet (2023), SXM: 989 TFLOPS dense bf16, 3.35 TB/s, NVLink 900 GB/s and PCIe 5 ×16 128 GB/s,
        # both directions together; 400 Gb/s of network a GPU.
        replace(
            _A100,
            name="h100",
            memory=80 * _GIB,
            bandwidth=3350e9,
            flops=989e12,
            host_link=63e9,
            node_link=450e9,
            network=50e9,
        ),
        # Two cores of an AMD EPYC (Zen 4, AVX-512 BF16), not by data sheet but from what FastServe's own runtime
        # measured there: SmolLM2-135M, 8.9 ms an iteration, for 269 MB of weights, and 0.56 ms a prefilled token. One
        # memory bus serves compute and copies, and a copy crosses it three times. There the two add up where a roofline
        # overlaps them, so batches of some ten decodes take up to 1.7 × as long: prefer `fastserve profile`.
        replace(
            _A100,
            name="cpu",
            memory=24 * _GIB,
            bandwidth=30e9,
            flops=0.4e12,
            host_link=10e9,
            node_size=1,
            memory_efficiency=1.0,
            compute_efficiency=1.0,
            attention_efficiency=0.5,
            link_efficiency=1.0,
            layer_overhead=10e-6,
            iteration_overhead=0.2e-3,
        ),
    )
}


def _gpt(name: str, layers: int, hidden: int, heads: int, vocab: int = 50257) -> ModelShape:
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=4 * hidden,
        vocab=vocab,
        positions=2048,
    )


def _llama(name: str, layers: int, hidden: int, heads: int, intermediate: int) -> ModelShape:
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        intermediate=intermediate,
        vocab=128256,
        gated=True,
        tied=False,
    )


MODELS: Final[Mapping[str, ModelShape]] = {
    model.name: model
    for model in (
        # Brown et al., "Language Models are Few-Shot Learners" (2020), table 2.1; its 13B is 5140 wide, which its
        # 40 heads of 128 make 5120. There is no GPT-3 between 13B and 175B; for those sizes take OPT's.
        _gpt("gpt3-2.7b", 32, 2560, 32),
        _gpt("gpt3-6.7b", 32, 4096, 32),
        _gpt("gpt3-13b", 40, 5120, 40),
        _gpt("gpt3-175b", 96, 12288, 96),
        # Zhang et al., "OPT: Open Pre-trained Transformer Language Models" (2022), table 1
        _gpt("opt-13b", 40, 5120, 40, 50272),
        _gpt("opt-30b", 48, 7168, 56, 50272),
        _gpt("opt-66b", 64, 9216, 72, 50272),
        _gpt("opt-175b", 96, 12288, 96, 50272),
        # "The Llama 3 Herd of Models" (2024), table 3
        _llama("llama-3-8b", 32, 4096, 32, 14336),
        _llama("llama-3-70b", 80, 8192, 64, 28672),
        # the model's own config.json
        ModelShape(
            name="smollm2-135m",
            layers=30,
            hidden=576,
            heads=9,
            kv_heads=3,
            head_dim=64,
            intermediate=1536,
            vocab=49152,
            gated=True,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A model on tensor_parallel × pipeline_parallel devices. Bytes are of all devices together, unless said."""

    model: str
    device: str
    tensor_parallel: int
    pipeline_parallel: int
    block_size: int
    cost: Roofline
    link: Link  # every device moves its part of a block at the same time
    num_blocks: int  # that fit beside the weights, MAX_BLOCKS at most
    block_bytes: int
    device_block_bytes: int  # of the device that holds most of a block
    weight_bytes: int

    @property
    def devices(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def host_blocks(self, swap_space: int) -> int:
        """KV blocks in `swap_space` bytes of host memory for each device."""
        return swap_space // self.device_block_bytes


def deployment(
    model: str,
    device: str,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    block_size: int = 16,
    *,
    dtype_bytes: int = 2,
    memory_share: float = 0.9,
) -> Deployment:
    """The preset `model` on devices of the preset `device`.

    KV cache gets what weights leave of `memory_share` of each device's memory. Raises InvalidRequest for an unknown
    name, for a model that cannot be split so, and where weights and one block do not fit.
    """
    shape, kind = _named("model", model, MODELS), _named("device", device, DEVICES)
    t = check_integer("tensor_parallel_size", tensor_parallel, 1, kind.node_size)
    p = check_integer("pipeline_parallel_size", pipeline_parallel, 1, shape.layers)
    block_size = check_integer("block_size", block_size, 1, 2**16)
    check_integer("dtype_bytes", dtype_bytes, 1, 4)
    if shape.heads % t:
        raise InvalidRequest("tensor_parallel_size", f"must divide the {shape.heads} heads of {model}, got {t}")
    if not 0 < memory_share <= 1:
        raise InvalidRequest("memory_share", f"must be above 0 and at most 1, got {memory_share!r}")
    cost = Roofline(model=shape, device=kind, tensor_parallel=t, pipeline_parallel=p, dtype_bytes=dtype_bytes)
    layers = math.ceil(shape.layers / p)  # of the fullest stage; the first and the last hold a table as well
    tables = shape.parameters - shape.layers * shape.layer_weights if p == 1 else shape.head_weights
    weights = math.ceil((layers * shape.layer_weights + tables) * dtype_bytes / t)
    kv_heads = math.ceil(shape.kv_heads / t)
    device_block_bytes = 2 * layers * kv_heads * shape.head_dim * dtype_bytes * block_size
    num_blocks = int((kind.memory * memory_share - weights) // device_block_bytes)
    if num_blocks < 1:
        raise InvalidRequest(
            "model",
            f"{model} needs {weights / _GIB:.1f} GiB for its weights on each of {t * p} {device}, and of "
            f"{kind.memory / _GIB:.0f} GiB a share of {memory_share} may be used; raise tensor_parallel_size or "
            "pipeline_parallel_size",
        )
    seconds = device_block_bytes / (kind.host_link * kind.link_efficiency)
    return Deployment(
        model=model,
        device=device,
        tensor_parallel=t,
        pipeline_parallel=p,
        block_size=block_size,
        cost=cost,
        link=Link(offload_block=seconds, upload_block=seconds, latency=kind.copy_latency),
        num_blocks=min(num_blocks, MAX_BLOCKS),
        block_bytes=shape.kv_bytes(dtype_bytes) * block_size,
        device_block_bytes=device_block_bytes,
        weight_bytes=shape.parameters * dtype_bytes,
    )


_T = TypeVar("_T")


def _named(option: str, name: str, presets: Mapping[str, _T]) -> _T:
    if name not in presets:
        raise InvalidRequest(option, f"must be one of {', '.join(presets)}; got {name!r}")
    return presets[name]
