"""Whether ranks on other hosts are still there.

A host that loses its power, or a line that is cut, closes no connection: whoever waits for a message from there would
wait for ever, with the model in memory. So rank 0 and every other rank say to each other that they are there, from the
moment they are a group, whatever else they do: load, compute, or nothing. Who is not heard of is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from . import _C

_LOOKS: Final = 8  # at each other, in the time after which a rank is taken to be gone
_LONGEST: Final = 1.0  # seconds between two looks
_PARTING: Final = 0.01  # the same, when the group ends in order
_HERE, _LEAVES = b"\x01", b"\x00"


class Pulse:
    """A thread that speaks with other ranks: rank 0's with all, theirs with rank 0's."""

    def __init__(self, ways: _C.Communicator, limit: float, on_silence: Callable[[str], None]) -> None:
        """`ways`: a communicator of all ranks, used and closed by this only. `limit`: seconds of silence.

        `on_silence` is told, by that thread, which rank is not heard of; then `ways` is aborted.
        """
        self._ways = ways
        # Silence is counted in looks, not read from a clock: when it was this process that stood still, what the others
        # said meanwhile is there to be heard, and there has been one look only.
        self._interval = min(_LONGEST, limit / _LOOKS)
        self._most = max(_LOOKS, round(limit / self._interval))
        self._on_silence = on_silence
        peers = range(1, ways.size) if ways.rank == 0 else range(1)
        self._peers = [_Peer(ways, peer) for peer in peers]
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastserve-pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave, when the others leave, too; or at once where the group has been aborted. From any thread. Idempotent.

        A rank that does not come to that is taken to be gone, as any other.
        """
        self._leaving.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def abort(self, reason: str) -> None:
        """End it, with the rest of the group. From any thread."""
        self._ways.abort(reason)
        self.stop()

    def _run(self) -> None:
        try:
            while self._peers_left():
                if self._leaving.is_set():
                    threading.Event().wait(_PARTING)
                else:
                    self._leaving.wait(self._interval)
            self._ways.close()
        except _C.Error:  # the group has been aborted, and everybody has been told why
            pass

    def _peers_left(self) -> bool:
        """Hear, speak, and whether there is somebody to hear of or speak to. Raises _C.Error after an abort."""
        leaving = self._leaving.is_set()
        most = self._most * (self._interval / _PARTING if leaving else 1)
        for peer in self._peers:
            peer.hear()
            peer.speak(_LEAVES if leaving else _HERE)
            if not peer.has_left and peer.missed >= most:
                rank, process, host = self._ways.members[peer.rank]
                seconds = self._most * self._interval
                reason = f"rank {rank} on {host} (process {process}) has not been heard of for {seconds:.1f} seconds"
                self._on_silence(reason)
                self._ways.abort(reason)
        return not all(peer.over for peer in self._peers)


class _Peer:
    """What is said to one other rank, and what is heard of it, one byte a message."""

    def __init__(self, ways: _C.Communicator, rank: int) -> None:
        self._ways = ways
        self.rank = rank
        self.missed = 0  # looks in a row at which nothing was heard
        self.has_left = False
        self._byte = bytearray(1)
        self._coming: _C.Request | None = ways.receive(self._byte, rank)
        self._going: _C.Request | None = None
        self._parted = False  # the last word has been begun

    @property
    def over(self) -> bool:
        return self._coming is None and self._parted and self._going is None

    def hear(self) -> None:
        self.missed += 1
        while self._coming is not None and self._coming.test():
            self.missed = 0
            self.has_left = bytes(self._byte) == _LEAVES
            self._coming = None if self.has_left else self._ways.receive(self._byte, self.rank)

    def speak(self, word: bytes) -> None:
        """Unless the last one is still on its way: then it is not heard, and another would not be."""
        if self._going is not None and self._going.test():
            self._going = None
        if self._going is None and not self._parted:
            self._going = self._ways.send(word, self.rank)
            self._parted = word == _LEAVES
