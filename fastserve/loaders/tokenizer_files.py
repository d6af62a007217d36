"""The tokenizer in a model's directory, as `transformers` saves it: tokenizer.json, or GPT-2's two older files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .spec import ModelError, TokenizerData
from .text import read_json, read_text

# All that a tokenizer may be saved as, for copying.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
    "merges.txt",
)  # fmt: skip
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_tokenizer(directory: Path) -> TokenizerData | None:
    """What it takes to build the tokenizer of a directory; None where there is none. Raises ModelError."""
    config = read_json(directory / "tokenizer_config.json", {})
    special_tokens = {
        key: text
        for key, value in {**read_json(directory / "special_tokens_map.json", {}), **config}.items()
        if key in SPECIAL_TOKENS and isinstance(text := value.get("content") if isinstance(value, dict) else value, str)
    }
    tokenizer = directory / "tokenizer.json"
    if tokenizer.is_file():
        return TokenizerData(
            json=read_text(tokenizer),
            chat_template=_chat_template(directory, config),
            special_tokens=special_tokens,
        )
    return _gpt2_tokenizer(directory, config, special_tokens)


def default_template(template: Any) -> str | None:
    """A chat template where there may be several: a text, or the `default` of a list of named ones."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """transformers 5 writes chat_template.jinja; before, the tokenizer's config held it."""
    file = directory / "chat_template.jinja"
    return read_text(file) if file.is_file() else default_template(config.get("chat_template"))


def _gpt2_tokenizer(directory: Path, config: Mapping[str, Any], special: dict[str, str]) -> TokenizerData | None:
    """vocab.json and merges.txt, the older form of GPT-2's byte-level BPE (OPT comes with these alone)."""
    vocab_file, merges_file = directory / "vocab.json", directory / "merges.txt"
    if not (vocab_file.is_file() and merges_file.is_file()):
        return None
    vocab = read_json(vocab_file)
    if sorted(vocab.values(), key=str) != sorted(range(len(vocab)), key=str):
        raise ModelError(f"{vocab_file}: must map {len(vocab)} tokens to the ids 0 to {len(vocab) - 1}")
    tokens = sorted(vocab, key=vocab.__getitem__)
    lines = read_text(merges_file).splitlines()
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special.values() else 1 for token in tokens],
        "tokenizer.ggml.merges": [line for line in lines if line and not line.startswith("#version")],
    }
    if special.get("bos_token") in vocab:
        keys["tokenizer.ggml.bos_token_id"] = vocab[special["bos_token"]]
    return TokenizerData(
        gguf=keys,
        chat_template=_chat_template(directory, config),
        special_tokens=special,
        add_bos_token=config.get("add_bos_token") is True,
    )
