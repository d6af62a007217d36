"""Typed access to the settings of a model file, with errors that name the file, the key and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from .spec import ModelError

_REQUIRED: Any = object()
_MAX_INT = 2**31 - 1
_MAX_HEAD_DIM = 1024


class Settings:
    """The keys of a `config.json` or of a GGUF file's header. A key that is null counts as absent.

    Every accessor raises ModelError for a missing key without default and for a value of the wrong kind or range.
    """

    def __init__(self, where: str, values: Mapping[str, Any], prefix: str = "") -> None:
        self.where = where
        self.values = values
        self._prefix = prefix

    def get(self, key: str) -> Any:
        return self.values.get(self._prefix + key)

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None and default is _REQUIRED:
            raise ModelError(f"{self.where}: {self._prefix + key!r} is missing")
        return default if value is None else value

    def refuse(self, key: str, allowed: str) -> ModelError:
        return ModelError(f"{self.where}: {self._prefix + key!r} must be {allowed}, got {self.get(key)!r}")

    def integer(self, key: str, default: int = _REQUIRED, low: int = 1) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= _MAX_INT:
            raise self.refuse(key, f"an integer between {low} and {_MAX_INT}")
        return value

    def number(self, key: str, default: float = _REQUIRED) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.refuse(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def choice(self, key: str, default: str, choices: Collection[str]) -> str:
        value = self._value(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self.refuse(key, f"one of {', '.join(choices)}")
        return value

    def only(self, **allowed: Any) -> None:
        """Refuse a setting that would change the result in a way this version does not implement."""
        for key, value in allowed.items():
            if self._value(key, value) != value:
                raise self.refuse(key, f"{value!r} (the only supported value)")

    def token_ids(self, *keys: str) -> tuple[int, ...]:
        """Token ids under the keys, each an integer or a list of integers; in order, without repeats."""
        found: dict[int, None] = {}
        for key in keys:
            value = self._value(key, [])
            for token in value if isinstance(value, list) else [value]:
                if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= _MAX_INT:
                    raise self.refuse(key, "a token id or a list of token ids")
                found[token] = None
        return tuple(found)

    def heads(
        self, q_key: str, kv_key: str | None, dim_key: str | None, hidden: int, dim: int = 0
    ) -> tuple[int, int, int]:
        """Query heads, key-value heads and the dimension of one; `dim` is the default, 0 for hidden / heads."""
        heads = self.integer(q_key)
        kv_heads = heads if kv_key is None else self.integer(kv_key, heads)
        if heads % kv_heads:
            raise ModelError(f"{self.where}: {heads} attention heads cannot share {kv_heads} key-value heads evenly")
        if dim_key is not None and self.get(dim_key) is not None:
            dim = self.integer(dim_key)
        elif dim == 0 and hidden % heads:
            raise ModelError(f"{self.where}: hidden size {hidden} is no multiple of {heads} attention heads")
        dim = dim or hidden // heads
        if dim > _MAX_HEAD_DIM:
            raise ModelError(f"{self.where}: heads of {dim} dimensions are not supported; at most {_MAX_HEAD_DIM}")
        return heads, kv_heads, dim
