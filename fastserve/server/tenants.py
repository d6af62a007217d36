"""Tenants: who they are by API key and user, and what they have had of the device."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Final

from ..ipc import TenantStatus
from ..origin import key_of

MOST: Final = 16  # tenants that have a name here; what others have had is one figure
_CANDIDATES: Final = 1024  # others that are watched, in case they need one
_HALF_LIFE: Final = 60.0  # seconds after which service counts half, for who has had how much of late
_MARGIN: Final = 2.0  # an unnamed tenant has had so many times what the least of the named has, to take its name
_DIGITS: Final = 8  # of a user's hash, hexadecimal

OTHERS: Final = "other"


def named(key: int | None, name: str) -> str:
    """A tenant: what the holder of an API key, counted from 0, calls a user; the user alone where there are no keys."""
    return name if key is None else f"key {key}/{name}"


class _Lately:
    """Seconds of service, each of which counts half after _HALF_LIFE."""

    def __init__(self, now: float) -> None:
        self._value = 0.0
        self._at = now

    def add(self, seconds: float, now: float) -> None:
        self._value, self._at = self.value(now) + seconds, now

    def value(self, now: float) -> float:
        return float(self._value * 0.5 ** ((now - self._at) / _HALF_LIFE))


class TenantService:
    """Fed with what each Status tells of tenants; belongs to one event loop.

    No figure ever falls, so each is a counter: a tenant's counts from when it got its name, and what it had had by then
    stays with the others'. One who takes another's name ends that one's counter.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}  # of the named
        self._lately: dict[str, _Lately] = {}
        self._candidates: OrderedDict[str, _Lately] = OrderedDict()
        self._others = 0.0
        self._others_lately = _Lately(clock())
        self._key = secrets.token_bytes(32)
        self.keyed = True  # whether names begin with API keys; else anybody may take any name

    def said(self, tenants: Iterable[TenantStatus]) -> None:
        """What an engine did for tenants since it said so last."""
        now = self._clock()
        for tenant in tenants:
            if tenant.name not in self._seconds and not self._gets_name(tenant, now):
                self._others += tenant.seconds
                self._others_lately.add(tenant.seconds, now)
            else:
                self._seconds[tenant.name] += tenant.seconds
                self._lately[tenant.name].add(tenant.seconds, now)

    def seconds(self) -> dict[str, float]:
        """Modelled seconds of service by tenant, and those of all others."""
        return {**self._seconds, OTHERS: self._others}

    def shares(self) -> list[dict[str, Any]]:
        """Of the service of late, the largest first; the others' last."""
        now = self._clock()
        values = {name: lately.value(now) for name, lately in self._lately.items()}
        others = self._others_lately.value(now)
        total = sum(values.values()) + others
        if total <= 0.0:
            return []
        ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
        told = [{"tenant": name, "share": value / total} for name, value in ordered]
        return [*told, {"tenant": None, "share": others / total}] if others > 0.0 else told

    def label(self, tenant: str) -> str:
        """A tenant's name for who has no API key: what comes after the number of a key is hashed, anew at every start.

        Where there are no keys, anybody may see who asks for what.
        """
        if not self.keyed or not (key := key_of(tenant)):
            return tenant
        user = tenant.removeprefix(f"{key}/")
        return f"{key}/{hashlib.blake2b(user.encode(), key=self._key).hexdigest()[:_DIGITS]}" if user else key

    def _gets_name(self, tenant: TenantStatus, now: float) -> bool:
        """Whether an unnamed tenant gets a name for what it has had; the time it is told of included."""
        if tenant.name == OTHERS:  # which would be two figures of one name
            return False
        if len(self._seconds) < MOST:
            lately = _Lately(now)
        else:
            lately = self._candidates.pop(tenant.name, _Lately(now))
            least = min(self._lately, key=lambda name: self._lately[name].value(now))
            if lately.value(now) + tenant.seconds <= _MARGIN * self._lately[least].value(now):
                lately.add(tenant.seconds, now)
                self._candidates[tenant.name] = lately
                if len(self._candidates) > _CANDIDATES:
                    self._candidates.popitem(last=False)
                return False
            del self._seconds[least]
            self._candidates[least] = self._lately.pop(least)
        self._seconds[tenant.name] = 0.0
        self._lately[tenant.name] = lately
        return True
