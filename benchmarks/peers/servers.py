"""OpenAI-compatible servers as users start them; all but the one that is measured stand still (SIGSTOP)."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .models import Weights
from .processes import Candidate, Group, PeerError, environment, free_port

_START_SECONDS = 900.0  # vLLM compiles for minutes
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Server:
    """What is started. `options` are the server's own, added to its command line."""

    name: str
    engine: str  # fastserve, vllm or llama-server
    weights: Weights
    program: str  # a Python, or llama-server
    model: str
    slots: int  # jobs in a batch
    context: int  # tokens
    threads: int
    options: tuple[str, ...] = ()
    caching: bool = False  # of prefixes by peers: where no prompt comes twice it costs and does not help

    def command(self, port: int) -> list[str]:
        where = ["--host", "127.0.0.1", "--port", str(port)]
        if self.engine == "fastserve":
            sizes = ["--max-num-seqs", str(self.slots), "--max-model-len", str(self.context)]
            command = [self.program, "-m", "fastserve", "serve", "--model", self.model, *where, *sizes]
            command += ["--threads", str(self.threads)]
        elif self.engine == "vllm":
            sizes = ["--max-num-seqs", str(self.slots), "--max-model-len", str(self.context)]
            vllm = str(Path(self.program).with_name("vllm"))
            command = [vllm, "serve", self.model, *where, *sizes, "--dtype", "bfloat16"]
            command += ["--enable-prefix-caching" if self.caching else "--no-enable-prefix-caching"]
        else:
            threads = str(self.threads)
            command = [self.program, "-m", self.model, *where, "-t", threads, "-tb", threads, "-fa", "on"]
            command += ["-np", str(self.slots), "-c", str(self.slots * self.context)]
            command += [] if self.caching else ["--cache-ram", "0", "--slot-prompt-similarity", "0"]
        return [*command, *self.options]


class Running:
    """A server that has answered, and stands still outside of `awake`."""

    def __init__(self, server: Server, log: Path) -> None:
        """Return when it answers. Raises PeerError, with the last line of what it said."""
        port = free_port()
        self.server = server
        self.url = f"http://127.0.0.1:{port}"
        began = time.monotonic()
        settings = {"threads": server.threads}
        surroundings = environment(Candidate(server.engine, server.weights, server.program, server.model, settings))
        self._group = Group(server.command(port), log, surroundings, answers=False)
        try:
            while not self._answers():
                if self._group.process.poll() is not None:
                    raise self._group.fail(f"ended with status {self._group.process.returncode}")
                if time.monotonic() - began > _START_SECONDS:
                    raise PeerError(f"did not answer in {_START_SECONDS:.0f} seconds")
                time.sleep(_LOOK_SECONDS)
        except BaseException:
            self._group.close()
            raise
        self.start_seconds = time.monotonic() - began
        self._group.signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        self._group.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._group.signal(signal.SIGSTOP)

    def close(self) -> None:
        self._group.close()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return int(answer.status) == 200
        except (OSError, urllib.error.URLError):
            return False


def fastserve(name: str, weights: Weights, model: str, slots: int, context: int, threads: int, *options: str) -> Server:
    return Server(name, "fastserve", weights, sys.executable, model, slots, context, threads, options)
