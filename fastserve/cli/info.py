"""`fastserve info`: what a model is, without loading its weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .options import JsonOption, ModelArgument

if TYPE_CHECKING:
    from ..loaders import ModelSource

_BLOCK, _ROWS = 16, 32  # the defaults of block_size and max_num_seqs
_SUPPORTED = "smollm2, a .gguf file, a directory in Hugging Face or FasterTransformer layout, or a hub id"


def info(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show a model's shape, what it takes to serve it, and what this machine offers.

    fastserve info smollm2
    """
    description = describe(model)
    if as_json:
        print(json.dumps(description, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}", show_header=False, title_justify="left", box=None)
    table.add_column(style="dim")
    table.add_column()
    for name, value in description.items():
        table.add_row(name.replace("_", " "), _readable(name, value))
    Console().print(table)


def describe(model: str) -> dict[str, Any]:
    """JSON-ready. Raises ModelError when the model cannot be opened."""
    from ..config import KV_CACHE_DTYPES, QUANTIZATIONS
    from ..distributed import mpi_library
    from ..loaders import open_model
    from ..loaders.quantization import format_bytes
    from ..native import block_bytes, instruction_sets

    _check_model(model)
    source = open_model(model)
    spec, tokenizer = source.spec, source.tokenizer_data()
    return {
        "model": model,
        "family": spec.family,
        "parameters": source.num_parameters,
        "weights_dtype": source.weights_dtype,
        **_shards(source),
        "weight_bytes": format_bytes(source, "bfloat16", "auto"),
        "quantization_bytes": {
            choice: sum(format_bytes(source, "bfloat16", choice).values()) for choice in QUANTIZATIONS
        },
        "context": spec.max_position,
        "vocabulary": spec.vocab_size,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "tied_embeddings": spec.tied_embeddings,
        "tokenizer": tokenizer is not None,
        "chat_template": tokenizer is not None and tokenizer.chat_template is not None,
        "eos_token_ids": list(spec.eos_token_ids),
        "kv_bytes_per_token": {
            dtype: block_bytes(spec, dtype, _BLOCK, "cuda" if dtype == "float16" else "cpu") // _BLOCK
            for dtype in KV_CACHE_DTYPES
            if dtype != "auto"
        },
        "instruction_sets": [name for name in instruction_sets() if not name.endswith("_emulated")],
        "mpi": mpi_library(),
        **_default_pools(block_bytes(spec, "bfloat16", _BLOCK), spec.max_position),
    }


def _shards(source: ModelSource) -> dict[str, int]:
    """For how many ranks a checkpoint is cut that is."""
    from ..loaders.fastertransformer import FasterTransformerModel

    return {"shards": source.tensor_parallel_size} if isinstance(source, FasterTransformerModel) else {}


def _default_pools(block: int, context: int) -> dict[str, int]:
    """KV blocks that an engine would have here, now and with the defaults: on the device and to swap to."""
    from ..sizing import host_blocks, pool_blocks

    blocks = pool_blocks(None, block, block_size=_BLOCK, max_num_seqs=_ROWS, max_model_len=context)
    return {
        "kv_block_bytes": block,
        "kv_blocks": blocks,
        "swap_blocks": host_blocks(None, block, promised=blocks * block),
    }


def _check_model(model: str) -> None:
    """Raise ModelError for what could not be any model, where the loader would name a file nobody asked for."""
    from ..loaders import ModelError

    if not model.strip():
        raise ModelError(f"the name of the model is empty; use {_SUPPORTED}")


def _readable(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{each:,} ({key})" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
