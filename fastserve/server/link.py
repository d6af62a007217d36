"""The API server's end of the socket to one engine process, read by the event loop itself.

Beside zmq.asyncio, which makes two futures a message, a plain socket whose descriptor the loop watches takes half the
CPU where messages come one by one and a twentieth where they come in bursts (benchmarks/engine_client.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from ..ipc import FromEngine, ToEngine

_BURST = 64  # messages in a row before others have the event loop

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class Link:
    """Bound to an address of its own; `address` is what an engine on this host connects to.

    The socket's file lives in a private folder, which on Linux is gone before anybody could leave it behind: the engine
    comes in through this process's descriptor of it, and no other user can. Elsewhere it is removed by `close`.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        on_message: Callable[[FromEngine], None],
        on_garbage: Callable[[str], None],
    ) -> None:
        """`on_garbage` is told what is wrong with something that is no message; nothing is read after that."""
        self._on_message, self._on_garbage = on_message, on_garbage
        self._loop = asyncio.get_running_loop()
        self._folder: str | None = None
        self._file = -1  # the socket's, without its name
        self._again: asyncio.Handle | None = None
        self._socket = context.socket(zmq.PAIR)
        self._handle: int = self._socket.FD
        try:
            self._folder = tempfile.mkdtemp(prefix="fastserve-")
            # What is under way is bounded by the jobs admitted; a message that waits for room would block the loop.
            self._socket.setsockopt(zmq.SNDHWM, 0)
            self._socket.setsockopt(zmq.RCVHWM, 0)
            self._socket.setsockopt(zmq.LINGER, 0)
            path = Path(self._folder, "engine")
            self._socket.bind(f"ipc://{path}")
            self.address = f"ipc://{path}"
            if sys.platform == "linux":
                self._file = os.open(path, os.O_PATH)
                self.address = f"ipc:///proc/{os.getpid()}/fd/{self._file}"
                self._remove_folder()
            self._loop.add_reader(self._handle, self._read)
        except BaseException:
            self.close()
            raise

    def send(self, message: ToEngine) -> None:
        """Queue a message; never waits. To an engine that is gone, or before it has said anything, it goes nowhere."""
        if self._socket.closed:
            return
        with contextlib.suppress(zmq.Again):  # nobody at the other end
            self._socket.send(_encoder.encode(message), zmq.NOBLOCK)
        # A send may swallow the signal that something has come in.
        if self._again is None and self._pending():
            self._again = self._loop.call_soon(self._read)

    def drain(self) -> None:
        """Handle everything that has come in."""
        while not self._socket.closed and self._pending():
            self._read()

    def close(self) -> None:
        """Nothing is sent or heard any more. Idempotent."""
        if not self._socket.closed:
            self._loop.remove_reader(self._handle)
            self._socket.close()
        if self._again is not None:
            self._again.cancel()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._remove_folder()

    def _pending(self) -> bool:
        """Whether something has come in."""
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def _read(self) -> None:
        self._again = None
        for _ in range(_BURST):
            if self._socket.closed:  # by what the last message led to
                return
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = _decoder.decode(frame)
            except msgspec.MsgspecError as error:
                self.close()
                self._on_garbage(str(error))
                return
            self._on_message(message)
        self._again = self._loop.call_soon(self._read)

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None
