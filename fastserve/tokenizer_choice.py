"""The `tokenizer` that a caller gives beside a model: a path, or one that a library has made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .loaders.spec import ModelError, TokenizerData
from .loaders.text import read_text
from .loaders.tokenizer_files import SPECIAL_TOKENS, default_template, read_tokenizer
from .tokenizer import Tokenizer
from .types import InvalidRequest

_ACCEPTED = "a directory with a tokenizer, a tokenizer.json, or a tokenizer of tokenizers or transformers"


def read_given_tokenizer(given: Any) -> Tokenizer:
    """Raises InvalidRequest for what is no tokenizer, and ModelError for one that cannot be built."""
    if isinstance(given, Tokenizer):
        return given
    return Tokenizer.from_data(
        _from_path(Path(given)) if isinstance(given, (str, os.PathLike)) else _from_object(given)
    )


def _from_path(path: Path) -> TokenizerData:
    path = path.expanduser()
    if path.is_dir():
        data = read_tokenizer(path)
        if data is None:
            raise ModelError(f"{path}: no tokenizer.json, nor vocab.json and merges.txt")
        return data
    if not path.is_file():
        raise InvalidRequest("tokenizer", f"must be {_ACCEPTED}; there is no {path}")
    return TokenizerData(json=read_text(path))


def _from_object(given: Any) -> TokenizerData:
    """Of `transformers`, the fast ones: they wrap one of `tokenizers`."""
    backend = getattr(given, "backend_tokenizer", given)
    if isinstance(given, type) or not callable(getattr(backend, "to_str", None)):
        slow = " (a slow one, in Python; load it with use_fast=True)" if hasattr(given, "convert_ids_to_tokens") else ""
        raise InvalidRequest("tokenizer", f"must be {_ACCEPTED}; got {type(given).__name__}{slow}")
    template = getattr(given, "chat_template", None)
    if isinstance(template, dict):  # by name
        template = [{"name": name, "template": text} for name, text in template.items()]
    special = {key: getattr(given, key, None) for key in SPECIAL_TOKENS}
    return TokenizerData(
        json=backend.to_str(),
        chat_template=default_template(template),
        special_tokens={key: token for key, token in special.items() if isinstance(token, str)},
    )
