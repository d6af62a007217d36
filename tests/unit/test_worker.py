"""The engine's end of the socket, on the toy: what it says to what it is told."""

from __future__ import annotations

import inspect
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import toy_llm
import zmq
from toy import VOCAB, expected_output
from toy_llm import CONTEXT, COST, ToyWorld

from fastserve import LLM, worker
from fastserve.engine_options import EngineOptions
from fastserve.ipc import (
    SERVER_PID,
    Abort,
    Add,
    Failed,
    FromEngine,
    Here,
    Jobs,
    ListJobs,
    Ready,
    Refused,
    Status,
    Step,
    Stop,
    ToEngine,
    Update,
)
from fastserve.types import InvalidRequest, SamplingParams, StepResult

PATIENCE = 30_000  # milliseconds; only a failing test waits so long
Kind = TypeVar("Kind")

decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class Server:
    """The other end, and a worker on a thread of its own."""

    def __init__(self, world: ToyWorld, folder: Path, **options: Any) -> None:
        self.world = world
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        address = f"ipc://{folder}/engine"
        self._socket.bind(address)
        self.code: int | None = None
        self.heard: list[FromEngine] = []
        COST.save(folder / "cost.json")
        memory = {"kv_cache_memory": "1M", "swap_space": 0, "cost": str(folder / "cost.json")}
        given = msgspec.json.encode({"model": "toy", **memory, **options}).decode()
        self._thread = threading.Thread(target=self._run, args=(address, given))
        self._thread.start()

    def _run(self, address: str, options: str) -> None:
        with worker.connect(self._context, address) as socket:
            self.code = worker.run(socket, options)

    def tell(self, message: ToEngine) -> None:
        self._socket.send(msgspec.msgpack.encode(message))

    def hear(self, kind: type[Kind] = object) -> Kind:  # type: ignore[assignment]
        """The next message of a kind."""
        while True:
            if not self._socket.poll(PATIENCE):
                raise AssertionError(f"silent; the last was {self.heard[-1:]}")
            message = decoder.decode(self._socket.recv())
            self.heard.append(message)
            if isinstance(message, kind):
                return message

    def follow(self, *keys: int) -> dict[int, list[Update]]:
        """What is said of these jobs until all have ended."""
        said: dict[int, list[Update]] = {key: [] for key in keys}
        while not all(updates and updates[-1].finish_reason for updates in said.values()):
            for update in self.hear(Step).updates:
                if update.key in said:
                    said[update.key].append(update)
        return said

    def ended(self) -> int | None:
        self._thread.join(PATIENCE / 1000)
        assert not self._thread.is_alive()
        return self.code

    def close(self) -> None:
        if self._thread.is_alive():
            self.tell(Stop())
        self.ended()
        self._socket.close(linger=0)
        self._context.term()


def stand_still(monkeypatch: pytest.MonkeyPatch, messages: int) -> None:
    """Have the worker stop after three iterations until so many messages have come, however slow their sender is."""
    begin, step, steps, come = worker.Worker.__init__, worker.Worker._step, [0], [0]

    def counting(self: worker.Worker, *given: Any) -> None:
        begin(self, *given)
        decode = self._decode

        def count(message: bytes) -> ToEngine:
            come[0] += 1
            return decode(message)

        self._decode = count

    def slow(self: worker.Worker) -> None:
        if steps[0] >= 3 and come[0] < messages:
            self._socket.poll(PATIENCE)
        else:
            steps[0] += 1
            step(self)

    monkeypatch.setattr(worker.Worker, "__init__", counting)
    monkeypatch.setattr(worker.Worker, "_step", slow)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    return toy_llm.enter(monkeypatch)


@pytest.fixture
def start(world: ToyWorld, tmp_path: Path) -> Iterator[Any]:
    servers: list[Server] = []

    def begin(**options: Any) -> Server:
        servers.append(Server(world, tmp_path, **options))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


def add(key: int, prompt: list[int], output: list[int] | None = None, seed: int = 7, **params: Any) -> Add:
    sampling = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **params})
    return Add(key, prompt, sampling, seed, 0, 0.0, output or [])


def expected(message: Add) -> list[int]:
    return expected_output(message.prompt, message.params, message.seed, CONTEXT)


def tokens(updates: list[Update]) -> list[int | None]:
    return [update.token for update in updates]


# --- a life -----------------------------------------------------------------------------------------------------------


def test_from_ready_to_stop(start: Any) -> None:
    server = start()
    assert server.hear() == Here(os.getpid())
    ready = server.hear(Ready)
    assert ready == Ready([os.getpid()], ready.info, VOCAB, CONTEXT)
    assert ready.info["model"] == "toy" and ready.info["stall_limit"] == 1.5, "tokens are streamed"
    status = server.hear(Status)
    assert (status.live, status.running, status.backlog, status.device_blocks_used) == (0, 0, 0.0, 0)
    server.tell(Stop())
    assert server.ended() == 0


def test_all_updates_of_an_iteration_come_in_one_step(start: Any) -> None:
    server = start()
    adds = [add(key, [key] * 5, seed=key) for key in range(6)]
    for message in adds:
        server.tell(message)
    said = server.follow(*range(6))
    for message in adds:
        updates = said[message.key]
        assert tokens(updates) == expected(message)
        assert [update.finish_reason for update in updates] == [None] * 7 + ["length"]
        assert [update.metrics is not None for update in updates] == [False] * 7 + [True]
    steps = [message for message in server.heard if isinstance(message, Step) and message.updates]
    assert max(len(step.updates) for step in steps) == 6
    assert all(len({update.key for update in step.updates}) == len(step.updates) for step in steps)


def test_what_was_found_in_the_cache_is_told_with_the_first_token_and_outlasts_the_engine(start: Any) -> None:
    server = start()
    for key in (1, 2):
        server.tell(message := add(key, [5] * 40))
        (updates,) = server.follow(key).values()
        assert [update.cached_tokens for update in updates] == [32 * (key == 2), *[0] * 7]
    server.tell(Add(3, [5] * 40, message.params, 7, 0, 0.0, expected(message)[:3], cached_tokens=16))
    (updates,) = server.follow(3).values()
    assert [update.cached_tokens for update in updates] == [0] * 5
    assert updates[-1].metrics is not None and updates[-1].metrics.cached_tokens == 16


def test_logprobs_and_stop_tokens(start: Any) -> None:
    server = start()
    first = expected(add(1, [5, 6], ignore_eos=False, max_tokens=60))
    message = add(1, [5, 6], max_tokens=60, ignore_eos=False, logprobs=2, stop_token_ids=[first[3]])
    server.tell(message)
    (updates,) = server.follow(1).values()
    assert tokens(updates) == expected(message) and updates[-1].finish_reason == "stop"
    for update in updates:
        assert update.logprobs is not None and update.logprobs.token == update.token
        assert update.logprobs.logprob == -float(update.token or 0) and len(update.logprobs.top) == 2


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_a_job_that_a_lost_engine_had_begun_goes_on(start: Any, cut: int) -> None:
    server = start()
    whole = expected(add(1, [5, 6]))
    server.tell(add(1, [5, 6], output=whole[:cut]))
    (updates,) = server.follow(1).values()
    assert tokens(updates) == whole[cut:]


def test_what_the_engine_does_not_take_is_refused_and_the_rest_goes_on(start: Any) -> None:
    server = start()
    server.tell(add(1, [5, 6]))
    for key, message in ((2, add(2, [])), (3, add(3, [VOCAB])), (4, add(4, [5, 6], output=[1] * 8))):
        server.tell(message)
        assert server.hear(Refused).key == key
    refusals = [message for message in server.heard if isinstance(message, Refused)]
    assert refusals[0] == Refused(2, "prompt", "must hold at least one token")
    assert [refusal.field for refusal in refusals] == ["prompt", "prompt", "output"]
    said = [u for m in server.heard if isinstance(m, Step) for u in m.updates]
    if not said or said[-1].finish_reason is None:
        said += server.follow(1)[1]
    assert tokens(said) == expected(add(1, [5, 6]))


def test_an_error_of_one_job_is_told(start: Any, world: ToyWorld) -> None:
    def no_token(result: StepResult) -> dict[int, str]:
        return {0: "logits are not finite"}

    world.no_token = no_token
    server = start()
    server.tell(add(1, [5]))
    (update,) = server.follow(1)[1]
    assert (update.token, update.finish_reason, update.error) == (None, "error", "logits are not finite")


# --- aborts -----------------------------------------------------------------------------------------------------------


def test_an_aborted_job_is_gone_and_nobody_else(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_still(monkeypatch, messages=4)
    server = start()
    for key in (1, 2):
        server.tell(add(key, [key], max_tokens=200))
    server.hear(Step)
    server.tell(Abort([1, 99], False))
    server.tell(ListJobs(5))
    jobs = server.hear(Jobs)
    assert jobs.query == 5 and [job.key for job in jobs.jobs] == [2]
    del server.heard[:]
    server.follow(2)
    assert not any(u.key == 1 and u.finish_reason for m in server.heard if isinstance(m, Step) for u in m.updates)
    server.tell(Abort([1, 2], True))  # ended both, and nothing comes of it
    server.tell(ListJobs(6))
    assert server.hear(Jobs) == Jobs(6, [])
    status = server.hear(Status)
    assert (status.live, status.device_blocks_used) == (0, 0)


def test_a_job_of_a_lost_engine_has_waited_since_its_last_token(start: Any) -> None:
    server = start(policy="fcfs", max_num_seqs=1)
    late = add(2, [2], [3], max_tokens=200)
    late.waiting_since = time.monotonic() - 50.0
    for message in (add(1, [1], max_tokens=200), late, ListJobs(1)):
        server.tell(message)
    status = next(job for job in server.hear(Jobs).jobs if job.key == 2)
    assert not status.running and 50.0 <= status.waiting < 50.0 + PATIENCE / 1000


def test_a_stopped_job_counts_as_complete(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(worker.Monitor, "ended", lambda self, job: lengths.append(len(job.output)))
    stand_still(monkeypatch, messages=2)
    server = start()
    server.tell(add(1, [1], max_tokens=200))
    server.hear(Step)
    server.tell(Abort([1], True))
    last = server.follow(1)[1][-1]
    assert (last.token, last.finish_reason) == (None, "stop") and last.metrics is not None
    assert last.metrics.jct is not None and len(lengths) == 1


# --- failures ---------------------------------------------------------------------------------------------------------


def test_an_engine_that_cannot_go_on_says_why(start: Any, world: ToyWorld, capfd: pytest.CaptureFixture[str]) -> None:
    world.fail_at = 3
    server = start()
    server.tell(add(1, [1], max_tokens=200))
    failed = server.hear(Failed)
    assert failed == Failed("RuntimeError: the device is gone", None) and server.ended() == 1
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "failed"),
    [
        ({"max_num_seqs": 0}, Failed("must be at least 1, got 0", "max_num_seqs")),
        ({"policy": "best"}, Failed("must be one of fcfs, mlfq, skip-join-mlfq, gittins; got 'best'", "policy")),
        ({"cost": "/nowhere"}, None),
        ({"beam_width": 3}, None),
    ],
)
@pytest.mark.parametrize("by_hand", [False, True])
def test_an_engine_that_cannot_start_says_why(
    start: Any,
    options: dict[str, Any],
    failed: Failed | None,
    by_hand: bool,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To its server; by hand, it says so to whoever looks at it, too."""
    if not by_hand:
        monkeypatch.setenv(SERVER_PID, str(os.getpid()))
    server = start(**options)
    said = server.hear(Failed)
    assert said.field == next(iter(options)) and "\n" not in said.message
    assert failed is None or said == failed
    assert server.ended() == 2 and capfd.readouterr().err.count("\n") == by_hand


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_are_those_of_llm() -> None:
    known = inspect.signature(LLM.__init__).parameters
    defaults = {name: known[name].default for name in known if name not in ("self", "model")}
    # The API server draws seeds and has the tokenizer, and each of its engines is one.
    of_others = {"seed", "data_parallel_size", "skip_tokenizer", "tokenizer", "on_iteration"}
    options = EngineOptions(model="m")
    assert {name: getattr(options, name) for name in defaults.keys() - of_others} == {
        name: value for name, value in defaults.items() if name not in of_others
    }
    assert set(EngineOptions.__struct_fields__) == {"model", "stages", "host_share", "engine", *defaults} - of_others
    assert EngineOptions.from_json(options.to_json()) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "options: must be a JSON object"),
        ("[]", "options: must be a JSON object of LLM's options, got \\[\\]"),
        ("{}", "model: must be given"),
        ('{"model": "m", "seed": 3}', "seed: is no option of the engine's process, which has model, policy"),
    ],
)
def test_bad_options(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        EngineOptions.from_json(text)
