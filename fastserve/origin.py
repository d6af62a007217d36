"""Whose a request is, which program makes it, and who may find in the cache what it leaves there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from .types import InvalidRequest

MAX_LENGTH: Final = 256  # characters of each


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a job carries along of where it comes from. KV is shared between jobs of one tenant and one salt only."""

    tenant: str = ""  # "": nobody's in particular
    program: str | None = None  # the program, within its tenant, that this is a call of
    cache_salt: str = ""
    cache_key: str | None = None  # requests with the same one are thought to begin alike: for choosing an engine


NOBODY: Final = Origin()


def key_of(tenant: str) -> str:
    """The same for all users of an API key, who are called `key N/USER`; "" for tenants of no key.

    Where there are no keys, anybody may take any name.
    """
    key, slash, _ = tenant.partition("/")
    return key if slash and key.startswith("key ") else ""


@lru_cache(maxsize=4096)
def sharer_of(tenant: str) -> str:
    """Who the device is shared between in the first place: a tenant's API key, or itself where it has none."""
    return key_of(tenant) or tenant


@lru_cache(maxsize=4096)
def accounts_of(tenant: str) -> tuple[str, ...]:
    """Whom the memory that a tenant's jobs hold counts for: its sharer, and itself where that is its API key."""
    sharer = sharer_of(tenant)
    return (tenant,) if sharer == tenant else (sharer, tenant)


def checked_origin(tenant: Any = "", program_id: Any = None, cache_salt: Any = "") -> Origin:
    """Raises InvalidRequest for what is no text, is too long, or cannot be told to another process."""
    return Origin(
        tenant=_text("tenant", tenant),
        program=None if program_id is None else _text("program_id", program_id) or None,
        cache_salt=_text("cache_salt", cache_salt),
    )


def check_text(field: str, text: str, longest: int = MAX_LENGTH) -> None:
    """Raises InvalidRequest for what is too long, and for half of a surrogate pair, which no process can be told."""
    if len(text) > longest:
        raise InvalidRequest(field, f"must have at most {longest} characters, got {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            field, f"must be valid Unicode, and has a lone surrogate at character {error.start}"
        ) from None


def _text(field: str, given: Any) -> str:
    if not isinstance(given, str):
        raise InvalidRequest(field, f"must be a string, got {given!r:.80}")
    check_text(field, given)
    return str(given)
