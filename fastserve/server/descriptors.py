"""File descriptors: every connection takes one, and the usual soft limit is 1,024."""

from __future__ import annotations

import contextlib
import resource

_OWN = 64  # that this process needs for itself, an engine's restart included
_PLENTY = 2**20  # where the hard limit is none, some systems take no more


def raise_limit() -> int:
    """Raise the soft limit to the hard one; returns how many connections there may be at a time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _PLENTY if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # then it stays as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(0, (_PLENTY if soft == resource.RLIM_INFINITY else soft) - _OWN)
