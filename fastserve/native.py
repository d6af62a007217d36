"""The native runtime as an Executor: loads a model into it, submits plans and waits for results."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import _C
from .config import RuntimeConfig
from .distributed import GroupError
from .links import Links
from .loaders.quantization import weight_formats
from .loaders.spec import ModelError, ModelSource, ModelSpec, WeightTensor
from .loaders.weights import BLOCKS, tensor_shapes
from .sharding import Shard, whole
from .types import BatchPlan, Float32Array, InvalidRequest, StepResult

_FOREVER = -1.0
_OUT_OF_MEMORY = "out of memory"  # as CUDA says it
_SLICE_BYTES = 16 * 2**20  # of a file, resident at a time while loading


def block_bytes(spec: ModelSpec, kv_dtype: str, block_size: int, device: str = "cpu", model: str | None = None) -> int:
    """Bytes of one KV block, all layers of it. Raises ModelError, naming the `model`, where a device holds no such."""
    try:
        return _C.block_bytes(spec, kv_dtype, block_size, device)
    except _C.Error as error:
        if model is None:
            raise
        raise ModelError(f"{model}: {error}") from error


def instruction_sets() -> list[str]:
    """Instruction sets this build and this machine have, best first; the variable FASTSERVE_ISA forces one."""
    return _C.instruction_sets()


class NativeRuntime:
    """Executes plans in submission order on a thread of its own, with a pool of `config.threads` for the arithmetic.

    Copies run beside them on two more threads, one a direction.

    Raises ModelError when a tensor is missing, unknown or of the wrong shape, InvalidRequest when the system does not
    give what the configuration asks for, and GroupError when another rank is gone or has failed to do the same.
    """

    def __init__(
        self, source: ModelSource, config: RuntimeConfig, shard: Shard | None = None, links: Links | None = None
    ) -> None:
        """`shard` (default: all) is the part of the model that this rank holds, `links` lead to the others.

        With links, rank 0 submits and polls for all, and the other ranks `follow`.
        """
        self._spec = source.spec
        self._max_tokens = config.max_num_batched_tokens
        self._shapes = dict(tensor_shapes(source.spec))
        self._shard = shard or whole(source.spec)
        self._under_way = 0  # plans
        self._failure: GroupError | None = None  # what ended it
        try:
            self._runtime = self._allocated(source, config, links)
            self._load_all(source)
        except BaseException as error:
            if links is not None:  # the others may be waiting for this rank, and are not to guess what it had
                links.abort(error)
            raise

    def _allocated(self, source: ModelSource, config: RuntimeConfig, links: Links | None) -> _C.Runtime:
        try:
            return _C.Runtime(
                self._shard.local(source.spec),
                config.dtype,
                config.kv_dtype,
                block_size=config.block_size,
                num_blocks=config.num_blocks,
                max_tokens=config.max_num_batched_tokens,
                threads=config.threads,
                num_host_blocks=config.num_host_blocks,
                swap_bandwidth=config.swap_bandwidth or 0,
                formats=self._shard.local_formats(
                    weight_formats(source, config.dtype, config.quantization), source.spec
                ),
                shard=self._shard,
                links=links,
                device=config.device,
            )
        except _C.GroupError as error:
            raise GroupError.of(error) from error
        except _C.Error as error:  # no such device, too many threads, or an instruction set this machine lacks
            raise InvalidRequest("device" if config.on_cuda else "runtime", str(error)) from error

    def _load_all(self, source: ModelSource) -> None:
        try:
            for tensor in source.tensors():
                self._load(tensor)
                del tensor  # before the next is there: either may be a matrix that was put together
            self._runtime.finish_loading()
        except _C.Error as error:
            raise ModelError(f"{source.name}: {error}") from error

    def _load(self, tensor: WeightTensor) -> None:
        """Load what this rank holds of a tensor in slices of whole rows, so that little of its file is resident."""
        part = self._part_of(tensor)
        if part is None:
            return
        name, rows, columns = part
        shape = [len(rows), len(columns)][: len(tensor.shape)]
        size = tensor.data.nbytes
        slice_rows = len(rows) if len(shape) == 1 else max(1, _SLICE_BYTES * tensor.shape[0] // max(1, size))
        for first in range(rows.start, rows.stop, slice_rows):
            begin, end = (min(row, rows.stop) * size // tensor.shape[0] for row in (first, first + slice_rows))
            data = tensor.data[begin:end]
            if len(shape) == 2 and len(columns) < tensor.shape[1]:
                elements, block = BLOCKS[tensor.dtype]
                if columns.start % elements or columns.stop % elements:
                    raise ModelError(
                        f"{tensor.name}: its {tensor.dtype} groups of {elements} inputs cannot be cut at "
                        f"{columns.start} and {columns.stop}; lower tensor_parallel_size, or serve unquantized weights"
                    )
                held = slice(columns.start // elements * block, columns.stop // elements * block)
                data = np.ascontiguousarray(data.reshape(-1, size // tensor.shape[0])[:, held]).reshape(-1)
            self._runtime.load_tensor(name, tensor.dtype, shape, data, first - rows.start)
            if tensor.release is not None:
                tensor.release(end)

    def _part_of(self, tensor: WeightTensor) -> tuple[str, range, range] | None:
        """Its name here, and the rows and columns of it that are held here; None for none.

        It is the whole tensor, or this rank's part of it. What is no tensor of this model, or not as large as it should
        be, is passed on as it is: the runtime says what is wrong.
        """
        shape = self._shapes.get(tensor.name)
        as_it_is = tensor.name, range(tensor.shape[0]), range(tensor.shape[-1] if len(tensor.shape) == 2 else 1)
        elements, block = BLOCKS.get(tensor.dtype, (1, 0))
        if shape is None or tensor.data.nbytes != math.prod(tensor.shape) // elements * block:
            return as_it_is
        part = self._shard.part_of(tensor.name, shape, self._spec)
        if part is None:
            return None
        rows, columns = part
        if tensor.shape == shape:
            return self._shard.local_name(tensor.name), rows, columns
        if tensor.shape == (len(rows), len(columns))[: len(shape)]:
            return self._shard.local_name(tensor.name), range(len(rows)), range(len(columns))
        return as_it_is

    def free_bytes(self, rows: int, positions: int) -> int | None:
        """Bytes that the device has left beside the largest iteration, which is run; None: its memory is the host's.

        Iterations have up to `rows` rows, with contexts of up to so many positions. All ranks take part. Raises
        InvalidRequest when there is not as much memory, and GroupError as `poll` does.
        """
        try:
            free = self._runtime.free_bytes(rows, positions)
        except _C.GroupError as error:
            raise GroupError.of(error) from error
        except _C.Error as error:
            if _OUT_OF_MEMORY not in str(error):
                raise InvalidRequest("device", str(error)) from error
            raise InvalidRequest(
                "max_num_batched_tokens",
                f"must be lower: beside the weights, the device has no room for an iteration of {self._max_tokens} "
                f"tokens and {rows} rows ({error})",
            ) from error
        return None if free < 0 else free

    def set_pools(self, num_blocks: int, num_host_blocks: int) -> None:
        """Gives the runtime other KV pools. No plan may be in flight, and what is in the pools is lost.

        Raises InvalidRequest when there is not as much memory.
        """
        try:
            self._runtime.set_pools(num_blocks, num_host_blocks)
        except _C.Error as error:
            raise InvalidRequest("kv_cache_memory", str(error)) from error

    def follow(self) -> None:
        """For ranks other than 0: runs what rank 0 submits, until it closes. Raises GroupError as `poll` does."""
        try:
            self._runtime.follow()
        except _C.GroupError as error:
            raise GroupError.of(error) from error

    def close(self) -> None:
        """Rank 0 lets the others go, once all plans have returned; nothing to do without others.

        Raises GroupError when a rank is gone, and again what `poll` has raised: they are not of one mind any more.
        """
        while self._under_way and self._failure is None:
            self.poll()
        if self._failure is not None:
            raise self._failure
        self._runtime.close()

    @property
    def instruction_set(self) -> str:
        return self._runtime.instruction_set

    @property
    def threads(self) -> int:
        return self._runtime.threads

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight matrices as held in memory."""
        return self._runtime.weight_bytes

    def submit(self, plan: BatchPlan) -> None:
        """Queues a plan and starts its copies.

        Raises _C.Error, doing neither on any rank, when a copy is illegal: outside the pools, or with the id or a block
        of another that no result has acknowledged. Whatever else does not fit the runtime's state is raised at `poll`.
        Raises GroupError as `poll` does.
        """
        try:
            self._runtime.submit(plan)
        except _C.GroupError as error:
            raise self._failed(error) from error
        self._under_way += 1

    def poll(self, timeout: float | None = None) -> StepResult | None:
        """The oldest result not yet returned, or None after `timeout` seconds. The GIL is released meanwhile.

        Raises _C.Error when the plan has failed. Without other ranks the next plan may be a better one. With others it
        is a GroupError, raised on all of them from then on, with one line that says which rank it was, where and why:
        the plan has failed on one of them, be it on all in the same way, or a rank is gone.
        """
        try:
            answer = self._runtime.poll(_FOREVER if timeout is None else max(0.0, timeout))
        except _C.GroupError as error:
            raise self._failed(error) from error
        except _C.Error:
            self._under_way -= 1
            raise
        if answer is None:
            return None
        self._under_way -= 1
        return _step_result(answer)[0]

    def _failed(self, error: _C.GroupError) -> GroupError:
        self._failure = GroupError.of(error)
        return self._failure

    def logits(self, plan: BatchPlan) -> tuple[StepResult, Float32Array]:
        """Runs one plan, nothing else being in flight, and returns its logits too: [sum of the rows' logits, vocab]."""
        self._runtime.submit(plan, logits=True)
        result, logits = _step_result(self._runtime.poll(_FOREVER))
        return result, logits


def _step_result(answer: tuple[Any, ...]) -> tuple[StepResult, Any]:
    plan_id, tokens, logprobs, top_tokens, top_logprobs, logits, seconds, errors, copies, copy_seconds = answer
    result = StepResult(
        plan_id=plan_id,
        tokens=tokens,
        logprobs=logprobs,
        top_tokens=top_tokens,
        top_logprobs=top_logprobs,
        seconds=seconds,
        errors=errors,
        copies=copies,
        copy_seconds=copy_seconds,
    )
    return result, logits
