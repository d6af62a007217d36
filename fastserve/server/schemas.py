"""What answers look like, for /openapi.json and for people: nothing is built or checked with these while serving.

`tests/server/test_openapi.py` holds every answer of a server against them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(_Answer):
    message: str = Field(description="One line; it names the field at fault.")
    type: Literal[
        "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
    ]
    param: str | None = Field(description="The field at fault, where it is one.")
    code: str | None = Field(description="A word for programs, such as queue_full or context_length_exceeded.")


class ErrorBody(_Answer):
    """What every error looks like, and the last event of a stream that breaks."""

    error: ErrorDetail


# --- generation -------------------------------------------------------------------------------------------------------


class Accounting(_Answer):
    """Where the time of the job that ended last went. Seconds; null where the engine has not told."""

    queue: float | None = Field(description="No iteration worked on it.")
    prefill: float | None = Field(description="In iterations that worked on its prompt.")
    decode: float | None = Field(description="In iterations that worked on its output.")
    swap: float | None = Field(description="The part of queue in which its KV was on its way back.")
    preemptions: int | None = Field(description="Times it could run and was left out, of all jobs of the request.")


class Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PromptTokensDetails(_Answer):
    cached_tokens: int = Field(
        description="Tokens of the prompts whose KV was found in the cache; of several answers to one, the first's."
    )


class FinalUsage(Usage):
    """Of the whole request."""

    prompt_tokens_details: PromptTokensDetails | None = Field(description="null where the engine has not told.")

    fastserve: Accounting


FinishReason = Literal["stop", "length"]
_STOP = Field(description="The stop string or token id that ended it; null for the model's own end and for length.")
_CREATED = Field(description="Seconds since 1970.")


class CompletionLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Answer):
    index: int = Field(description="Counts answers, over all prompts of the request.")
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = _STOP


class Completion(_Answer):
    """An answer in one piece."""

    id: str
    object: Literal["text_completion"]
    created: int = _CREATED
    model: str
    choices: list[CompletionChoice]
    usage: FinalUsage


class CompletionChunk(_Answer):
    """An event of a stream: text that has been added."""

    id: str
    object: Literal["text_completion"]
    created: int = _CREATED
    model: str
    choices: list[CompletionChoice] = Field(description="One, or none in the event with the usage of all.")
    usage: FinalUsage | Usage | None = Field(None, description="With stream_options only.")


class ChatToken(_Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(_Answer):
    content: list[ChatLogprob]
    refusal: None


class ChatMessage(_Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = _STOP


class ChatCompletion(_Answer):
    """An answer in one piece."""

    id: str
    object: Literal["chat.completion"]
    created: int = _CREATED
    model: str
    choices: list[ChatChoice]
    usage: FinalUsage


class ChatDelta(_Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = Field(None, description="With finish_reason.")


class ChatCompletionChunk(_Answer):
    """An event of a stream: text that has been added."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int = _CREATED
    model: str
    choices: list[ChatChunkChoice] = Field(description="One, or none in the event with the usage of all.")
    usage: FinalUsage | Usage | None = Field(None, description="With stream_options only.")


# --- all else ---------------------------------------------------------------------------------------------------------


class Tokenized(_Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(_Answer):
    prompt: str


class ModelCard(_Answer):
    id: str
    object: Literal["model"]
    created: int = _CREATED
    owned_by: str
    root: str = Field(description="What the server was started with.")
    parent: str | None = Field(description="The name that answers have, where this is another.")
    max_model_len: int = Field(description="Tokens of prompt and output.")


class ModelList(_Answer):
    object: Literal["list"]
    data: list[ModelCard]


class EngineHealth(_Answer):
    """All engines together."""

    pids: list[int]
    restarts: int


class OneEngineHealth(EngineHealth):
    """One engine. While it is not ok, its jobs go on in others, or wait for it."""

    status: Literal["ok", "restarting", "unhealthy"]
    open_jobs: int = Field(description="Jobs that are on it.")
    error: str | None = Field(None, description="Why it does not start.")


class Health(_Answer):
    status: Literal["ok", "restarting", "draining", "unhealthy"]
    version: str
    engine: EngineHealth
    engines: list[OneEngineHealth] = Field(description="One by one; as many as --data-parallel-size says.")
    open_jobs: int
    error: str | None = Field(None, description="Why no engine starts.")


class LiveJob(_Answer):
    """A job that the engine has."""

    key: int
    request_id: str | None = Field(description="Null for jobs of other API keys.")
    user: str | None = Field(
        description="Whose it is, as key N/user where there are API keys; of other keys, with a hash for the user."
    )
    program_id: str | None = Field(description="The program that it is a call of; null for jobs of other API keys.")
    level: int = Field(description="Of the MLFQ, 0 the first; 0 for policies without levels.")
    running: bool
    tier: Literal["device", "host", "none"] = Field(description="Where its KV is.")
    prompt_tokens: int
    computed_tokens: int
    cached_tokens: int = Field(description="Of the prompt, found in the cache when it first ran.")
    output_tokens: int
    max_output_tokens: int
    attained: float = Field(description="Modelled seconds of service.")
    waiting: float = Field(description="Seconds since it last ran.")
    preemptions: int
    engine: int | None = Field(None, description="The engine that it is on, from 0; where there are several.")


class LiveJobs(_Answer):
    """The queue, the next to run first; and the server in figures, which come with newer versions in greater number."""

    object: Literal["list"]
    data: list[LiveJob]
    server: dict[str, Any]
