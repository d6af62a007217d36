"""AsyncLLM: the engine in a thread of its own, answers as asynchronous streams."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar

from .config import STREAMING_STALL_LIMIT
from .origin import checked_origin
from .outputs import LiveRequest, RequestOutput
from .requests import Message, Prompt, Request
from .serving import EngineError, ServingCore
from .types import SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Self


class _Stream:
    """The newest output of one request, on its way from the engine's thread to an event loop.

    Outputs are cumulative, so a consumer that is slow skips some and loses nothing.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._latest: RequestOutput | Exception | None = None

    def put(self, item: RequestOutput | Exception) -> None:
        """From any thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody is waiting
            self._loop.call_soon_threadsafe(self._set, item)

    async def get(self) -> RequestOutput:
        await self._changed.wait()
        self._changed.clear()
        if isinstance(self._latest, Exception):
            raise self._latest
        assert self._latest is not None  # set before the event is
        return self._latest

    def _set(self, item: RequestOutput | Exception) -> None:
        if not isinstance(self._latest, Exception):
            self._latest = item
            self._changed.set()


def _given(params: SamplingParams | None) -> SamplingParams:
    return SamplingParams() if params is None else params


class AsyncLLM(ServingCore):
    """A model served to asyncio code. Every method may be called from any thread.

    >>> async with AsyncLLM("smollm2") as llm:
    ...     async for output in llm.generate("Once upon a time", SamplingParams(max_tokens=100)):
    ...         print(output.outputs[0].text)
    """

    _stall_limit: ClassVar[float | None] = STREAMING_STALL_LIMIT

    def _start(self) -> None:
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}  # of the engine's thread alone
        self._gate = threading.Lock()  # between a command and the end of the thread that would run it
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="fastserve-engine", daemon=True)
        self._thread.start()
        # The thread must not be inside the runtime when the interpreter goes away.
        atexit.register(self.shutdown)

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        program_id: str | None = None,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """The answers so far, whenever they grow; the last output is `finished`. `priority` and all else is as LLM's.

        Closing the iterator, or cancelling the task that waits for it, aborts the request. Raises InvalidRequest, here
        or when iteration starts, and EngineError when the engine has stopped.
        """
        origin = checked_origin(tenant, program_id, cache_salt)
        more = {"request_id": request_id, "priority": priority, "origin": origin}
        return self._outputs(self._request(prompt, _given(sampling_params), **more))

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        program_id: str | None = None,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """Like generate, for the next message of a conversation."""
        origin = checked_origin(tenant, program_id, cache_salt)
        more = {"request_id": request_id, "priority": priority, "origin": origin}
        return self._outputs(self._chat_request(messages, _given(sampling_params), **more))

    def abort(self, request_id: str) -> None:
        """End a request: its stream closes with finish_reason "abort". Nothing happens when it is unknown or done."""
        with contextlib.suppress(EngineError):  # a stopped engine has nothing left to abort
            self._send(lambda: self._abort_in_thread(request_id))

    def shutdown(self) -> None:
        """Stop the engine after its current iteration and free the model. Open streams end with EngineError."""
        if self._inherited:  # the thread is the other process's, and so is the lock it may have held
            return super().close()
        with self._gate:
            self._stopping = True
            self._commands.put(lambda: None)
        self._thread.join()
        atexit.unregister(self.shutdown)
        super().close()

    def close(self) -> None:
        self.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.shutdown)

    # --- in the caller's event loop ----------------------------------------------------------------------------------

    async def _outputs(self, request: Request) -> AsyncIterator[RequestOutput]:
        stream, arrival = _Stream(), self._clock()
        self._send(lambda: self._open(request, stream, arrival))
        finished = False
        try:
            while not finished:
                output = await stream.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                with contextlib.suppress(EngineError):
                    self._send(lambda: self._abandon(request.request_id, stream))

    def _send(self, command: Callable[[], None]) -> None:
        """Have the engine's thread run a command between two iterations. Raises EngineError when it has ended."""
        self._check_process()
        with self._gate:
            if self._stopping or self._failure is not None:
                raise EngineError(str(self._failure or "the engine was closed")) from self._failure
            self._commands.put(command)

    # --- in the engine's thread --------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._stopping:
                self._run_commands(wait=not self._has_work)
                self._step()
        except Exception as error:
            failure = error if isinstance(error, EngineError) else EngineError(f"the engine stopped: {error!r}")
        else:
            failure = EngineError("the engine was closed")
        with self._gate:
            self._failure = failure
            self._run_commands()  # those that got in before the gate closed: each is told of the failure
        for stream in self._streams.values():
            stream.put(failure)

    def _run_commands(self, *, wait: bool = False) -> None:
        """Run what has been sent; with `wait`, at least one."""
        with contextlib.suppress(queue.Empty):
            self._commands.get(block=wait)()
            while True:
                self._commands.get_nowait()()

    def _open(self, request: Request, stream: _Stream, arrival: float) -> None:
        def on_news(live: LiveRequest) -> None:
            stream.put(live.output())
            if live.finished:
                del self._streams[request.request_id]

        try:
            self._add(request, on_news, arrival)
        except Exception as error:  # `_add` has taken everything back: it is this request's trouble and nobody else's
            stream.put(error)
        else:
            self._streams[request.request_id] = stream

    def _abandon(self, request_id: str, stream: _Stream) -> None:
        """Abort what nobody listens to any more. The id may be another request's by now."""
        if self._streams.get(request_id) is stream:
            self._abort_in_thread(request_id)

    def _abort_in_thread(self, request_id: str) -> None:
        with contextlib.suppress(EngineError):
            self._abort(request_id)
