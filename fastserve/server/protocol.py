"""The bodies of requests, as OpenAI's API and vLLM's extensions of it have them. None is always "not given"."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool

from ..origin import MAX_LENGTH, check_text
from ..types import MAX_LOGPROBS, MAX_SEED, SamplingParams
from .errors import ApiError, refused
from .fields import check_extra

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024  # characters; an answer's end is compared with each
MAX_STOP_TOKENS = 1024  # different ones; each is in every message that hands a job to the engine
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_INT = 2**31 - 1  # the runtime's integers

_ID: dict[str, Any] = {"type": "integer", "minimum": 0}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": _ID, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": _ID, "minItems": 1}, "minItems": 1},
    ]
}
_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_TEXT_SCHEMA = [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]
_NAME_SCHEMA = {"type": ["string", "null"]}
_MESSAGES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "role": {"enum": ["system", "developer", "user"]},
                    "content": {"anyOf": _TEXT_SCHEMA},
                    "name": _NAME_SCHEMA,
                },
                "required": ["role", "content"],
            },
            {
                "type": "object",
                "properties": {
                    "role": {"const": "assistant"},
                    "content": {"anyOf": [*_TEXT_SCHEMA, {"type": "null"}]},
                    "name": _NAME_SCHEMA,
                },
                "required": ["role"],
            },
        ]
    },
}


def _whole(value: Any) -> Any:
    """JSON does not tell 5.0 from 5."""
    return int(value) if type(value) is float and value.is_integer() else value


_Int = Annotated[int, BeforeValidator(_whole)]


def _given(description: str, **schema: Any) -> Any:
    """A field that may be left out. `schema` tells of its range, which SamplingParams or `check` holds it to."""
    return Field(None, description=description, json_schema_extra=schema)


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    model: str | None = Field(None, description="As /v1/models calls it; may be left out.")

    def check(self) -> list[str]:
        """Names of the fields that are ignored. Raises ApiError for one that would change the answer."""
        return check_extra(self.model_extra)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = _given("A last event without choices says what the request took.")
    continuous_usage_stats: bool | None = _given("vLLM's: usage in every event, too.")


class GenerationRequest(_Body):
    """What completions and chats have in common."""

    max_tokens: _Int | None = _given("Tokens of output, at most.", minimum=1, maximum=MAX_INT)
    min_tokens: _Int | None = _given("No end of any kind before so many tokens; 0.", minimum=0, maximum=MAX_INT)
    temperature: float | None = _given("0 takes the most likely token; 1.", minimum=0, maximum=100)
    top_p: float | None = _given("The likeliest tokens that add up to this probability; 1.", minimum=1e-9, maximum=1)
    top_k: _Int | None = _given("So many of the likeliest tokens; 0 and -1 are all.", minimum=-1, maximum=MAX_INT)
    min_p: float | None = _given("Tokens with this share of the likeliest one's probability; 0.", minimum=0, maximum=1)
    repetition_penalty: float | None = _given("On tokens of prompt and output; 1 is none.", minimum=1e-6, maximum=100)
    presence_penalty: float | None = _given("On tokens of the output; 0.", minimum=-2, maximum=2)
    frequency_penalty: float | None = _given("On tokens of the output, each time; 0.", minimum=-2, maximum=2)
    logit_bias: dict[str, float] | None = _given(
        "Added to the logits of these token ids.",
        maxProperties=MAX_BIASES,
        propertyNames={"pattern": "^[0-9]+$"},
        additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
    )
    n: _Int | None = _given("Answers to each prompt; 1.", minimum=1, maximum=128)
    seed: _Int | None = _given(
        "The same request with the same seed has one answer.", minimum=-(2**63), maximum=MAX_SEED
    )
    stop: str | list[str] | None = _given(
        "Texts that end the answer, which comes without them.",
        maxItems=MAX_STOPS,
        maxLength=MAX_STOP_LENGTH,
        items={"minLength": 1, "maxLength": MAX_STOP_LENGTH},
    )
    stop_token_ids: list[int] | None = _given(f"Tokens that do; {MAX_STOP_TOKENS} different ones.", items=_ID)
    include_stop_str_in_output: bool | None = _given("Keeps the stop text; false.")
    skip_special_tokens: bool | None = _given("Leaves control tokens out of the text; true.")
    ignore_eos: bool | None = _given("Goes on after the model's end-of-sequence token; false.")
    stream: bool | None = _given("Server-sent events while the answer grows; false.")
    stream_options: StreamOptions | None = _given("Only with stream: true.")
    user: str | None = _given(
        "Whom the job is for: users share the device and the queue fairly, and find nothing of each other's in the "
        "cache; each belongs to the API key of its request.",
        maxLength=MAX_LENGTH,
    )
    safety_identifier: str | None = _given(
        "OpenAI's newer name of user; the same, where both are sent.", maxLength=MAX_LENGTH
    )
    program_id: str | None = _given(
        "The program, an agent say, that this is a call of: what its calls were served counts together, and its KV is "
        "kept between them. Within a user.",
        maxLength=MAX_LENGTH,
    )
    cache_salt: str | None = _given(
        "Only requests of the same user with the same salt find in the cache what they have in common.",
        minLength=1,
        maxLength=MAX_LENGTH,
    )
    prompt_cache_key: str | None = _given(
        "Requests with the same key are thought to begin alike: of several engines they go to the same, unless another "
        "would be done much sooner.",
        maxLength=MAX_LENGTH,
    )
    priority: _Int | None = _given(
        "Lower goes first among the requests of a user, or of all who name none; 0.",
        minimum=-(2**31),
        maximum=2**31 - 1,
    )
    timeout: float | None = _given(
        "Seconds until nobody wants the answer any more.", exclusiveMinimum=0, exclusiveMaximum=1e9
    )

    def params(self, vocab_size: int, *, logprobs: int | None, **given: Any) -> SamplingParams:
        """Raises ApiError and InvalidRequest, naming the field. `given` goes before the body's fields."""
        fields: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                "frequency_penalty", "n", "stop", "include_stop_str_in_output", "skip_special_tokens", "ignore_eos",
            )
        }  # fmt: skip
        fields |= {
            "stop_token_ids": self._stop_tokens(vocab_size),
            "logit_bias": self._biases(vocab_size),
            "logprobs": logprobs,
            **given,
        }
        if self.seed is not None:
            if not -(2**63) <= self.seed <= MAX_SEED:
                raise refused("seed", f"must be between -2^63 and 2^64 - 1, got {self.seed}")
            fields["seed"] = self.seed & MAX_SEED
        absent = {name for name, value in fields.items() if value is None and name != "max_tokens"}
        return SamplingParams(**{name: value for name, value in fields.items() if name not in absent})

    def _stop_tokens(self, vocab_size: int) -> list[int] | None:
        if self.stop_token_ids is None:
            return None
        different = list(dict.fromkeys(self.stop_token_ids))
        self._check_ids("stop_token_ids", different, vocab_size)
        if len(different) > MAX_STOP_TOKENS:
            raise refused("stop_token_ids", f"must hold at most {MAX_STOP_TOKENS} tokens, got {len(different)}")
        return different

    def _biases(self, vocab_size: int) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        if len(self.logit_bias) > MAX_BIASES:
            raise refused("logit_bias", f"must hold at most {MAX_BIASES} tokens, got {len(self.logit_bias)}")
        if not all(token.isascii() and token.isdigit() and len(token) <= 20 for token in self.logit_bias):
            raise refused("logit_bias", 'must have token ids as keys, such as {"50256": -100}')
        biases = {int(token): bias for token, bias in self.logit_bias.items()}
        self._check_ids("logit_bias", list(biases), vocab_size)
        return biases

    @staticmethod
    def _check_ids(field: str, ids: list[int], vocab_size: int) -> None:
        for token in ids:
            if not 0 <= token < vocab_size:
                raise refused(field, f"token ids are 0 to {vocab_size - 1} for this model, got {token}")

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_usage_always(self) -> bool:
        return self.wants_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def check(self) -> list[str]:
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "is only allowed with stream: true")
        if self.timeout is not None and not 0 < self.timeout < 1e9:
            raise refused("timeout", f"must be seconds above 0, got {self.timeout}")
        if self.priority is not None and not -(2**31) <= self.priority < 2**31:
            raise refused("priority", f"must be an integer of 32 bits, got {self.priority}")
        for field in ("user", "safety_identifier", "program_id", "cache_salt", "prompt_cache_key"):
            check_text(field, getattr(self, field) or "")
        if self.cache_salt == "":  # which would be none, where somebody counts on one
            raise refused("cache_salt", "must not be empty; leave it out, or send null")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS:
            raise refused("stop", f"must hold at most {MAX_STOPS} texts, got {len(stops)}")
        for text in stops:
            check_text("stop", text, MAX_STOP_LENGTH)
        return super().check()


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[Any, Field(description="Text, token ids, or a list of either.", json_schema_extra=_PROMPT_SCHEMA)]
    max_tokens: _Int | None = _given("Tokens of output, at most; 0 only with echo; 16.", minimum=0, maximum=MAX_INT)
    echo: bool | None = _given("The text begins with the prompt; false.")
    logprobs: _Int | None = _given("This many alternatives of every token.", minimum=0, maximum=MAX_LOGPROBS)
    best_of: _Int | None = _given("Only as many as n.", minimum=1)
    add_special_tokens: bool | None = _given("Such as a beginning-of-sequence token; true.")

    @property
    def only_echo(self) -> bool:
        """Whether nothing is to be generated."""
        return bool(self.echo) and self.max_tokens == 0

    def check(self) -> list[str]:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(
                400,
                f"best_of: is not supported but for as many as n ({self.n or 1}); leave it out",
                param="best_of",
                code="unsupported_parameter",
            )
        if self.echo and self.logprobs is not None:
            raise ApiError(
                400,
                "logprobs: of the prompt's tokens are not supported; ask for logprobs without echo",
                param="logprobs",
                code="unsupported_parameter",
            )
        return super().check()


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(description="The conversation so far.", json_schema_extra=_MESSAGES_SCHEMA)
    max_completion_tokens: _Int | None = _given(
        "Tokens of output, at most; until the context is full.", minimum=1, maximum=MAX_INT
    )
    logprobs: StrictBool | None = _given("Log probabilities of the answer's tokens; false.")
    top_logprobs: _Int | None = _given(
        "And of so many alternatives; needs logprobs.", minimum=0, maximum=MAX_TOP_LOGPROBS
    )
    add_generation_prompt: bool | None = _given("Ends the prompt with the beginning of an assistant's message; true.")
    add_special_tokens: bool | None = _given("The template writes its own; false.")

    def check(self) -> list[str]:
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise refused("max_tokens", "is the old name of max_completion_tokens; send one of them")
        if self.top_logprobs is not None:
            if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
                raise refused("top_logprobs", f"must be between 0 and {MAX_TOP_LOGPROBS}, got {self.top_logprobs}")
            if self.top_logprobs and not self.logprobs:
                raise refused("top_logprobs", "needs logprobs: true")
        return super().check()


class TokenizeRequest(_Body):
    """POST /tokenize: a prompt or a conversation."""

    prompt: str | None = _given("Either this")
    messages: list[dict[str, Any]] | None = _given("or this.", anyOf=[_MESSAGES_SCHEMA, {"type": "null"}])
    add_special_tokens: bool | None = _given("true for a prompt, false for messages, whose template writes its own.")
    add_generation_prompt: bool | None = _given("Ends messages with the beginning of an assistant's; true.")
    return_token_strs: bool | None = _given("The texts of the tokens, too; false.")


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    tokens: list[int] = Field(json_schema_extra={"items": _ID})
