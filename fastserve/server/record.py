"""`--record`: a trace of what was served, which `fastserve simulate --trace` and `bench serve --trace` read as it is.

One JSON object a line, in FastServe's own format of traces, written when a job is over:

    arrival          seconds since 1970, so that a server that is started again goes on in the same file
    prompt_tokens    ...
    output_tokens    that it got, however it ended: what an aborted job took is part of the load
    ended            seconds since 1970; lines are about in its order, and whoever reads them sorts them by arrival
    finish_reason    stop, length, abort (its client went away, or its time was over) or error
    max_tokens       where the request named it
    priority         unless it is 0
    user, program    keyed hashes: which are the same can be told within one run of the server, and nothing else

No text and no token is written. Lines are written by a thread of its own, one system call each, so that a slow disk
delays no request and a server that is killed has written all but its last milliseconds.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import queue
import secrets
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ..types import InvalidRequest
from .engine_api import OpenJob

log = logging.getLogger(__name__)

_MOST: Final = 100_000  # lines that may wait for the disk
_PATIENCE: Final = 5.0  # seconds that they get at the end
_DIGITS: Final = 16  # of a user's hash, hexadecimal


class TraceRecord:
    """Appends jobs to a file. What goes wrong while it does is logged once and disturbs nobody."""

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: the one that jobs' times are on. Raises InvalidRequest where the file cannot be written."""
        self._path = path
        self._file = _open(path)
        self._clock = clock
        self._offset = wall_clock() - clock()  # once: a wall clock that is set would change the order of jobs
        self._key = secrets.token_bytes(32)
        self._lines: queue.Queue[bytes | None] = queue.Queue(_MOST)
        self._failed = False
        self._thread = threading.Thread(target=self._write_all, name="fastserve-record", daemon=True)
        self._thread.start()

    def ended(self, job: OpenJob) -> None:
        """A job is over, in whatever way. Returns at once."""
        try:
            self._lines.put_nowait(json.dumps(self._line(job), separators=(",", ":")).encode() + b"\n")
        except queue.Full:
            self._fails("the disk is too slow")

    def close(self) -> None:
        """Write what there is, unless that takes too long. Idempotent."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(_PATIENCE)

    def _line(self, job: OpenJob) -> dict[str, Any]:
        ended = job.metrics.finish if job.metrics is not None and job.metrics.finish is not None else self._clock()
        line: dict[str, Any] = {
            "arrival": round(self._offset + job.arrival, 6),
            "prompt_tokens": len(job.prompt),
            "output_tokens": len(job.output),
            "ended": round(self._offset + ended, 6),
            "finish_reason": job.finish_reason or "abort",
        }
        if job.params.max_tokens is not None:
            line["max_tokens"] = job.params.max_tokens
        if job.priority:
            line["priority"] = job.priority
        for name, value in (("user", job.origin.tenant), ("program", job.origin.program)):
            if value:
                line[name] = hashlib.blake2b(value.encode(), key=self._key).hexdigest()[:_DIGITS]
        return line

    # --- on the thread -----------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write(line)
            except OSError as error:
                self._fails(error.strerror or str(error))
        os.close(self._file)

    def _write(self, line: bytes) -> None:
        written = os.write(self._file, line)
        if written < len(line):  # the disk is full: half a line would make the whole file unreadable
            size = os.fstat(self._file).st_size
            os.ftruncate(self._file, max(0, size - written))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _fails(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            log.error("record: %s lacks jobs from here on, and will as long as this goes on: %s", self._path, why)


def _open(path: Path) -> int:
    """Raises InvalidRequest."""
    try:
        # Not blocking: a pipe that nobody reads is an error and no reason to wait.
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidRequest("record", f"cannot write {path}: {what}") from None
    if not stat.S_ISREG(os.fstat(file).st_mode) and not stat.S_ISCHR(os.fstat(file).st_mode):
        os.close(file)
        raise InvalidRequest("record", f"{path} is no regular file")
    return file
