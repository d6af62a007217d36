"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Depends, Request, Response

from .answers import Answer, Generation
from .openapi import PROGRAM_ID, REQUEST_ID, TIMEOUT, generation
from .prompts import encode_chat
from .protocol import ChatRequest
from .requestlog import RequestLog
from .requests import origin_of, require_json, timeout_of
from .schemas import ChatCompletion, ChatCompletionChunk
from .service import Service
from .shapes import ChatShape, Shape, Style


def router(service: Service) -> APIRouter:
    routes = APIRouter(dependencies=[Depends(require_json)])

    @routes.post(
        "/v1/chat/completions",
        response_class=Response,
        responses=generation(ChatCompletion, ChatCompletionChunk),
        openapi_extra={"parameters": [REQUEST_ID, TIMEOUT, PROGRAM_ID]},
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Answer:
        """Say the next message of a conversation."""
        log = RequestLog.of(request.scope)
        log.ignored = body.check()
        model = service.check_model(body.model)
        longest = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        params = body.params(
            service.limits.vocab_size,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            max_tokens=longest,  # None: until the context is full
        )
        tokenizer = service.need_tokenizer("messages", "use /v1/completions with token ids")

        async def prompts() -> list[list[int]]:
            tokens = await encode_chat(
                tokenizer,
                body.messages,
                add_generation_prompt=body.add_generation_prompt is not False,
                add_special_tokens=bool(body.add_special_tokens),
                limits=service.limits,
            )
            return [tokens]

        def shape(tokens: Sequence[list[int]]) -> Shape:
            style = Style(
                id=f"chatcmpl-{log.request_id}",
                model=model,
                tokenizer=tokenizer,
                logprobs=params.logprobs is not None,
                skip_special_tokens=params.skip_special_tokens,
                usage=body.wants_usage,
            )
            return ChatShape(style)

        asked = Generation(
            prompts=prompts,
            count=1,
            shape=shape,
            params=params,
            origin=origin_of(request, log, body),
            priority=body.priority or 0,
            timeout=timeout_of(request, body),
            stream=bool(body.stream),
            usage=body.wants_usage,
            usage_always=body.wants_usage_always,
        )
        return Answer(service, asked, log)

    return routes
