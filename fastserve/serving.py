"""A model, its runtime and the engine put together; requests go in, outputs come out. LLM and AsyncLLM build on it.

    prompt ──Intake──▶ Request ──_add──▶ Engine ──_step──▶ LiveRequest ──output──▶ RequestOutput
                                           │ ▲
                                    submit ▼ │ poll
                                       NativeRuntime

A request is `n` jobs of the engine; a job is followed by a Completion, which turns its tokens into text.
"""

from __future__ import annotations

import copy
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .assembly import assemble
from .calibration import Calibration
from .config import check_integer
from .cost import CostModel
from .distributed import Grid
from .engine import Engine, IterationRecord
from .outputs import Completion, LiveRequest
from .requests import Intake, Message, Prompt, Request
from .seeds import derived_seed
from .types import MAX_SEED, FinishReason, InvalidRequest, SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Self


class EngineError(RuntimeError):
    """The engine has stopped, because a plan failed or because it was closed. A new one can be started."""


class ServingCore:
    """What LLM and AsyncLLM share. `_add`, `_abort` and `_step` belong to one thread; the rest is for any."""

    _stall_limit: ClassVar[float | None] = None  # unless it is given

    def __init__(
        self,
        model: str | os.PathLike[str] | Any,
        *,
        policy: str = "skip-join-mlfq",
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto",
        quantization: Literal["auto", "int8", "none"] = "auto",
        device: str = "cpu",
        threads: int = 0,
        max_model_len: int | None = None,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        stall_limit: float | Literal["auto"] | None = "auto",
        block_size: int = 16,
        kv_cache_memory: str | int | None = None,
        swap_space: str | int | None = None,
        swap_mode: Literal["proactive", "reactive", "recompute"] = "proactive",
        swap_bandwidth: str | int | None = None,
        admission: Literal["paged", "reserve"] = "paged",
        enable_prefix_caching: bool = True,
        tenant_weights: Mapping[str, float] | None = None,
        seed: int = 0,
        starvation_limit: float | None = 60.0,
        slowdown_limit: float | None = None,
        num_levels: int = 16,
        max_in_flight: int | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        rank_timeout: float = 300.0,
        data_parallel_size: int = 1,
        skip_tokenizer: bool = False,
        tokenizer: str | os.PathLike[str] | Any = None,
        cost: CostModel | str | os.PathLike[str] | None = None,
        on_iteration: Callable[[IterationRecord], None] | None = None,
    ) -> None:
        """Load `model`: smollm2, a .gguf file, a directory in Hugging Face or FasterTransformer layout, a hub id, or a
        module of `transformers`, whose weights are copied over DLPack and whose memory is free to go afterwards.

        policy           fcfs, mlfq, skip-join-mlfq or gittins
        dtype            of computation: bfloat16 or float32
        kv_cache_dtype   of the KV cache: auto is dtype; bfloat16, float32, or int8 for nearly twice as many tokens in
                         the same memory, each rounded to 255 levels of its own a head
        quantization     of the weights in memory: auto keeps the blocks of a quantized GGUF file, unless dtype is
                         float32; int8 quantizes any model, with one scale an output; none converts all to dtype
        device           cpu
        threads          0: one a core
        max_model_len    longest prompt + output, in tokens; None: the model's own limit
        max_num_seqs     jobs in one iteration
        max_num_batched_tokens  tokens in one iteration; longer prompts are prefilled in chunks
        stall_limit      these make an iteration at most this many times as long as its decodes alone would take, by the
                         cost model (up to 1.9 times where the batch has spare rows, and a prompt that takes no more
                         than 0.2 seconds is computed at once while nobody waits for a row); None: however long; auto:
                         1.5 for AsyncLLM, whose users see every token come, and None for LLM, whose users see the end
        block_size       tokens in one block of the KV cache
        kv_cache_memory  bytes, or text such as 512M; None: room for max_num_seqs full contexts, but at most a quarter
                         of the memory available
        swap_space       host memory for the KV of preempted jobs, in bytes or text such as 4G; 0: none, and what loses
                         its place is computed again; None: 4G, but at most a quarter of what the KV cache leaves free
        swap_mode        when the KV cache is full: proactive moves KV to the host and back ahead of need, while others
                         run; reactive moves it when it is needed, while all wait; recompute throws it away
        swap_bandwidth   slows each direction of swapping to so many bytes a second, at least 1M, to try a slow link
        admission        paged: a job starts when its prompt fits in the KV cache; reserve: when its longest output
                         does, too, so that it never gives up its place
        enable_prefix_caching  KV stays when its job has ended, until its memory is needed, and prompts that begin alike
                         share it; no token changes by that
        tenant_weights   shares of the device between tenants (generate's `tenant`) who all want it: 1 for who is not
                         named here
        seed             draws the seeds of requests that bring none
        starvation_limit seconds after which mlfq, skip-join-mlfq and gittins let a waiting job go first,
                         among its tenant's where several have jobs; None: never
        slowdown_limit   so does one that has waited this many times its own service; None: never
        num_levels       of the MLFQ
        max_in_flight    plans handed to the runtime ahead of their results; None: 2, which keep it busy while Python
                         plans, or one a stage
        tensor_parallel_size    ranks that share every matrix of a stage ...
        pipeline_parallel_size  ... and stages that share the layers. With more than one rank in all, the program is
                         either launched (mpiexec -n 4 python script.py): then this returns on rank 0 only, and in the
                         others, which work for it until it closes, SystemExit follows; a launched group has one model.
                         Or it is not, and starts the others on this host.
                         threads, kv_cache_memory and swap_space are of each rank
        rank_timeout     seconds that ranks of one iteration wait for each other; then the engine stops, naming one
        data_parallel_size  1: several engines are `fastserve serve --data-parallel-size N`, or as many processes with
                         an LLM each
        skip_tokenizer   serve token-id prompts only
        tokenizer        instead of the model's own: a directory that has one, a tokenizer.json, or a tokenizer of the
                         libraries tokenizers or transformers. A module brings none; without one, prompts are token ids
        cost             a CostModel, or a file that `fastserve profile` wrote; None: remembered from an earlier start,
                         else measured in 0.6 seconds
        on_iteration     called with an IterationRecord after every iteration, on the engine's thread

        Raises InvalidRequest, naming the option, ModelError, naming the file, and GroupError, naming the rank that
        could not take part.
        """
        if check_integer("data_parallel_size", data_parallel_size, 1, 2**16) != 1:
            raise InvalidRequest(
                "data_parallel_size",
                f"must be 1, as a process has one engine, got {data_parallel_size}; fastserve serve "
                "--data-parallel-size starts several, and so do several processes with an LLM each",
            )
        self._clock = time.monotonic
        self._process = os.getpid()  # a fork inherits the memory of the runtime, and not its threads
        self._failure: EngineError | None = None
        self._live: dict[str, LiveRequest] = {}
        self._jobs: dict[str, tuple[LiveRequest, Completion]] = {}
        check_integer("seed", seed, 0, MAX_SEED)

        grid = Grid(tensor_parallel_size, pipeline_parallel_size)
        scheduler: dict[str, Any] = {
            "policy": policy,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "stall_limit": self._stall_limit if stall_limit == "auto" else stall_limit,
            "block_size": block_size,
            "num_levels": num_levels,
            "starvation_limit": starvation_limit,
            "slowdown_limit": slowdown_limit,
            "admission": admission,
            "swap_mode": swap_mode,
            "enable_prefix_caching": enable_prefix_caching,
            "tenant_weights": {} if tenant_weights is None else tenant_weights,
        }
        runtime: dict[str, Any] = {
            "dtype": dtype,
            "kv_cache_dtype": kv_cache_dtype,
            "quantization": quantization,
            "device": device,
            "threads": threads,
        }
        sizes: dict[str, Any] = {
            "max_model_len": max_model_len,
            "max_in_flight": max_in_flight,
            "kv_cache_memory": kv_cache_memory,
            "swap_space": swap_space,
            "swap_bandwidth": swap_bandwidth,
        }
        rank_command = None
        if grid.size > 1 and isinstance(model, (str, os.PathLike)):
            # Imported here because it takes msgspec, which an engine in one process does without.
            from .engine_options import EngineOptions, worker_command

            more = {**asdict(grid), "rank_timeout": rank_timeout}
            rank_command = worker_command(
                EngineOptions(model=os.fspath(model), **scheduler, **runtime, **sizes, **more)
            )
        assembly = assemble(
            model,
            scheduler=scheduler,
            runtime=runtime,
            **sizes,
            skip_tokenizer=skip_tokenizer,
            tokenizer=tokenizer,
            cost=cost,
            grid=grid,
            rank_command=rank_command,
            rank_timeout=rank_timeout,
        )
        self._leave_group = weakref.finalize(self, assembly.placement.close)
        self.model: str = assembly.info["model"]
        self.spec = assembly.spec
        self.tokenizer = assembly.tokenizer
        self._intake = Intake(self.model, self.tokenizer, seed)
        self.cost = assembly.cost
        self._info = assembly.info
        self._calibration: Calibration | None = assembly.calibration
        self._engine: Engine | None = Engine(
            assembly.scheduling,
            assembly.runtime,
            assembly.cost,
            link=assembly.link,
            clock=self._clock,
            on_iteration=on_iteration,
        )
        self._start()

    def _start(self) -> None:
        """For subclasses: called once everything is in place."""

    @property
    def info(self) -> dict[str, Any]:
        """What is served and with what, ready for JSON. Sizes are in bytes."""
        return copy.deepcopy(self._info)

    # --- prompts in --------------------------------------------------------------------------------------------------

    def _request(self, prompt: Prompt, params: SamplingParams, **more: Any) -> Request:
        """Turn a prompt into a request. Raises InvalidRequest; what depends on the engine's limits `_add` checks."""
        self._check_process()
        return self._intake.request(prompt, params, **more)

    def _chat_request(self, messages: Sequence[Message], params: SamplingParams, **more: Any) -> Request:
        """The same for a conversation, written out by the model's chat template."""
        self._check_process()
        return self._intake.chat_request(messages, params, **more)

    def _add(
        self, request: Request, on_news: Callable[[LiveRequest], None], arrival: float | None = None
    ) -> LiveRequest:
        """Hand a request to the engine, as one job for each answer. `arrival` is on the clock time.monotonic.

        Raises InvalidRequest with nothing changed, and EngineError when the engine has stopped.
        """
        engine = self._need_engine()
        if request.request_id in self._live:
            raise InvalidRequest("request_id", f"{request.request_id!r} is in use by a request that has not finished")
        live = LiveRequest(request, on_news)
        n, job_ids = request.params.n, []
        try:
            for i in range(n):
                job_ids.append(self._free_job_id(request.request_id if n == 1 else f"{request.request_id}/{i}"))
                job = engine.add_job(
                    job_ids[-1],
                    request.token_ids,
                    request.params,
                    seed=derived_seed(request.seed, i),
                    vocab_size=self.spec.vocab_size,
                    eos_token_ids=self.spec.eos_token_ids,
                    priority=request.priority,
                    tenant=request.origin.tenant,
                    program=request.origin.program,
                    cache_salt=request.origin.cache_salt,
                    arrival=arrival,
                )
                live.completions.append(Completion(i, job, self.tokenizer))
        except BaseException:  # whatever it is, a job that nobody follows must not stay
            for job_id in job_ids:
                engine.abort(job_id)
            raise
        self._live[request.request_id] = live
        self._jobs.update(zip(job_ids, ((live, completion) for completion in live.completions), strict=True))
        return live

    def _free_job_id(self, name: str) -> str:
        """The job's name where it is free: another request may be called like an answer of this one."""
        while name in self._jobs:
            name += "'"
        return name

    def _abort(self, request_id: str) -> bool:
        """End a request in whatever state it is; False when it is unknown or has finished."""
        live = self._live.get(request_id)
        if live is None:
            return False
        for completion in live.completions:
            if not completion.job.finished:
                self._end(live, completion, FinishReason.ABORT)
        live.on_news(live)
        return True

    # --- outputs out -------------------------------------------------------------------------------------------------

    @property
    def _has_work(self) -> bool:
        return self._engine is not None and self._engine.has_work

    def _step(self, timeout: float | None = None) -> None:
        """Run the engine until one iteration is done, `timeout` seconds have passed, or there is nothing to do.

        Requests that grew or ended hear of it. Raises EngineError when the engine has stopped.
        """
        engine = self._need_engine()
        try:
            updates = engine.step(timeout)
        except Exception as error:
            self._stop(EngineError(f"the engine stopped: {error}"))
            raise EngineError(str(self._failure)) from error
        changed: dict[str, LiveRequest] = {}
        for job, token in updates:
            live, completion = self._jobs[job.job_id]
            stopped = completion.append([] if token is None else [token])
            if stopped or completion.job.finished:
                self._end(live, completion, FinishReason.STOP)
            changed[live.request.request_id] = live
        for live in changed.values():
            live.on_news(live)

    def close(self) -> None:
        """Give back the memory and the threads of the model. Requests still open are lost."""
        self._stop(EngineError("the engine was closed"))
        if self._inherited:  # to end the runtime is to wait for threads, and they are the other process's
            return
        self._leave_group()
        self._engine = self._calibration = None

    def _stop(self, failure: EngineError) -> None:
        self._failure = self._failure or failure
        self._live.clear()
        self._jobs.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _end(self, live: LiveRequest, completion: Completion, reason: FinishReason) -> None:
        """Let go of a job, ending it for `reason` if it is still running."""
        del self._jobs[completion.job.job_id]
        self._need_engine().abort(completion.job.job_id, reason)
        completion.finish()
        if live.finished:  # of several answers that end in one iteration, the first to come here finds all finished
            self._live.pop(live.request.request_id, None)

    @property
    def _inherited(self) -> bool:
        return os.getpid() != self._process

    def _check_process(self) -> None:
        if self._inherited:
            raise EngineError("the engine was created in another process; create one after the fork")

    def _need_engine(self) -> Engine:
        self._check_process()
        if self._engine is None or self._failure is not None:
            raise EngineError(str(self._failure)) from self._failure
        return self._engine
