"""LLM: prompts in, answers out, in the calling thread."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from types import FrameType
from typing import Any, cast

from .calibration import Calibration
from .cost import CostModel
from .distributed import GroupError
from .origin import checked_origin
from .outputs import LiveRequest, RequestOutput
from .requests import Message, Prompt, Request
from .serving import EngineError, ServingCore
from .types import InvalidRequest, SamplingParams

# Waits are cut to this many seconds, so that Ctrl-C is heard while the runtime works.
_PATIENCE = 0.25
_LATEST_ARRIVAL = 1e7  # seconds of a replay: four months, and within what the system can sleep


class LLM(ServingCore):
    """A model and an engine that runs while one of these methods does. A context manager; not thread-safe.

    >>> llm = LLM("smollm2")
    >>> llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text
    """

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
        program_id: str | Sequence[str | None] | None = None,
        cache_salt: str | Sequence[str] = "",
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer every prompt; outputs come in the order of the prompts.

        A prompt is text or a list of token ids; both may be mixed. All else is for all prompts or one for each:
        `sampling_params`; `priority` (lower goes first among a tenant's, whatever the policy says); `tenant`, for whom
        it is: tenants get equal shares of the device, or those of `tenant_weights`; `program_id`, the program of
        several calls, one after the other, that it is a call of; `cache_salt`: only prompts of one tenant and one salt
        find in the cache what they have in common. Raises InvalidRequest, naming the parameter and the prompt, before
        any of them starts.
        """
        origins = (tenant, program_id, cache_salt)
        return self._answer(self._requests(prompts, sampling_params, priority, origins), progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
        program_id: str | Sequence[str | None] | None = None,
        cache_salt: str | Sequence[str] = "",
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Continue one conversation, or each of several: lists of {"role": …, "content": …}; else as `generate`."""
        given: Any = messages
        several = isinstance(given, (list, tuple)) and bool(given) and isinstance(given[0], (list, tuple))
        conversations = cast(Sequence[Sequence[Message]], messages if several else [messages])
        params = _one_each(sampling_params, len(conversations))
        more = _more(len(conversations), priority, tenant, program_id, cache_salt)
        requests = []
        for i, (conversation, each, rest) in enumerate(zip(conversations, params, more, strict=True)):
            with _naming(i, len(conversations)):
                requests.append(self._chat_request(conversation, each, **_told(*rest)))
        return self._answer(requests, progress)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
        program_id: str | Sequence[str | None] | None = None,
        cache_salt: str | Sequence[str] = "",
    ) -> Generator[RequestOutput, None, None]:
        """Like generate, but yields a request's answers so far whenever they grow; the last of each is `finished`.

        Prompts are checked at once. Leaving the iterator early (closing it, an exception) aborts what is unfinished.
        """
        origins = (tenant, program_id, cache_salt)
        return self._stream(self._requests(prompts, sampling_params, priority, origins))

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        program_id: str | None = None,
        cache_salt: str = "",
    ) -> Generator[RequestOutput, None, None]:
        """Like stream, for the next message of a conversation."""
        (params,) = _one_each(sampling_params, 1)
        origin = checked_origin(tenant, program_id, cache_salt)
        return self._stream([self._chat_request(messages, params, priority=priority, origin=origin)])

    def replay(
        self,
        requests: Sequence[tuple[float, Prompt, SamplingParams]],
        on_update: Callable[[RequestOutput], None] | None = None,
        *,
        request_ids: Sequence[str] | None = None,
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
        program_id: str | Sequence[str | None] | None = None,
        cache_salt: str | Sequence[str] = "",
    ) -> list[RequestOutput]:
        """Answer requests that arrive over time: (seconds after the start, prompt, parameters), in any order.

        An open loop: a request enters the engine when its time has come, however much work is left of others, and its
        metrics count from that time. `on_update` sees each request whenever it grows. Outputs come in the order given.
        Raises InvalidRequest, naming the parameter and the request, before the first arrival.
        """
        if request_ids is not None and len(request_ids) != len(requests):
            raise InvalidRequest("request_ids", f"must be one for each of {len(requests)}, got {len(request_ids)}")
        more = _more(len(requests), priority, tenant, program_id, cache_salt)
        made = []
        for i, ((offset, prompt, params), rest) in enumerate(zip(requests, more, strict=True)):
            with _naming(i, len(requests)):
                _check_offset(offset)
                name = request_ids[i] if request_ids else None
                made.append(self._request(prompt, params, request_id=name, **_told(*rest)))
        self._check(made)
        start = self._clock()
        due = sorted(((start + requests[i][0], i) for i in range(len(made))), reverse=True)  # the next one is last
        outputs: dict[str, RequestOutput] = {}
        run = _Run(self)
        try:
            while due or run.unfinished:
                while due and due[-1][0] <= self._clock():
                    arrival, i = due.pop()
                    run.add(made[i], arrival)
                until_next = max(0.0, due[-1][0] - self._clock()) if due else _PATIENCE
                if not self._has_work:
                    time.sleep(until_next)
                self._step(min(until_next, _PATIENCE))
                for live in run.news():
                    output = outputs[live.request.request_id] = live.output()
                    if on_update is not None:
                        on_update(output)
        finally:
            run.abandon()
        return [outputs[request.request_id] for request in made]

    @property
    def profile_path(self) -> Path:
        """The file in which this model's cost profile on this machine is remembered, where there is one."""
        return self._measured().path

    def profile(
        self, *, full: bool = True, on_sample: Callable[[list[tuple[int, int]], float], None] | None = None
    ) -> CostModel:
        """Measure how long iterations take here, by running some: up to thirty seconds if `full`, else 0.6.

        For a new LLM: raises EngineError once it has served a request. `on_sample` sees the rows (start, tokens) and
        the seconds of each iteration.
        """
        if self._intake.made > 0:
            raise EngineError("profiling takes an engine that has served no request")
        return self._measured().measure(full=full, on_sample=on_sample)

    def _measured(self) -> Calibration:
        self._need_engine()
        assert self._calibration is not None  # goes with the engine
        return self._calibration

    def _step(self, timeout: float | None = None) -> None:
        with _uninterrupted():
            super()._step(timeout)

    def _requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int],
        origins: tuple[Any, Any, Any],
    ) -> list[Request]:
        prompts = _as_list(prompts)
        params, more = _one_each(sampling_params, len(prompts)), _more(len(prompts), priority, *origins)
        requests = []
        for i, (prompt, each, rest) in enumerate(zip(prompts, params, more, strict=True)):
            with _naming(i, len(prompts)):
                requests.append(self._request(prompt, each, **_told(*rest)))
        return requests

    def _answer(self, requests: list[Request], progress: bool) -> list[RequestOutput]:
        run = _Run(self)
        try:
            run.add_all(requests)
            with _progress_bar(len(requests), progress) as advance:
                while run.unfinished:
                    self._step(_PATIENCE)
                    advance(sum(live.finished for live in run.news()))
            return [live.output() for live in run.requests]
        finally:
            run.abandon()

    def _stream(self, requests: list[Request]) -> Generator[RequestOutput, None, None]:
        self._check(requests)
        return self._outputs(requests)

    def _outputs(self, requests: list[Request]) -> Generator[RequestOutput, None, None]:
        run = _Run(self)
        try:
            run.add_all(requests)
            while True:
                if news := run.news():
                    yield from (live.output() for live in news)
                elif run.unfinished:
                    self._step(_PATIENCE)
                else:
                    return
        finally:
            run.abandon()

    def _check(self, requests: Sequence[Request]) -> None:
        """Raise what adding them would raise: they are added, and taken back before any of them starts."""
        run = _Run(self)
        try:
            run.add_all(requests)
        finally:
            run.abandon()


class _Run:
    """The requests of one call, and which of them have news. Several calls may share the engine (two streams)."""

    def __init__(self, llm: LLM) -> None:
        self.requests: list[LiveRequest] = []
        self.unfinished = 0
        self._llm = llm
        self._news: dict[str, LiveRequest] = {}

    def add(self, request: Request, arrival: float | None = None) -> None:
        with _uninterrupted():
            self.requests.append(self._llm._add(request, self._hear, arrival))
            self.unfinished += 1

    def add_all(self, requests: Sequence[Request]) -> None:
        """As having arrived together. Raises InvalidRequest, telling which request it is about."""
        arrival = self._llm._clock()
        for i, request in enumerate(requests):
            with _naming(i, len(requests)):
                self.add(request, arrival)

    def news(self) -> list[LiveRequest]:
        """The requests that grew or finished since this was last asked."""
        news = list(self._news.values())
        self._news.clear()
        return news

    def abandon(self) -> None:
        """Whatever happened, leave nothing in the engine."""
        if self._llm._inherited:  # nothing runs in a fork, and its requests are still the other process's
            return
        with _uninterrupted(), contextlib.suppress(GroupError):  # a group that has ended holds nothing
            for live in self.requests:
                if not live.finished:
                    self._llm._abort(live.request.request_id)

    def _hear(self, live: LiveRequest) -> None:
        self._news[live.request.request_id] = live
        self.unfinished -= live.finished


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C within is raised at the end. In the middle, it would lose an iteration's result and with it the engine."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught:
        handler(*caught[0])


def _as_list(prompts: Any) -> Sequence[Prompt]:
    """One text or one list of token ids is one prompt; anything else is a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    # An array is as good as a list.
    listed = isinstance(prompts, Sequence) or getattr(prompts, "ndim", 0) > 0
    if not listed or isinstance(prompts, (bytes, bytearray)):
        raise InvalidRequest("prompts", f"must be text, a list of token ids or a list of those, got {prompts!r:.80}")
    if len(prompts) and all(hasattr(item, "__index__") for item in prompts):
        return [cast(Sequence[int], prompts)]
    return cast(Sequence[Prompt], prompts)


def _one_each(params: Any, count: int) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
        raise InvalidRequest("sampling_params", f"must be SamplingParams or a list of them, got {params!r:.80}")
    if len(params) != count:
        raise InvalidRequest("sampling_params", f"must be one for all or one for each of {count}, got {len(params)}")
    return params


def _more(count: int, priority: Any, tenant: Any, program_id: Any, cache_salt: Any) -> list[tuple[Any, ...]]:
    """What else is said of each of several prompts, for `_told`."""
    each = [
        _spread("priority", priority, "an integer", count),
        _spread("tenant", tenant, "a string", count),
        _spread("program_id", program_id, "a string", count),
        _spread("cache_salt", cache_salt, "a string", count),
    ]
    return list(zip(*each, strict=True))


def _told(priority: Any, *origin: Any) -> dict[str, Any]:
    """As a request takes it; what it is, is checked here or there."""
    return {"priority": priority, "origin": checked_origin(*origin)}


def _spread(field: str, given: Any, one: str, count: int) -> Sequence[Any]:
    """One for each prompt."""
    several = isinstance(given, Sequence) or bool(getattr(given, "ndim", 0))
    if not several or (isinstance(given, str) and field != "priority"):
        return [given] * count
    if isinstance(given, str) or len(given) != count:
        raise InvalidRequest(field, f"must be {one}, or one for each of {count}, got {given!r:.80}")
    return cast(Sequence[Any], given)


def _check_offset(seconds: Any) -> None:
    number = isinstance(seconds, Real) and not isinstance(seconds, bool)
    if not (number and 0 <= seconds <= _LATEST_ARRIVAL):
        raise InvalidRequest("arrival", f"must be 0 to {_LATEST_ARRIVAL:.0f} seconds after the start, got {seconds!r}")


@contextmanager
def _naming(index: int, count: int) -> Iterator[None]:
    """Tell which of several requests an error is about."""
    try:
        yield
    except InvalidRequest as error:
        if count == 1:
            raise
        message = str(error).removeprefix(f"{error.field}: ")
        raise InvalidRequest(error.field, f"{message} (request {index + 1} of {count})", index) from None


@contextmanager
def _progress_bar(count: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar of finished requests on standard error; yields what advances it."""
    if not show:
        yield lambda finished: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("requests", total=count)
        yield lambda finished: bar.advance(task, finished)
