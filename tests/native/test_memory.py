"""What loading a model may take: the weights as they are held, the KV pool, and 250 MB for everything else."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LOAD_AND_RUN = """
import json, sys
from fastserve import LLM, SamplingParams

llm = LLM(sys.argv[1], dtype=sys.argv[2], kv_cache_memory="64M")
llm.generate(list(range(300)), SamplingParams(max_tokens=4, temperature=0))
with open("/proc/self/status") as status:  # getrusage would count the process that started this one
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
foreign = sorted(name for name in ("torch", "transformers", "gguf", "accelerate") if name in sys.modules)
print(json.dumps({"peak": peak, "foreign": foreign, **llm.info}))
"""


def _load_and_run(model: str, dtype: str) -> dict[str, Any]:
    """What the process says of itself, after the checks every model has to pass."""
    command = [sys.executable, "-c", LOAD_AND_RUN, model, dtype]
    told: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert told["kv_cache_bytes"] <= 64 * 2**20
    assert told["peak"] <= told["weight_bytes"] + told["kv_cache_bytes"] + 250e6
    assert told["foreign"] == [], "the serving path stays light"
    return told


@pytest.mark.parametrize(("dtype", "element"), [("bfloat16", 2), ("float32", 4)])
def test_peak_memory_of_smollm2(dtype: str, element: int) -> None:
    assert _load_and_run("smollm2", dtype)["weight_bytes"] <= 134_515_008 * element * 1.01


def test_peak_memory_with_large_tensors_at_both_ends_of_the_file(tmp_path: Path) -> None:
    """The file is twice the weights as held, so it must not stay resident while it is read; it is a hole on disk."""
    vocab, hidden = 160_000, 512
    config = dict(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=8)
    config |= dict(num_key_value_heads=2, intermediate_size=hidden, max_position_embeddings=512)
    (tmp_path / "config.json").write_text(json.dumps(config | dict(model_type="llama", tie_word_embeddings=False)))
    layer = "model.layers.0."
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,)}
    shapes |= {layer + name: (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {f"{layer}self_attn.{name}_proj": (rows, hidden) for name, rows in dict(q=hidden, k=128, v=128).items()}
    shapes |= {layer + name: (hidden, hidden) for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")}
    shapes |= {layer + "mlp.down_proj": (hidden, hidden), "lm_head": (vocab, hidden)}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[f"{name}.weight"] = dict(dtype="F32", shape=shape, data_offsets=[offset, offset + size])
        offset += size
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    _load_and_run(str(tmp_path), "bfloat16")


def test_peak_memory_of_a_checkpoint_that_is_put_together(tmp_path: Path) -> None:
    """Four ranks' shards of two large matrices: neither they nor what they are put together in may pile up."""
    hidden, inner, vocab, ranks = 2048, 16384, 40_000, 4
    config = dict(head_num=32, size_per_head=64, inter_size=inner, max_pos_seq_len=512, num_layer=2, vocab_size=vocab)
    config |= dict(start_id=1, end_id=2, tensor_para_size=ranks)
    (tmp_path / "config.ini").write_text("\n".join(["[gpt]", *(f"{key} = {value}" for key, value in config.items())]))
    sizes = {
        "wte": vocab * hidden,
        "wpe": 512 * hidden,
        "final_layernorm.weight": hidden,
        "final_layernorm.bias": hidden,
    }
    for layer in ("layers.0", "layers.1"):
        for name in ("input_layernorm", "post_attention_layernorm"):
            sizes |= {f"{layer}.{name}.weight": hidden, f"{layer}.{name}.bias": hidden}
        sizes |= {f"{layer}.attention.dense.bias": hidden, f"{layer}.mlp.dense_4h_to_h.bias": hidden}
        for rank in range(ranks):
            sizes[f"{layer}.attention.query_key_value.weight.{rank}"] = 3 * hidden * hidden // ranks
            sizes[f"{layer}.attention.query_key_value.bias.{rank}"] = 3 * hidden // ranks
            sizes[f"{layer}.attention.dense.weight.{rank}"] = hidden * hidden // ranks
            sizes[f"{layer}.mlp.dense_h_to_4h.weight.{rank}"] = hidden * inner // ranks
            sizes[f"{layer}.mlp.dense_h_to_4h.bias.{rank}"] = inner // ranks
            sizes[f"{layer}.mlp.dense_4h_to_h.weight.{rank}"] = hidden * inner // ranks
    for name, elements in sizes.items():
        with (tmp_path / f"model.{name}.bin").open("wb") as file:
            file.truncate(4 * elements)
    _load_and_run(str(tmp_path), "bfloat16")
