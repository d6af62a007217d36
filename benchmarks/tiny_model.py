"""A tiny random Llama with a tokenizer of letters and a chat template: what a server has to do, without the arithmetic.

python benchmarks/tiny_model.py DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 4096
_HIDDEN, _HEADS, _KV_HEADS, _INNER, _LAYERS = 32, 4, 2, 64, 2
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?-"
_SPECIAL = ["<s>", "</s>"]
_TEMPLATE = "{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}"


def write(folder: Path, seed: int = 0) -> Path:
    """A directory in Hugging Face layout; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = _vocabulary()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocab),
        "hidden_size": _HIDDEN,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(_safetensors(_weights(len(vocab), seed)))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(vocab)))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": _TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _vocabulary() -> dict[str, int]:
    """Letters, a space and a line's end, and the two bytes of é, so that half characters come up."""
    return {token: number for number, token in enumerate([*_SPECIAL, *_LETTERS, "Ġ", "Ċ", "Ã", "©"])}


def _tokenizer(vocab: dict[str, int]) -> dict[str, Any]:
    """Byte-level BPE without merges, as the `tokenizers` library writes it."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": vocab[token], "content": token, **flags} for token in _SPECIAL],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }


def _weights(vocab_size: int, seed: int) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.asarray(rng.standard_normal((rows, columns)) * 1.5 / np.sqrt(columns), np.float32)

    kv = _HIDDEN // _HEADS * _KV_HEADS
    weights = {
        "model.embed_tokens.weight": matrix(vocab_size, _HIDDEN),
        "model.norm.weight": np.ones(_HIDDEN, np.float32),
    }
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}."
        shapes = {"self_attn.q_proj": (_HIDDEN, _HIDDEN), "self_attn.k_proj": (kv, _HIDDEN)}
        shapes |= {"self_attn.v_proj": (kv, _HIDDEN), "self_attn.o_proj": (_HIDDEN, _HIDDEN)}
        shapes |= {"mlp.gate_proj": (_INNER, _HIDDEN), "mlp.up_proj": (_INNER, _HIDDEN)}
        shapes |= {"mlp.down_proj": (_HIDDEN, _INNER)}
        weights |= {f"{prefix}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = np.ones(_HIDDEN, np.float32)
    return weights


def _safetensors(weights: dict[str, np.ndarray[Any, np.dtype[np.float32]]]) -> bytes:
    """The format: the length of a JSON header, the header, and the tensors' bytes."""
    header: dict[str, Any] = {}
    body = b""
    for name, values in weights.items():
        data = values.tobytes()
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + body


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(write(Path(sys.argv[1])))
