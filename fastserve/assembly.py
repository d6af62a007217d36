"""A model file, its runtime and what was measured of both: all that has to be there before an engine is."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from .calibration import UNMEASURED, Calibration, device_name
from .config import RuntimeConfig, SchedulerConfig, check_integer
from .cost import CostModel, Link
from .distributed import Grid
from .loaders import open_model
from .loaders.module import ModuleModel, is_module
from .loaders.spec import ModelSource, ModelSpec
from .native import NativeRuntime, block_bytes
from .placement import Placement, check_fits, is_launched, place
from .policies import ONLINE_POLICIES, create_policy
from .sizing import device_blocks, host_blocks, link_bandwidth, pool_blocks, pool_size
from .tokenizer import Tokenizer
from .tokenizer_choice import read_given_tokenizer
from .types import InvalidRequest
from .version import __version__

_ALONE = Grid()
_IN_FLIGHT = 2  # plans handed to the runtime ahead of their results, where nobody says and there are no more stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """A loaded model, and how to run it."""

    spec: ModelSpec
    tokenizer: Tokenizer | None
    placement: Placement  # to be closed with it
    runtime: NativeRuntime
    scheduling: SchedulerConfig
    calibration: Calibration
    cost: CostModel
    link: Link | None  # between device and host; None where nothing is swapped
    info: dict[str, Any]  # ready for JSON; sizes in bytes


def assemble(
    model: Any,
    *,
    scheduler: Mapping[str, Any],
    runtime: Mapping[str, Any],
    max_model_len: int | None,
    kv_cache_memory: str | int | None,
    swap_space: str | int | None,
    swap_bandwidth: str | int | None,
    skip_tokenizer: bool,
    tokenizer: Any = None,
    cost: CostModel | str | os.PathLike[str] | None,
    max_in_flight: int | None = None,
    host_share: int = 1,
    engine: int = 0,
    grid: Grid = _ALONE,
    stages: Sequence[int] | None = None,
    rank_command: Sequence[str] | None = None,
    rank_timeout: float = math.inf,
    on_failure: Callable[[str], None] | None = None,
) -> Assembly:
    """Load a model and measure what has to be known of it. `scheduler` and `runtime` hold fields of the two configs.

    `model` is a name, a path, or a module of `transformers`; `tokenizer` takes the place of the model's own.
    `host_share` engines share the host's memory and cores, where sizes are left to be found, and its devices; this is
    the one with the number `engine`. `rank_command` starts another rank of the `grid` on this host, where no launcher
    did; `stages` are the layers of each stage, where they are known. `on_failure` is told why this process ends where
    the ranks do not come together. Every option is checked before the weights are loaded, and before ranks are started.
    Returns on rank 0 only: the others work for it until it closes, and end then (SystemExit). Raises InvalidRequest,
    naming the option, ModelError, and GroupError when ranks do not get on together.
    """
    check_integer("host_share", host_share, 1, 2**16)
    check_integer("engine", engine, 0, host_share - 1)
    if isinstance(rank_timeout, bool) or not isinstance(rank_timeout, (int, float)) or not rank_timeout > 0:
        raise InvalidRequest("rank_timeout", f"must be seconds, above 0, got {rank_timeout!r}")
    with ExitStack() as stack:

        def join() -> Placement:
            return stack.enter_context(place(grid, rank_command, rank_timeout, on_failure))

        # Where others are waiting already, they are told of what is wrong here.
        joined = join() if is_launched() else None
        name, source = _open(model)
        if tokenizer is not None and skip_tokenizer:
            raise InvalidRequest("tokenizer", "cannot be given with skip_tokenizer")
        spec = source.spec
        check_fits(grid, spec)
        scheduling = SchedulerConfig(
            max_model_len=_context_length(max_model_len, spec.max_position),
            max_in_flight=max(_IN_FLIGHT, grid.pipeline_parallel_size) if max_in_flight is None else max_in_flight,
            pipeline_parallel_size=grid.pipeline_parallel_size,
            **scheduler,
        )
        _check_policy(scheduling)
        running = RuntimeConfig(
            block_size=scheduling.block_size,
            max_num_batched_tokens=scheduling.max_num_batched_tokens,
            swap_bandwidth=link_bandwidth(swap_bandwidth),
            **runtime,
        )
        if isinstance(cost, (str, os.PathLike)):
            cost = CostModel.load(cost)
        placement = joined or join()
        placement.check_same("version", __version__)
        if grid.size > 1:
            shape = spec, source.num_parameters, source.weights_dtype
            placement.check_same("model", _digest(*shape, *source.samples()))
        placement.check_same("options", _digest(scheduling, replace(running, threads=0)))
        ranks_here, threads = placement.share_of_host(host_share)
        running = replace(running, threads=running.threads or threads)
        layers = placement.stages(source, running, scheduling.max_num_seqs, stages)
        shard = placement.shard(source, layers)
        running = replace(running, device=placement.device(running.device, engine))
        pools = _Pools(
            kv_cache_memory,
            swap_space,
            block_bytes(
                spec if shard is None else shard.local(spec),
                running.kv_dtype,
                running.block_size,
                running.device,
                name,
            ),
            scheduling,
            on_host=not running.on_cuda,
            ranks=ranks_here,
            host_share=host_share * ranks_here,
        )
        native = placement.load(source, replace(running, num_blocks=pools.least), shard)
        num_blocks = pools.num_blocks(native.free_bytes(scheduling.max_num_seqs, scheduling.max_model_len))
        told = placement.gather([num_blocks, pools.num_host_blocks, pools.block_bytes])
        num_blocks, num_host_blocks = (min(each[tier] for each in told) for tier in range(2))
        scheduling = replace(scheduling, num_blocks=num_blocks, num_host_blocks=num_host_blocks)
        running = replace(running, num_blocks=num_blocks, num_host_blocks=num_host_blocks)
        native.set_pools(num_blocks, num_host_blocks)
        if placement.rank > 0:
            placement.follow()
        text = None if skip_tokenizer else _tokenizer(tokenizer, source)
        arithmetic = f"{running.dtype}, KV cache {running.kv_dtype}, quantization {running.quantization}"
        calibration = Calibration(
            native,
            scheduling,
            vocab_size=spec.vocab_size,
            model=f"{name} {source.num_parameters} {source.weights_dtype}",
            device=device_name(
                running.device, f"{arithmetic}{_layout(grid, layers)}", native.instruction_set, native.threads
            ),
        )
        costs, link = calibration.cost_model(cost), calibration.link()
    block = sum(each[2] for each in told)
    info = {
        "model": name,
        "family": spec.family,
        "parameters": source.num_parameters,
        "weights_dtype": source.weights_dtype,
        "weight_bytes": placement.weight_bytes,
        "dtype": running.dtype,
        "kv_cache_dtype": running.kv_dtype,
        "quantization": running.quantization,
        "device": running.device,
        "instruction_set": native.instruction_set,
        "threads": native.threads,
        "tensor_parallel_size": grid.tensor_parallel_size,
        "pipeline_parallel_size": grid.pipeline_parallel_size,
        "stages": layers,
        "ranks": placement.members,
        **_limits(scheduling),
        "kv_cache_bytes": num_blocks * block,
        "kv_cache_memory": num_blocks * max(each[2] for each in told),
        "kv_cache_tokens": num_blocks * scheduling.block_size,
        "swap_space_bytes": num_host_blocks * block,
        "swap_bandwidth": running.swap_bandwidth,
        "link": None if link is None else _bytes_per_second(link, block),
        "cost": asdict(costs),
    }
    return Assembly(
        spec=spec,
        tokenizer=text,
        placement=placement,
        runtime=native,
        scheduling=scheduling,
        calibration=calibration,
        cost=costs,
        link=link,
        info=info,
    )


class _Pools:
    """How many blocks of KV a rank has room for.

    What is in the host's memory is sized at once, before there are weights in it: both pools on a CPU, where they are
    one memory, else the one that jobs are swapped to. Raises InvalidRequest where it does not fit.
    """

    def __init__(
        self,
        kv_cache_memory: str | int | None,
        swap_space: str | int | None,
        block_bytes: int,
        config: SchedulerConfig,
        *,
        on_host: bool,
        ranks: int,
        host_share: int,
    ) -> None:
        """`ranks` are those on this host; `host_share` share its memory, those of other engines included."""
        self.block_bytes = block_bytes
        self._kv_cache_memory = kv_cache_memory
        # Blocks for one iteration of as many tokens as there may be.
        self.least = -(-config.max_num_batched_tokens // config.block_size)
        self._on_host = 0
        if on_host:
            self._on_host = pool_blocks(
                kv_cache_memory,
                block_bytes,
                block_size=config.block_size,
                max_num_seqs=config.max_num_seqs * config.pipeline_parallel_size,
                max_model_len=config.max_model_len,
                host_share=host_share,
                ranks=ranks,
            )
        elif kv_cache_memory is not None:
            pool_size(kv_cache_memory, block_bytes)
        swapped = host_blocks(
            swap_space, block_bytes, promised=self._on_host * block_bytes, host_share=host_share, ranks=ranks
        )
        self.num_host_blocks = swapped if config.swaps else 0

    def num_blocks(self, free: int | None) -> int:
        """Blocks of the device's pool, where weights and the largest iteration leave `free` bytes of its own memory.

        None: it has none of its own. Raises InvalidRequest where there is no room.
        """
        return self._on_host if free is None else device_blocks(self._kv_cache_memory, self.block_bytes, free=free)


def _digest(*values: Any) -> str:
    """Equal for equal values, on any host."""
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _layout(grid: Grid, layers: Sequence[int]) -> str:
    return "" if grid.size == 1 else f", {grid.tensor_parallel_size} ranks a stage of {list(layers)} layers"


def _limits(config: SchedulerConfig) -> dict[str, Any]:
    """What the scheduler goes by, ready for JSON."""
    return {
        "policy": config.policy,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "stall_limit": config.stall_limit,
        "max_in_flight": config.max_in_flight,
        "num_levels": config.num_levels,
        "starvation_limit": config.starvation_limit,
        "slowdown_limit": config.slowdown_limit,
        "admission": config.admission,
        "swap_mode": config.swap_mode if config.num_host_blocks else "recompute",
        "enable_prefix_caching": config.enable_prefix_caching,
        "tenant_weights": dict(config.tenant_weights),
        "block_size": config.block_size,
        "num_blocks": config.num_blocks,
        "num_host_blocks": config.num_host_blocks,
    }


def _bytes_per_second(link: Link, block: int) -> dict[str, float]:
    """The link's speed for large copies, and the seconds it takes before the first byte of any."""
    return {
        "offload_bytes_per_second": block / link.offload_block,
        "upload_bytes_per_second": block / link.upload_block,
        "latency": link.latency,
    }


def _check_policy(config: SchedulerConfig) -> None:
    """Raise InvalidRequest for a policy unknown, and for one that cannot serve."""
    if config.policy not in ONLINE_POLICIES:
        oracle = "; srpt has to be told how long every output is, as fastserve simulate does"
        raise InvalidRequest(
            "policy",
            f"must be one of {', '.join(ONLINE_POLICIES)}; got {config.policy!r}"
            f"{oracle if config.policy == 'srpt' else ''}",
        )
    create_policy(config, UNMEASURED)


def _open(model: Any) -> tuple[str, ModelSource]:
    """What a model is called, and its source."""
    name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
    if isinstance(name, str) and name:
        return name, open_model(name)
    if is_module(model):
        module = ModuleModel(model)
        return module.name, module
    raise InvalidRequest(
        "model",
        "must be smollm2, a .gguf file, a directory in Hugging Face or FasterTransformer layout, a hub id or a module "
        f"of transformers, got {model!r:.80}",
    )


def _tokenizer(given: Any, source: ModelSource) -> Tokenizer | None:
    if given is not None:
        return read_given_tokenizer(given)
    data = source.tokenizer_data()
    return None if data is None else Tokenizer.from_data(data)


def _context_length(asked: Any, limit: int) -> int:
    if asked is None:
        return limit
    if check_integer("max_model_len", asked, 1, 2**63) > limit:
        raise InvalidRequest("max_model_len", f"must be at most {limit}, the model's longest context; got {asked}")
    return int(asked)
