"""The engine's process: `python -m fastserve.worker --address ipc://… --options '{"model": "smollm2"}'`.

The API server starts it, binds the socket that it connects to, and keeps the truth of every job, so that this process
may end at any time, in any way (ipc.py has the messages). Exit codes: 0 when told to stop, when the API server is gone,
or by SIGTERM where no API server started it; 2 when the engine cannot start, and 1 when it cannot go on, both after a
Failed.

An engine of several ranks is as many processes, all with this command: `mpiexec -n 4 python -m fastserve.worker …`, or
rank 0 alone, which starts the others on this host. Rank 0 serves the socket; the others work for it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Final

import msgspec
import zmq

from .assembly import Assembly, assemble
from .distributed import Grid, GroupError, launched
from .engine import Engine
from .engine_options import EngineOptions, worker_command
from .ipc import SERVER_PID, Abort, Add, Failed, FromEngine, Here, ListJobs, Ready, Refused, Step, ToEngine, Update
from .loaders.spec import ModelError
from .monitor import Monitor
from .placement import ended_by_others, report
from .types import BatchPlan, Executor, FinishReason, InvalidRequest, Job, StepResult

Socket = zmq.Socket[bytes]

_CANNOT_START: Final = 2
_CANNOT_GO_ON: Final = 1

# Seconds between two Statuses, with work and without.
_WORKING, _IDLE = 0.25, 1.0
# What Statuses may take of the loop's time: with a hundred thousand jobs one takes a tenth of a second.
_STATUS_SHARE: Final = 0.02

# Seconds for which the loop waits for an iteration at most, so that messages and signals are heard during a long one.
_PATIENCE: Final = 0.25

# Messages read between two iterations, and seconds for doing what they say: what a burst takes, those who stream would
# have to wait for, and the heartbeat.
_BURST: Final = 128
_TURN: Final = 0.05

_LINGER: Final = 1000  # milliseconds for the last message to get out


class Worker:
    """Serves one engine on a socket until it is told to stop. Everything happens on the thread that calls `serve`.

    While there is work it waits for iterations and looks at the socket between them; without, it waits for messages.
    """

    def __init__(self, socket: Socket, assembly: Assembly, clock: Callable[[], float] = time.monotonic) -> None:
        self._socket = socket
        self._spec, self._info = assembly.spec, assembly.info
        self._placement = assembly.placement
        members = assembly.placement.members
        self._processes = [each["process"] for each in members if each["host"] == members[0]["host"]] or [os.getpid()]
        # Other ranks may end while this one waits for messages.
        self._idle_patience = _PATIENCE if members else math.inf
        self._clock = clock
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode: Callable[[bytes], ToEngine] = msgspec.msgpack.Decoder(ToEngine).decode
        self._inbox: deque[ToEngine] = deque()  # messages read and not done yet
        self._running: dict[Job, None] = {}  # those in plans under way, as told
        self._last_beat = -math.inf
        self._beat_seconds = 0.0  # that the last one took
        self._results_told = -1
        block_bytes = self._info["kv_cache_bytes"] // self._info["num_blocks"]
        self._monitor = Monitor(assembly.scheduling, assembly.cost, block_bytes=block_bytes)
        self._engine = Engine(
            assembly.scheduling,
            _Announcing(assembly.runtime, self._submitting),
            assembly.cost,
            link=assembly.link,
            clock=clock,
            on_iteration=self._monitor.on_iteration,
        )

    def serve(self) -> None:
        """Return when told to stop. Lets through what the runtime raises."""
        config = self._engine.config
        self._tell(Ready(self._processes, self._info, self._spec.vocab_size, config.max_model_len))
        while self._receive():
            if self._engine.has_work:
                self._step()
            self._beat()

    def close(self) -> None:
        """Free the model, when what its threads are doing is done, and let other ranks go."""
        self._placement.close()
        del self._engine

    # --- messages in -------------------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Do what has been asked for; False: stop. Without work, wait for it until the next heartbeat is due."""
        if not self._engine.has_work and not self._inbox:
            wait = max(0.0, self._beat_due - self._clock())
            self._socket.poll(math.ceil(1000 * min(wait, self._idle_patience)))
            self._placement.check()
        while len(self._inbox) < _BURST and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._inbox.append(self._decode(self._socket.recv()))
        # Nobody wants to hear of what is withdrawn already: it is not even added.
        aborts = (message for message in self._inbox if isinstance(message, Abort) and not message.stopped)
        withdrawn = {key for abort in aborts for key in abort.keys}
        end = self._clock() + _TURN
        while self._inbox and self._clock() < end:
            message = self._inbox.popleft()
            if isinstance(message, Add):
                if message.key not in withdrawn:
                    self._add(message)
            elif isinstance(message, Abort):
                self._abort(message)
            elif isinstance(message, ListJobs):
                self._tell(self._monitor.jobs(self._engine, message.query, self._clock()))
            else:
                return False
        return True

    def _add(self, add: Add) -> None:
        try:
            job = self._engine.add_job(
                str(add.key),
                add.prompt,
                add.params,
                seed=add.seed,
                vocab_size=self._spec.vocab_size,
                eos_token_ids=self._spec.eos_token_ids,
                priority=add.priority,
                tenant=add.tenant,
                program=add.program,
                cache_salt=add.cache_salt,
                arrival=add.arrival,
                output=add.output,
                waiting_since=add.waiting_since,
                inherited=add.inherited,
                cached_tokens=add.cached_tokens,
            )
        except InvalidRequest as error:
            self._tell(Refused(add.key, error.field, _message(error)))
        else:
            self._monitor.added(job)

    def _abort(self, abort: Abort) -> None:
        """Those that a stop string ended were of use: they get their last update, and count as complete."""
        reason = FinishReason.STOP if abort.stopped else FinishReason.ABORT
        live = self._engine.scheduler.jobs
        ended = [job for key in abort.keys if (job := live.get(str(key))) is not None]
        for job in ended:
            self._engine.abort(job.job_id, reason)
        if not abort.stopped:
            for job in ended:
                self._monitor.ended(job)
        elif ended:
            self._tell(Step([self._update(job, None) for job in ended], None))

    # --- messages out ------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """One iteration, or part of a long one."""
        updates = self._engine.step(_PATIENCE)
        if updates:
            self._tell(Step([self._update(job, token) for job, token in updates], None))
        if not self._engine.has_work:
            self._announce()

    def _update(self, job: Job, token: int | None) -> Update:
        logprobs = job.logprobs[-1] if job.logprobs and token is not None else None
        reason = job.finish_reason
        if reason is None:
            cached = job.metrics.cached_tokens if len(job.output) == 1 else 0
            return Update(int(job.job_id), token, logprobs, None, None, None, cached)
        self._monitor.ended(job)
        return Update(int(job.job_id), token, logprobs, reason.value, job.error, job.metrics)

    def _submitting(self, plan: BatchPlan) -> None:
        self._monitor.on_submit(plan)
        self._announce()

    def _announce(self) -> None:
        """Tell who is in the plans under way, if others are than were."""
        running = {job: None for iteration in self._engine.scheduler.in_flight for job in iteration.jobs}
        if running.keys() != self._running.keys():
            self._running = running
            self._tell(Step([], [int(job.job_id) for job in running]))

    @property
    def _beat_due(self) -> float:
        interval = _WORKING if self._engine.has_work else _IDLE
        return self._last_beat + max(interval, self._beat_seconds / _STATUS_SHARE)

    def _beat(self) -> None:
        """Send a Status if it is due and, where there is work, some of it was done since the last.

        An engine that hangs is silent: it is not enough that this loop goes round.
        """
        now = self._clock()
        if now < self._beat_due or (self._engine.has_work and self._monitor.results == self._results_told):
            return
        self._results_told = self._monitor.results
        self._tell(self._monitor.status(self._engine, now))
        self._last_beat = now
        self._beat_seconds = self._clock() - now

    def _tell(self, message: FromEngine) -> None:
        """Queue a message. There is no limit to the queue, so this never waits."""
        self._socket.send(self._encode(message))


class _Announcing:
    """An Executor that has plans announced before they run: if one takes the engine down, it is known who was in it."""

    def __init__(self, executor: Executor, announce: Callable[[BatchPlan], None]) -> None:
        self._executor = executor
        self._announce = announce

    def submit(self, plan: BatchPlan) -> None:
        self._announce(plan)
        self._executor.submit(plan)

    def poll(self, timeout: float | None) -> StepResult | None:
        return self._executor.poll(timeout)


def load(options: EngineOptions, on_failure: Callable[[str], None] | None = None) -> Assembly:
    """`on_failure`: see assemble. Raises InvalidRequest, naming the option, and ModelError, naming the file."""
    return assemble(
        options.model,
        scheduler=options.scheduling(),
        runtime=options.running(),
        max_model_len=options.max_model_len,
        max_in_flight=options.max_in_flight,
        kv_cache_memory=options.kv_cache_memory,
        swap_space=options.swap_space,
        swap_bandwidth=options.swap_bandwidth,
        skip_tokenizer=True,
        cost=options.cost,
        host_share=options.host_share,
        engine=options.engine,
        stages=options.stages,
        grid=Grid(options.tensor_parallel_size, options.pipeline_parallel_size),
        rank_command=worker_command(options),
        rank_timeout=options.rank_timeout,
        on_failure=on_failure,
    )


# --- the process ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the engine's process; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastserve.worker", description="FastServe's engine process.")
    parser.add_argument("--address", help="where the API server's socket is: ipc://PATH")
    parser.add_argument(
        "--options", required=True, action="append", help="JSON object of LLM's options; repeatable, and the last holds"
    )
    given = parser.parse_args(arguments)
    here = launched()
    if given.address is None and (here is None or here.launcher != "fastserve"):
        parser.error("the following arguments are required: --address")
    if here is not None and here.rank > 0:
        return follow(here.size, *given.options)
    # Ctrl-C reaches the whole process group, systemd's SIGTERM too, and what becomes of the jobs is the API server's
    # decision: it has Stop and SIGKILL, and this process ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if _has_server() else _terminate)
    end_with(int(os.environ.get(SERVER_PID, os.getppid())))
    with zmq.Context() as context, connect(context, given.address) as socket:
        return run(socket, *given.options)


def follow(ranks: int, *options: str) -> int:
    """Work for rank 0 until it ends; returns the exit code. What goes wrong is told to the other ranks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _has_server():  # as for rank 0
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        said = EngineOptions.from_json(*options)
        Grid(said.tensor_parallel_size, said.pipeline_parallel_size).check(ranks)
        load(said)
    except SystemExit as done:
        return int(done.code or 0)
    except Exception as error:
        expected = isinstance(error, (InvalidRequest, ModelError, GroupError, OSError))
        if not expected or os.environ.get("FASTSERVE_DEBUG"):
            traceback.print_exc()
        report(error)
        return _CANNOT_START
    raise AssertionError("a rank other than 0 has an engine of its own")


def connect(context: zmq.Context[Socket], address: str) -> Socket:
    """The engine's end of the link."""
    socket = context.socket(zmq.PAIR)
    # A server that is slow to read must not look like an engine that hangs.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, _LINGER)
    socket.connect(address)
    return socket


def run(socket: Socket, *options: str) -> int:
    """Load what the options say and serve it; what goes wrong is told over the socket. Returns the exit code."""
    code, worker = _CANNOT_START, None

    def cannot_start(reason: str) -> None:
        socket.send(msgspec.msgpack.encode(Failed(reason, None)))
        socket.close(_LINGER)
        socket.context.term()  # when it has got out

    socket.send(msgspec.msgpack.encode(Here(os.getpid())))
    try:
        worker = Worker(socket, load(EngineOptions.from_json(*options), cannot_start))
        code = _CANNOT_GO_ON
        worker.serve()
        return 0
    except _TerminatedError:
        return 0
    except Exception as error:
        expected = code == _CANNOT_START and isinstance(error, (InvalidRequest, ModelError, OSError))
        expected = expected or isinstance(error, GroupError)
        if not expected or os.environ.get("FASTSERVE_DEBUG"):
            traceback.print_exc()
        if not _has_server():  # who started it by hand may look nowhere else
            report(error)
        field = error.field if isinstance(error, InvalidRequest) else None
        known = isinstance(error, (InvalidRequest, ModelError, GroupError))
        said = _message(error) if known else f"{type(error).__name__}: {error}"
        outside = isinstance(error, GroupError) and ended_by_others(error)
        socket.send(msgspec.msgpack.encode(Failed(" ".join(said.split()), field, outside)))
        return code
    finally:
        if worker is not None:
            worker.close()


def _has_server() -> bool:
    """Whether an API server has started this process, or what has started it."""
    return SERVER_PID in os.environ


class _TerminatedError(BaseException):
    """SIGTERM came. Not an Exception, so that nobody takes it for a failure of what it interrupts."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _TerminatedError


def _message(error: Exception) -> str:
    """Without the field, which goes beside it."""
    return str(error).removeprefix(f"{error.field}: ") if isinstance(error, InvalidRequest) else str(error)


def end_with(server: int) -> None:
    """End this process when that one does, whatever this one is doing then: nobody would hear of it.

    A thread waits for that, which costs nothing meanwhile and works while the model loads and while the runtime hangs.
    (The kernel's own signal for it, PR_SET_PDEATHSIG, comes when the *thread* ends that started this process.)
    """
    threading.Thread(target=_wait_for_end, args=(server,), name="fastserve-server", daemon=True).start()


def _wait_for_end(server: int) -> None:
    try:
        select.select([os.pidfd_open(server)], [], [])
    except ProcessLookupError:
        pass  # it has ended
    except (AttributeError, OSError):  # this system has no such handles
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(server, 0)
                time.sleep(_IDLE)
    if _has_server() and os.getpgrp() == os.getpid():  # the group that the server made for it, and no launcher between
        # Ranks that were started here would notice by themselves, but not one that is stopped.
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
