"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Depends, Request, Response

from ..types import FinishReason
from .answers import Answer, Generation
from .jobs import OpenJob
from .openapi import PROGRAM_ID, REQUEST_ID, TIMEOUT, generation
from .prompts import as_prompts, encode
from .protocol import CompletionRequest
from .requestlog import RequestLog
from .requests import origin_of, require_json, timeout_of
from .schemas import Completion, CompletionChunk
from .service import Service
from .shapes import DONE, CompletionShape, Shape, Style
from .shapes import encode as as_json
from .usage import final_usage, usage

_MAX_TOKENS = 16  # OpenAI's default


def router(service: Service) -> APIRouter:
    routes = APIRouter(dependencies=[Depends(require_json)])

    @routes.post(
        "/v1/completions",
        response_class=Response,
        responses=generation(Completion, CompletionChunk),
        openapi_extra={"parameters": [REQUEST_ID, TIMEOUT, PROGRAM_ID]},
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Go on from a prompt, or from each of several."""
        log = RequestLog.of(request.scope)
        log.ignored = body.check()
        model = service.check_model(body.model)
        limits = service.limits
        params = body.params(
            limits.vocab_size,
            logprobs=body.logprobs,
            max_tokens=_MAX_TOKENS if body.max_tokens is None else body.max_tokens + body.only_echo,
        )
        given = as_prompts(body.prompt, service.admission.most)
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
            origin=origin_of(request, log, body),
            priority=body.priority or 0,
            timeout=timeout_of(request, body),
            stream=bool(body.stream),
            usage=body.wants_usage,
            usage_always=body.wants_usage_always,
        )
        return await _echo(service, asked, log) if body.only_echo else Answer(service, asked, log)

    return routes


async def _echo(service: Service, asked: Generation, log: RequestLog) -> Response:
    """The prompts as they are, with nothing after them: the engine has no part in it."""
    places = asked.count * asked.params.n
    service.admission.enter(asked.origin.tenant, places)
    try:
        prompts = await asked.prompts()
    finally:
        service.admission.leave(asked.origin.tenant, places)
    for prompt in prompts:
        service.limits.check("prompt", prompt)
    job = OpenJob(0, [], asked.params, 0, 0, 0.0, asked.origin, None)
    job.end(FinishReason.LENGTH)
    jobs, shape = [job] * places, asked.shape(prompts)
    log.prompt_tokens = sum(map(len, prompts))
    log.tell(jobs)
    whole = final_usage(log.prompt_tokens, jobs, asked.params.n)
    if not asked.stream:
        return Response(as_json(shape.whole(jobs, whole)), media_type="application/json")
    told = usage(log.prompt_tokens, jobs) if asked.usage_always else None
    events = [shape.opening(index, told) + shape.chunk(index, job, "", 0, told) for index in range(places)]
    last = shape.closing(whole) if asked.usage else b""
    return Response(b"".join([*events, last, DONE]), media_type="text/event-stream")
