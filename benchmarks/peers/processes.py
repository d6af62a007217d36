"""Engines in processes that stand still while another is measured."""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

WORKER = Path(__file__).with_name("worker.py")
_START_SECONDS = 900.0  # vLLM compiles for minutes
_ANSWER_SECONDS = 900.0
_STOP_SECONDS = 10.0


class PeerError(Exception):
    """An engine that did not start, or failed; the message is one line."""


@dataclass(frozen=True)
class Measure:
    """What is measured: the prefill of one prompt, or decodes of a batch, in tokens a second."""

    name: str
    batch: int
    length: int  # of the prompts
    tokens: int  # decoded of each after the first; 0: prefill


@dataclass(frozen=True, eq=False)
class Candidate:
    """An engine, and the model in the format it reads."""

    engine: str
    weights: str  # the group that is compared
    program: str  # its Python, or its binary
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # threads, vocab_size, work, …
    options: Mapping[str, Any] = field(default_factory=dict)  # the engine's own

    @property
    def label(self) -> str:
        return f"{self.engine} {self.weights}"


class Peer(Protocol):
    version: str

    def sample(self, measure: Measure, seed: int) -> float | None:
        """Tokens a second, None where it cannot tell. Raises PeerError."""

    def close(self) -> None: ...


def start(candidate: Candidate, log: Path) -> Peer:
    """Raises PeerError, with the last line of what it said, for an engine that does not start."""
    return LlamaBench(candidate) if candidate.engine == "llama-bench" else Worker(candidate, log)


class Group:
    """A process and all it starts, stopped and continued together. What it says goes to a file."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], *, answers: bool = True
    ) -> None:
        """`answers`: its standard output is read by us; else it goes to the file, too."""
        self._log = log
        try:
            with log.open("wb") as said:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if answers else said,
                    stderr=said,
                    env={**os.environ, **environment},
                    start_new_session=True,
                )
        except OSError as error:
            raise PeerError(f"{command[0]}: {error.strerror}") from error

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self.process.pid, number)

    def fail(self, what: str) -> PeerError:
        """What went wrong, with the last line it said."""
        lines = [line.strip() for line in self._log.read_text("utf-8", "replace").splitlines() if line.strip()]
        return PeerError(lines[-1] if lines else what)

    def close(self) -> None:
        self.signal(signal.SIGCONT)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_SECONDS)
        self.signal(signal.SIGKILL)
        self.process.wait()


class Worker:
    """An engine behind worker.py."""

    def __init__(self, candidate: Candidate, log: Path) -> None:
        settings = {**candidate.settings, "engine": candidate.engine, "weights": candidate.weights}
        settings |= {"model": candidate.model, "options": dict(candidate.options)}
        program, self._groups = candidate.program, list[Group]()
        try:
            if candidate.engine == "llama-server":
                settings["url"], server = _llama_server(candidate, log.with_suffix(".server.log"))
                self._groups.append(server)
                program = str(candidate.settings["python"])
            command = [program, str(WORKER), json.dumps(settings)]
            self._groups.append(Group(command, log, environment(candidate)))
            self.version = str(self._answer(_START_SECONDS)["version"])
            self._ask(1, 16, 2, 0)
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def sample(self, measure: Measure, seed: int) -> float | None:
        self._signal(signal.SIGCONT)
        try:
            self._ask(1, 16, 1, seed + 2)  # threads wake up
            first = self._ask(measure.batch, measure.length, 1, seed)
            if measure.tokens == 0:
                return measure.batch * measure.length / first
            rest = self._ask(measure.batch, measure.length, 1 + measure.tokens, seed + 1) - first
            # Where prefill wavers by more than the decodes take, there is no telling.
            return measure.batch * measure.tokens / rest if rest > 0 else None
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        for group in reversed(self._groups):
            group.close()

    def _signal(self, number: int) -> None:
        for group in self._groups:
            group.signal(number)

    def _ask(self, batch: int, length: int, tokens: int, seed: int) -> float:
        stdin = self._groups[-1].process.stdin
        assert stdin is not None
        request = {"batch": batch, "length": length, "tokens": tokens, "seed": seed}
        with contextlib.suppress(BrokenPipeError):  # told by _answer
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        return float(self._answer(_ANSWER_SECONDS)["seconds"])

    def _answer(self, seconds: float) -> dict[str, Any]:
        worker = self._groups[-1]
        stdout = worker.process.stdout
        assert stdout is not None
        deadline = time.monotonic() + seconds
        while not select.select([stdout], [], [], 0.2)[0]:
            for group in self._groups:  # a server may end, and its client wait for ever
                if group.process.poll() is not None:
                    raise group.fail(f"ended with status {group.process.returncode}")
            if time.monotonic() > deadline:
                raise PeerError(f"gave no answer in {seconds:.0f} seconds")
        line = stdout.readline()
        if not line:
            raise worker.fail(f"ended with status {worker.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class LlamaBench:
    """llama-bench for prefill, and llama-batched-bench beside it for decodes: a process for each sample.

    They draw their own prompts, and sample nothing.
    """

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        self._program = Path(candidate.program)
        self.version = "unknown"
        self._run(Measure("", 1, 16, 0))

    def sample(self, measure: Measure, seed: int) -> float | None:
        return self._run(measure)

    def close(self) -> None:
        pass

    def _run(self, measure: Measure) -> float | None:
        threads = str(self._candidate.settings["threads"])
        if measure.tokens == 0:
            lengths = ["-p", str(measure.length), "-n", "0", "-r", "1", "-o", "json"]
            said = self._call(self._program, ["-t", threads, "-fa", "1", *lengths])
            try:
                (result,) = json.loads(said)
                if result["build_commit"] != "unknown":  # built outside of its repository
                    self.version = f"{result['build_number']} ({result['build_commit']})"
                return float(result["avg_ts"])
            except (ValueError, KeyError, TypeError) as error:
                raise PeerError(f"{self._program.name} printed no result that is known here") from error
        batched = self._program.with_name(self._program.name.replace("llama-bench", "llama-batched-bench"))
        if not batched.is_file():
            return None
        context = measure.batch * (measure.length + measure.tokens)
        counts = ["-npp", str(measure.length), "-ntg", str(measure.tokens), "-npl", str(measure.batch)]
        arguments = ["-t", threads, "-fa", "on", "-c", str(context), *counts, "--output-format", "jsonl"]
        lines = [line for line in self._call(batched, arguments).splitlines() if line.startswith("{")]
        try:
            return float(json.loads(lines[-1])["speed_tg"])
        except (ValueError, KeyError, IndexError) as error:
            raise PeerError(f"{batched.name} printed no result that is known here") from error

    def _call(self, program: Path, arguments: list[str]) -> str:
        command = [str(program), "-m", self._candidate.model, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, errors="replace")
        except OSError as error:
            raise PeerError(f"{program}: {error.strerror}") from error
        except subprocess.TimeoutExpired:
            raise PeerError(f"{program.name} took longer than {_ANSWER_SECONDS:.0f} seconds") from None
        if done.returncode != 0:
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise PeerError(said[-1] if said else f"{program.name} ended with status {done.returncode}")
        return done.stdout


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _llama_server(candidate: Candidate, log: Path) -> tuple[str, Group]:
    port = free_port()
    slots, threads = candidate.settings["max_num_seqs"], str(candidate.settings["threads"])
    context = slots * candidate.settings["max_model_len"]
    command = [candidate.program, "-m", candidate.model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["-t", threads, "-tb", threads, "-fa", "on", "-np", str(slots), "-c", str(context), "--cache-ram", "0"]
    return f"http://127.0.0.1:{port}", Group(command, log, {})


def environment(candidate: Candidate) -> dict[str, str]:
    """What an engine wants to find in its environment."""
    threads = int(candidate.settings["threads"])
    common = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if candidate.engine != "vllm":
        return common
    cores = sorted(os.sched_getaffinity(0))[:threads]
    preload = [name] if (name := ctypes.util.find_library("tcmalloc_minimal")) else []
    openmp = Path(candidate.program).absolute().parent.parent / "lib" / "libiomp5.so"
    preload += [str(openmp)] if openmp.is_file() else []
    return {
        **common,
        "LD_PRELOAD": ":".join(preload),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
