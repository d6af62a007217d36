"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Depends, Request, Response

from .answers import Answer, Generation
from .openapi import REQUEST_ID, TIMEOUT, generation
from .prompts import as_prompts, encode
from .protocol import CompletionRequest
from .requestlog import RequestLog
from .requests import require_json, timeout_of, user_of
from .schemas import Completion, CompletionChunk
from .service import Service
from .shapes import CompletionShape, Shape, Style

_MAX_TOKENS = 16  # OpenAI's default


def router(service: Service) -> APIRouter:
    routes = APIRouter(dependencies=[Depends(require_json)])

    @routes.post(
        "/v1/completions",
        response_class=Response,
        responses=generation(Completion, CompletionChunk),
        openapi_extra={"parameters": [REQUEST_ID, TIMEOUT]},
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Answer:
        """Go on from a prompt, or from each of several."""
        log = RequestLog.of(request.scope)
        log.ignored = body.check()
        model = service.check_model(body.model)
        limits = service.limits
        params = body.params(
            limits.vocab_size,
            logprobs=body.logprobs,
            max_tokens=_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        )
        given = as_prompts(body.prompt, service.admission.capacity)
        if params.stop:
            service.need_tokenizer("stop", "use stop_token_ids")
        special = body.add_special_tokens is not False

        async def prompts() -> list[list[int]]:
            texts = [each for each in given if isinstance(each, str)]
            if not texts:
                return [each for each in given if not isinstance(each, str)]
            return await encode(service.need_tokenizer("prompt", "send token ids"), texts, special, limits)

        def shape(tokens: Sequence[list[int]]) -> Shape:
            style = Style(
                id=f"cmpl-{log.request_id}",
                model=model,
                tokenizer=service.tokenizer,
                logprobs=params.logprobs is not None,
                skip_special_tokens=params.skip_special_tokens,
                usage=body.wants_usage,
            )
            return CompletionShape(style, echo=_texts(tokens) if body.echo else None, n=params.n)

        def _texts(tokens: Sequence[list[int]]) -> list[str]:
            tokenizer = service.need_tokenizer("echo", "leave echo out")
            return [
                each if isinstance(each, str) else tokenizer.decode(ids, skip_special_tokens=False)
                for each, ids in zip(given, tokens, strict=True)
            ]

        asked = Generation(
            prompts=prompts,
            count=len(given),
            shape=shape,
            params=params,
            user=user_of(log, body),
            priority=body.priority or 0,
            timeout=timeout_of(request, body),
            stream=bool(body.stream),
            usage=body.wants_usage,
            usage_always=body.wants_usage_always,
        )
        return Answer(service, asked, log)

    return routes
