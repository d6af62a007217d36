"""What the API server and the engine tell each other, and the socket between them.

    API server ── Add, Abort, ListJobs, Stop ──▶ engine
               ◀── Here, Ready | Failed, then Step, Refused, Status, Jobs ──

Each start of the engine gets a socket of its own, so that nothing a dead engine said can be taken for the living one's.
Messages are msgpack, typed on both ends. Jobs go by integer keys that the API server hands out and never reuses.
Times are seconds of time.monotonic, which all processes of a host share.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .types import JobMetrics, SamplingParams, TokenLogprobs

# In the engine's environment: the process without which it has nothing to do. Its parent may be another by the time it
# looks, if the API server was killed meanwhile.
SERVER_PID = "FASTSERVE_SERVER_PID"


class Message(msgspec.Struct, array_like=True, tag=True, gc=False):
    """One of the messages below."""


# --- to the engine ----------------------------------------------------------------------------------------------------


class Add(Message):
    """One prompt for one output. `output`: tokens that a lost engine had put out; they count as put out.

    `waiting_since`: when the last of those came, so that a restart makes no wait shorter; None: it waits from now.
    `inherited`: seconds of service, modelled, of the program's calls that have ended, in whichever engine.
    `cached_tokens`: of the prompt, found in the cache by the engine that put out the first of `output`.
    """

    key: int
    prompt: list[int]
    params: SamplingParams  # its n, stop and text options are the API server's business
    seed: int
    priority: int
    arrival: float
    output: list[int]
    waiting_since: float | None = None  # without output it waits since `arrival`
    tenant: str = ""
    program: str | None = None
    cache_salt: str = ""
    inherited: float = 0.0
    cached_tokens: int = 0


class Abort(Message):
    """End jobs; those unknown or finished are left out. `stopped`: by a stop string, else nobody wants them."""

    keys: list[int]
    stopped: bool


class ListJobs(Message):
    """Asks for a Jobs."""

    query: int


class Stop(Message):
    """Finish nothing, free everything, exit 0."""


# --- to the API server ------------------------------------------------------------------------------------------------


class Here(Message):
    """The first word: this process is the engine's rank 0, whoever has started it, and begins to load."""

    pid: int


class Ready(Message):
    """The model is loaded; Adds may come."""

    pids: list[int]  # of its ranks on this host, rank 0's first
    info: dict[str, Any]  # as LLM.info
    vocab_size: int
    max_model_len: int


class Failed(Message):
    """The engine cannot start or go on; it exits next. `message` is one line for the operator."""

    message: str
    field: str | None  # the option at fault, where it is one
    outside: bool = False  # somebody outside may have ended a rank of it


class Update(msgspec.Struct, array_like=True, gc=False):
    """What one iteration did for one job."""

    key: int
    token: int | None
    logprobs: TokenLogprobs | None
    finish_reason: str | None  # as in CompletionOutput; None while it goes on
    error: str | None
    metrics: JobMetrics | None  # with finish_reason
    cached_tokens: int = 0  # of the prompt, found in the cache when the job first ran; with the first token


class Step(Message):
    """The end of an iteration. `running`: jobs in the next ones, which is told when it changes."""

    updates: list[Update]
    running: list[int] | None


class Refused(Message):
    """An Add that the engine does not take: an InvalidRequest."""

    key: int
    field: str
    message: str


class LevelStatus(msgspec.Struct, array_like=True, gc=False):
    """One level of the MLFQ, or all jobs of a policy without levels."""

    quantum: float | None  # seconds
    waiting: int
    running: int
    oldest_wait: float  # seconds


class TenantStatus(msgspec.Struct, array_like=True, gc=False):
    """A tenant, as one Status tells of it."""

    name: str
    seconds: float  # of service, modelled, since the Status before


class Status(Message):
    """Sent every quarter of a second while there is work and every second otherwise: it is the heartbeat, too.

    Counters count from this engine's start.
    """

    time: float
    live: int
    running: int
    levels: list[LevelStatus]
    backlog: float  # seconds until all live jobs are done, by the cost model
    device_blocks: int
    device_blocks_used: int
    host_blocks: int
    host_blocks_used: int
    iterations: int
    prefill_tokens: int
    decode_tokens: int
    preemptions: int
    recomputed_tokens: int
    offloaded_bytes: int
    uploaded_bytes: int
    copy_seconds: float  # that both streams were busy
    hidden_copy_seconds: float  # of those, beside an iteration that did not wait for them
    busy_seconds: float  # of iterations
    modelled_seconds: float = 0.0  # of those that were started, by the cost model
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # of those, the ones found
    evicted_blocks: int = 0  # of the prefix cache
    # What is now, and no counter.
    device_blocks_cached: int = 0  # that nobody uses, and that are kept for who may come
    host_blocks_cached: int = 0
    programs: int = 0  # alive
    tenants: list[TenantStatus] = []  # those that were served since the Status before


class JobStatus(msgspec.Struct, array_like=True, gc=False):
    """A live job, for people to look at."""

    key: int
    level: int  # 0 for policies without levels
    running: bool
    tier: str  # of its KV: device, host or none
    prompt_tokens: int
    computed_tokens: int
    output_tokens: int
    max_output_tokens: int
    attained: float  # modelled seconds of service
    waiting: float  # seconds since it last ran
    preemptions: int
    cached_tokens: int = 0  # of the prompt, found in the cache when it first ran


class Jobs(Message):
    """The answer to a ListJobs: all live jobs, the next to run first."""

    query: int
    jobs: list[JobStatus]


ToEngine = Add | Abort | ListJobs | Stop
FromEngine = Here | Ready | Failed | Step | Refused | Status | Jobs
