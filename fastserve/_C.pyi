"""The native runtime, as csrc/bindings exposes it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .loaders.spec import ModelSpec
from .types import BatchPlan

class Error(RuntimeError): ...

class Runtime:
    def __init__(
        self,
        spec: ModelSpec,
        dtype: str,
        kv_dtype: str,
        block_size: int,
        num_blocks: int,
        max_tokens: int,
        threads: int,
        num_host_blocks: int = 0,
        swap_bandwidth: int = 0,
        formats: Mapping[str, str] = ...,
    ) -> None: ...
    def load_tensor(
        self, name: str, dtype: str, shape: Sequence[int], data: npt.NDArray[np.uint8], first_row: int = 0
    ) -> None: ...
    def finish_loading(self) -> None: ...
    def submit(self, plan: BatchPlan, logits: bool = False) -> None: ...
    # (plan_id, tokens, logprobs, top_tokens, top_logprobs, logits or None, seconds, {sample: error}, copies,
    # copy_seconds), or None after `seconds`
    def poll(self, seconds: float) -> Any: ...
    def read_block(self, host: bool, block: int) -> bytes: ...
    @property
    def instruction_set(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...

class SamplingParams:
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logprobs: int
    min_tokens: int
    seed: int
    bias: list[tuple[int, float]]
    stop_tokens: list[int]

class Matrix:
    def __init__(self, n: int, k: int, format: str, threads: int = 1) -> None: ...
    def load(self, dtype: str, data: npt.NDArray[np.uint8], first_row: int = 0) -> None: ...
    def rows(self, ids: Sequence[int]) -> npt.NDArray[np.float32]: ...
    def multiply(
        self,
        input: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32] | None = None,
        onto: npt.NDArray[np.float32] | None = None,
    ) -> npt.NDArray[np.float32]: ...
    def seconds(self, input: npt.NDArray[np.float32], repeats: int) -> float: ...
    @property
    def bytes(self) -> int: ...

class Attention:
    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kv_dtype: str,
        block_size: int,
        num_blocks: int,
        threads: int = 1,
    ) -> None: ...
    # rows: (tokens, start, blocks)
    def run(
        self, qkv: npt.NDArray[np.float32], rows: Sequence[tuple[int, int, Sequence[int]]]
    ) -> npt.NDArray[np.float32]: ...
    def seconds(
        self, qkv: npt.NDArray[np.float32], rows: Sequence[tuple[int, int, Sequence[int]]], repeats: int
    ) -> tuple[float, float]: ...
    @property
    def block_bytes(self) -> int: ...

def coalesce(moves: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]: ...
def block_bytes(spec: ModelSpec, kv_dtype: str, block_size: int) -> int: ...
def instruction_sets() -> list[str]: ...
def emulated_amx_works() -> bool: ...
def dequantize(dtype: str, data: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.float32]: ...
def sample(
    logits: npt.NDArray[np.float32], params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = ()
) -> tuple[int, float, list[tuple[int, float]]]: ...
def distribution(
    logits: npt.NDArray[np.float32], params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = ()
) -> npt.NDArray[np.float32]: ...
def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def uniform(seed: int, index: int) -> float: ...
