"""What the layers of a model cost beside its LM head: by that, layers are shared out among the stages of a pipeline."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Final

from .config import RuntimeConfig, SchedulerConfig
from .cost import profile_path
from .loaders.spec import ModelSource
from .native import NativeRuntime, instruction_sets
from .profiler import measure_decode
from .sharding import Shard, cut
from .version import __version__

_LAYERS: Final = 3  # of the deeper of two models that are compared
_MOST_ROWS: Final = 32


def measure_stages(source: ModelSource, config: RuntimeConfig, rows: int) -> tuple[float, float]:
    """Seconds of a layer, and of the embedding, LM head and sampling together, in iterations of so many decodes.

    Measured on the model's first layer alone and on its first few, with this process's threads, and remembered for this
    machine, so that an engine is cut as the one before. Takes as long as loading those, and a tenth of a second. Raises
    what loading raises.
    """
    rows = min(rows, _MOST_ROWS)
    path = profile_path(
        f"{source.name} {source.num_parameters}", f"stages {config} {rows} rows {instruction_sets()[0]} {__version__}"
    )
    with contextlib.suppress(OSError, ValueError):
        layer, rest = json.loads(path.read_text())
        return float(layer), float(rest)
    measured = _measured(source, config, rows)
    with contextlib.suppress(OSError):  # a read-only home: another start may cut it otherwise
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured))
    return measured


def _measured(source: ModelSource, config: RuntimeConfig, rows: int) -> tuple[float, float]:
    few = min(_LAYERS, source.spec.num_layers)
    one, several = (_decode(source, config, layers, rows) for layers in (1, few))
    layer = max((several - one) / (few - 1), one * 1e-3) if few > 1 else one
    return layer, max(0.0, one - layer)


def _decode(source: ModelSource, config: RuntimeConfig, layers: int, rows: int) -> float:
    shard: Shard = cut(source.spec, tensor_rank=0, tensor_size=1, stage=0, stages=[range(layers)])
    own = replace(config, num_blocks=rows, num_host_blocks=0, swap_bandwidth=None, max_num_batched_tokens=rows)
    limits = SchedulerConfig(
        max_num_seqs=rows,
        max_num_batched_tokens=rows,
        block_size=config.block_size,
        num_blocks=rows,
        max_model_len=min(source.spec.max_position, config.block_size),
    )
    runtime = NativeRuntime(source, own, shard)
    return measure_decode(runtime, limits, vocab_size=source.spec.vocab_size, rows=rows)
