"""The words of FastServe as data: jobs, sampling parameters, plans and results.

Everything here is plain data shared by the layers above. Nothing in this module imports another FastServe module, a
clock or a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
UInt64Array = npt.NDArray[np.uint64]

# Where the KV of a job is: all of it on the device, or some of it on the host only or on its way.
DEVICE = 0
HOST = 1

# Directions of a copy of KV blocks.
OFFLOAD = 0  # device → host
UPLOAD = 1  # host → device

MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1
_MAX_INT = 2**31 - 1


class InvalidRequest(ValueError):
    """A request that cannot be served as asked; `field` names the option or parameter at fault.

    `request` tells which of several requests it was, counted from 0; None where there was one.
    """

    def __init__(self, field: str, message: str, request: int | None = None) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.request = request

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, str(self).removeprefix(f"{self.field}: "), self.request)


def _check(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise InvalidRequest(name, message)


def _real(name: str, value: Any, low: float, high: float, range_text: str) -> float:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    _check(number and bool(low <= value <= high), name, f"must be a number {range_text}, got {value!r}")
    return float(value)


def _integer(name: str, value: Any, low: int, high: int, range_text: str) -> int:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    _check(whole and bool(low <= value <= high), name, f"must be an integer {range_text}, got {value!r}")
    return int(value)


def _flag(name: str, value: Any) -> bool:
    _check(isinstance(value, (bool, np.bool_)), name, f"must be True or False, got {value!r}")
    return bool(value)


def _items(name: str, value: Any, of: str) -> tuple[Any, ...]:
    """The items of a list, tuple, set or array; none for None."""
    if value is None:
        return ()
    listed = isinstance(value, (Iterable, np.ndarray)) and not isinstance(value, (str, bytes, bytearray, Mapping))
    _check(listed and getattr(value, "ndim", 1) == 1, name, f"must be a list of {of}, got {value!r}")
    return tuple(value)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a job are chosen. Names, defaults and meanings are vLLM's.

    NumPy's numbers and arrays are taken, and kept as Python's; None for stop, stop_token_ids or logit_bias is none of
    them. Raises InvalidRequest, naming the parameter, for a value of another type or outside its range.
    """

    n: int = 1
    max_tokens: int | None = 16  # None: until the context is full
    min_tokens: int = 0  # end-of-sequence and stop tokens are masked before this many outputs
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0 or -1: the whole vocabulary
    top_p: float = 1.0
    min_p: float = 0.0  # keep tokens with at least this share of the most likely token's probability
    repetition_penalty: float = 1.0  # over prompt and output; divides positive and multiplies negative logits
    presence_penalty: float = 0.0  # over output only
    frequency_penalty: float = 0.0  # over output only
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # a dict has no hash
    logprobs: int | None = None  # this many alternatives a token; 0: the chosen token's only
    seed: int | None = None  # None: drawn once, when the job is added
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        def integer(name: str, low: int, high: int, range_text: str) -> None:
            object.__setattr__(self, name, _integer(name, getattr(self, name), low, high, range_text))

        def real(name: str, low: float, high: float, range_text: str) -> None:
            object.__setattr__(self, name, _real(name, getattr(self, name), low, high, range_text))

        integer("n", 1, 128, "between 1 and 128")
        if self.max_tokens is not None:
            integer("max_tokens", 1, _MAX_INT, "of at least 1")
        integer("min_tokens", 0, _MAX_INT, "of at least 0")
        _check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"must not exceed max_tokens ({self.max_tokens}), got {self.min_tokens}",
        )
        real("temperature", 0.0, 100.0, "between 0 and 100")
        integer("top_k", -1, _MAX_INT, "of at least 1, or 0 or -1 for the whole vocabulary")
        real("top_p", 1e-9, 1.0, "above 0 and at most 1")
        real("min_p", 0.0, 1.0, "between 0 and 1")
        real("repetition_penalty", 1e-6, 100.0, "above 0 and at most 100")
        real("presence_penalty", -2.0, 2.0, "between -2 and 2")
        real("frequency_penalty", -2.0, 2.0, "between -2 and 2")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.logprobs is not None:
            integer("logprobs", 0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
        if self.seed is not None:
            integer("seed", 0, MAX_SEED, "between 0 and 2^64 - 1")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        tokens = _items("stop_token_ids", self.stop_token_ids, "token ids")
        ids = tuple(_integer("stop_token_ids", token, 0, _MAX_INT, "of at least 0") for token in tokens)
        object.__setattr__(self, "stop_token_ids", ids)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            object.__setattr__(self, name, _flag(name, getattr(self, name)))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether sampling looks at the tokens before the current one."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _biases(given: Any) -> dict[int, float]:
    if given is None:
        return {}
    _check(isinstance(given, Mapping), "logit_bias", f"must be a dict from token ids to numbers, got {given!r}")
    return {
        _integer("logit_bias", token, 0, _MAX_INT, "of at least 0 as token id"): _real(
            "logit_bias", bias, -100.0, 100.0, "between -100 and 100"
        )
        for token, bias in given.items()
    }


def _stop_strings(given: Any) -> tuple[str, ...]:
    if isinstance(given, str):
        return (str(given),) if given else ()
    stops = _items("stop", given, "strings, or one string")
    for text in stops:
        _check(isinstance(text, str) and text != "", "stop", f"must hold non-empty strings, got {text!r}")
    return tuple(str(text) for text in stops)


class LazyTokens(Sequence[int]):
    """Token ids that are worked out when they are read, as simulators give long prompts: from 0 to below `bound`."""

    bound: int


class FinishReason(str, Enum):
    """Why a job ended. The values are OpenAI's, plus `abort` and `error`."""

    STOP = "stop"  # end-of-sequence, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    ABORT = "abort"
    ERROR = "error"  # no token could be sampled: Job.error says why


@dataclass(slots=True)
class JobMetrics:
    """When things happened to a job, in seconds on the engine's clock. Durations are wall-clock time of the job."""

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None  # None where a lost engine put it out
    finish: float | None = None
    preemptions: int = 0  # iterations that left the job out although it could run and had run in the one before
    recomputed_tokens: int = 0  # KV entries computed again: their blocks had been taken, or their engine was lost
    prefill_seconds: float = 0.0  # in iterations that worked on its prompt
    decode_seconds: float = 0.0  # in iterations that worked on its output
    # queue time is what is left of the job's completion time
    swap_seconds: float = 0.0  # of that, with its KV on the way back from the host
    cached_tokens: int = 0  # of the prompt, whose KV was found when the job first ran
    service_seconds: float = 0.0  # modelled, as if it were alone: what it was charged, in lost engines, too

    @property
    def jct(self) -> float | None:
        """Job completion time: arrival to last token."""
        return None if self.finish is None else self.finish - self.arrival

    @property
    def ttft(self) -> float | None:
        """Time to first token, from arrival."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def queue_seconds(self) -> float | None:
        """Time in which no iteration worked on the job."""
        return None if self.jct is None else max(0.0, self.jct - self.prefill_seconds - self.decode_seconds)

    def as_dict(self, output_tokens: int) -> dict[str, Any]:
        """JSON form, with the derived values: jct, ttft, tpot, normalized_latency and queue_seconds."""
        jct, ttft = self.jct, self.ttft
        tpot = None
        if jct is not None and ttft is not None and output_tokens > 1:
            tpot = (jct - ttft) / (output_tokens - 1)
        return {
            "arrival": self.arrival,
            "first_scheduled": self.first_scheduled,
            "first_token": self.first_token,
            "finish": self.finish,
            "jct": jct,
            "ttft": ttft,
            "tpot": tpot,
            "normalized_latency": jct / output_tokens if jct is not None and output_tokens else None,
            "preemptions": self.preemptions,
            "recomputed_tokens": self.recomputed_tokens,
            "queue_seconds": self.queue_seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "swap_seconds": self.swap_seconds,
            "cached_tokens": self.cached_tokens,
        }


@dataclass(slots=True)
class TokenLogprobs:
    """Natural-log probabilities of one output position, under the model's unmodified distribution."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  # most likely first


@dataclass(slots=True, eq=False)
class Job:
    """One prompt and its output as the engine sees it. The engine owns it; everyone else reads.

    Positions: token i of `prompt + output` has position i. `computed` counts the positions whose KV is in the job's
    blocks or is being written by a plan in flight; `served` is the highest value it reached in a completed
    iteration, so positions below `served` are recomputation and are never charged. Nor are the `cached` first ones,
    which other jobs have computed.
    """

    job_id: str
    prompt: Sequence[int]
    params: SamplingParams
    seed: int
    arrival: float
    max_output: int  # output tokens at which the job ends: max_tokens, cut to the context
    stop_tokens: frozenset[int]
    index: int = 0  # arrival order, unique; ties in every policy break by it
    priority: int = 0  # lower goes first among its tenant's
    tenant: str = ""  # whose job it is: tenants share the device by their weights
    program: str | None = None  # the program that it is a call of
    cache_salt: str = ""  # KV is shared only between jobs of one tenant and one salt
    inherited: float = 0.0  # modelled solo seconds that earlier calls of its program were served
    group: int | None = None  # of prompts that begin alike, for policies that learn; None: too short to tell
    cached: int = 0  # first positions that it need not compute, as far as is known
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the tokens that this engine sampled
    computed: int = 0
    served: int = 0
    pending: int = 0  # output tokens being sampled by plans in flight
    in_flight: int = 0  # plans in flight that hold a row of this job
    slot: int | None = None  # the runtime's slot, while the job holds KV
    tier: int | None = None  # where that is: DEVICE or HOST
    attained: float = 0.0  # modelled solo seconds of service reported to the policy so far
    waiting_since: float | None = None  # when it was last left out of a batch, or arrived; None while it runs
    waited: float = 0.0  # seconds of the waits before that one
    primed: bool = False  # its slot holds its last token, sampled or being sampled: the next row is a decode
    batch: object = None  # the DecodeRows it is in
    row: int = -1  # its place there
    mark: int = 0  # the decision that last chose it
    known_output: int | None = None  # its output length, for the oracle that srpt is; None: nobody knows
    next_seconds: float = 0.0  # modelled solo time of the whole remaining uncharged prefill, else of one decode
    finish_reason: FinishReason | None = None
    error: str | None = None
    metrics: JobMetrics = field(default_factory=lambda: JobMetrics(0.0))

    @property
    def known(self) -> int:
        """Tokens of prompt and output that exist, those being sampled included."""
        return len(self.prompt) + len(self.output) + self.pending

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


_NO_REALS: Float32Array = np.zeros(0, np.float32)
_NO_SEEDS: UInt64Array = np.zeros(0, np.uint64)


def _empty(*shape: int) -> Callable[[], Int32Array]:
    """Makes the default of a field: one array without elements, shared by all."""
    empty = np.zeros(shape, np.int32)
    return lambda: empty


@dataclass(slots=True, kw_only=True)
class BatchPlan:
    """What one iteration does: a delta against what the runtime already knows, as flat arrays.

    The runtime applies, in this order: `closed`, `opened`, `table`, then runs `rows`. A slot holds what sampling and
    attention need of one job; it is a cache that can be rebuilt from the job at any time.

    `copies` move whole KV blocks between the device's pool and the host's, on one stream a direction, in order. They
    start when the plan is submitted, beside whatever runs: whoever plans leaves their sources and destinations alone
    until a StepResult acknowledges them. A plan without rows ends with the next copy to finish, or at once when none
    is under way.
    """

    plan_id: int
    # [R, 4]: slot, position of the first token, tokens, logits. The last `logits` tokens of the row produce logits
    # and a row with logits > 0 samples one token, from its last ones.
    rows: Int32Array = field(default_factory=_empty(0, 4))
    # [sum of rows' tokens]: their ids; -1 means "the slot's last sampled token".
    tokens: Int32Array = field(default_factory=_empty(0))
    # [O, 8]: slot, prompt length, history length, top_k, logprobs (-1: none), min_tokens, bias entries, stop tokens
    opened: Int32Array = field(default_factory=_empty(0, 8))
    # [O, 6]: temperature, top_p, min_p, repetition, presence and frequency penalty
    opened_params: Float32Array = field(default_factory=lambda: _NO_REALS.reshape(0, 6))
    opened_seeds: UInt64Array = field(default_factory=lambda: _NO_SEEDS)
    # Concatenated over opened slots: prompt and output so far where penalties look at them, else nothing.
    history: Int32Array = field(default_factory=_empty(0))
    bias_tokens: Int32Array = field(default_factory=_empty(0))
    bias_values: Float32Array = field(default_factory=lambda: _NO_REALS)
    stop_tokens: Int32Array = field(default_factory=_empty(0))  # masked until min_tokens are out
    closed: Int32Array = field(default_factory=_empty(0))  # slots
    table: Int32Array = field(default_factory=_empty(0, 3))  # [D, 3]: slot, index in its block table, block
    # [C, 4]: copy, direction (OFFLOAD or UPLOAD), source block, destination block. Rows of one copy are adjacent and
    # are acknowledged together.
    copies: Int32Array = field(default_factory=_empty(0, 4))


@dataclass(slots=True, kw_only=True)
class StepResult:
    """What came back from one plan. Sampled values are in the order of the rows with logits."""

    plan_id: int
    tokens: Int32Array  # [S]
    logprobs: Float32Array  # [S]; NaN where not asked for
    top_tokens: Int32Array  # [S, K], K the largest `logprobs` asked for in the batch; -1 where not asked for
    top_logprobs: Float32Array  # [S, K]
    seconds: float  # duration of the iteration on the device
    errors: dict[int, str] = field(default_factory=dict)  # sample → why its row has no token (which reads -1)
    copies: Int32Array = field(default_factory=_empty(0))  # [K]: copies that finished since the last result
    # [K]: seconds each took on its stream, without waiting for its turn
    copy_seconds: Float32Array = field(default_factory=lambda: _NO_REALS)


class Executor(Protocol):
    """What runs plans: the native runtime, an MPI group or a simulator. Plans run in submission order."""

    def submit(self, plan: BatchPlan) -> None:
        """Queue one plan; returns at once."""

    def poll(self, timeout: float | None) -> StepResult | None:
        """Wait up to `timeout` seconds (None: as long as it takes) for the oldest plan's result.

        Returns None when the time is up. Raises if the plan failed.
        """


# News of one job after an iteration: the token it got, or None when it failed without one.
JobUpdate = tuple[Job, int | None]
