"""API keys: who may ask, and which key it was."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from .errors import ApiError

# What monitors read, and the dashboard, which is an empty page until it is told a key.
OPEN_PATHS = frozenset({"/", "/health", "/metrics"})


class ApiKeys:
    """Compares in a time that tells nothing of the keys."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def check(self, path: str, authorization: str | None) -> int | None:
        """Which key it is, counted from 0; None where none is needed. Raises ApiError, 401."""
        if not self._keys or path in OPEN_PATHS:
            return None
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            raise _unauthorized("send an API key, as Authorization: Bearer KEY")
        word = given.strip().encode("latin-1")
        matches = [hmac.compare_digest(word, key) for key in self._keys]  # all of them, whichever it is
        if not any(matches):
            raise _unauthorized("the API key is not one of this server's")
        return matches.index(True)


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
