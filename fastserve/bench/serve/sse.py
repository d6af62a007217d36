"""Server-sent events, parsed as they come, in pieces of any size."""

from __future__ import annotations

from typing import Final

from .http import ProtocolError

MAX_LINE: Final = 2**24  # bytes


class EventStream:
    """The data of events. Comments (keep-alives), names and ids are left out."""

    def __init__(self) -> None:
        self._partial = b""  # a line that is not all there
        self._data: list[bytes] = []  # of the event that is not all there
        self._after_return = False

    def feed(self, body: bytes) -> list[bytes]:
        """The data of the events that end in `body`; lines may end in LF, CRLF or CR. Raises ProtocolError."""
        if not body:
            return []
        # A CR ends its line at once, so that no event waits for the next. An LF that follows is part of it.
        if self._after_return and body.startswith(b"\n"):
            body = body[1:]
            self._after_return = False
        if b"\r" in body:
            self._after_return = body.endswith(b"\r")
            body = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        elif body:
            self._after_return = False
        *lines, self._partial = (self._partial + body).split(b"\n")
        if len(self._partial) > MAX_LINE:
            raise ProtocolError(f"a line of more than {MAX_LINE} bytes")
        events = []
        for line in lines:
            if not line:
                data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
                if data:
                    events.append(data)
                self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b" ", 5) else line[5:])
        return events
