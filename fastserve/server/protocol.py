"""The bodies of requests, as OpenAI's API and vLLM's extensions of it have them. None is always "not given"."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from ..types import MAX_SEED, SamplingParams
from .errors import ApiError, refused
from .fields import check_extra

MAX_STOPS = 16
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20

_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    model: str | None = Field(None, description="As /v1/models calls it; may be left out.")

    def check(self) -> list[str]:
        """Names of the fields that are ignored. Raises ApiError for one that would change the answer."""
        return check_extra(self.model_extra)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="vLLM's: usage in every chunk.")


class GenerationRequest(_Body):
    """What completions and chats have in common."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = Field(None, description="0 takes the most likely token.")
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description=f"At most {MAX_BIASES} token ids.")
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = Field(None, description=f"At most {MAX_STOPS} texts.")
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Whom the job is for: a full queue is shared fairly among users.")
    priority: int | None = Field(None, description="Lower goes first, whatever the policy says.")
    timeout: float | None = Field(None, description="Seconds until nobody wants the answer any more.")

    def params(self, vocab_size: int, *, logprobs: int | None, **given: Any) -> SamplingParams:
        """Raises ApiError and InvalidRequest, naming the field. `given` goes before the body's fields."""
        fields: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                "frequency_penalty", "n", "stop", "stop_token_ids", "include_stop_str_in_output",
                "skip_special_tokens", "ignore_eos",
            )
        }  # fmt: skip
        fields |= {"logit_bias": self._biases(vocab_size), "logprobs": logprobs, **given}
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOPS:
            raise refused("stop", f"must hold at most {MAX_STOPS} texts, got {len(self.stop)}")
        if self.stop_token_ids is not None:
            self._check_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        if self.seed is not None:
            if not -(2**63) <= self.seed <= MAX_SEED:
                raise refused("seed", f"must be between -2^63 and 2^64 - 1, got {self.seed}")
            fields["seed"] = self.seed & MAX_SEED
        absent = {name for name, value in fields.items() if value is None and name != "max_tokens"}
        return SamplingParams(**{name: value for name, value in fields.items() if name not in absent})

    def _biases(self, vocab_size: int) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        if len(self.logit_bias) > MAX_BIASES:
            raise refused("logit_bias", f"must hold at most {MAX_BIASES} tokens, got {len(self.logit_bias)}")
        try:
            biases = {int(token): bias for token, bias in self.logit_bias.items()}
        except ValueError:
            raise refused("logit_bias", 'must have token ids as keys, such as {"50256": -100}') from None
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
        return super().check()


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[Any, Field(json_schema_extra=_PROMPT_SCHEMA)]
    echo: bool | None = None
    logprobs: int | None = Field(None, description="This many alternatives of every token.")
    best_of: int | None = Field(None, description="Only as many as n.")
    add_special_tokens: bool | None = Field(None, description="Such as a beginning-of-sequence token; true.")

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

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: StrictBool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = Field(None, description="The template writes its own; false.")

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

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    tokens: list[int]
