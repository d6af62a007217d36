"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends

from .errors import refused
from .logprobs import token_name
from .openapi import errors
from .prompts import encode, encode_chat
from .protocol import DetokenizeRequest, TokenizeRequest
from .requests import require_json
from .schemas import Detokenized, Tokenized
from .service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(dependencies=[Depends(require_json)])
    statuses = errors(400, 401, 404, 413, 415)

    @routes.post("/tokenize", responses={200: {"model": Tokenized}, **statuses})
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a prompt, or of a conversation as the model's template writes it."""
        body.check()
        service.check_model(body.model)
        tokenizer = service.need_tokenizer("prompt", "there is nothing to tokenize with")
        if (body.prompt is None) == (body.messages is None):
            raise refused("prompt", "send either a prompt or messages")
        if body.messages is not None:
            tokens = await encode_chat(
                tokenizer,
                body.messages,
                add_generation_prompt=body.add_generation_prompt is not False,
                add_special_tokens=bool(body.add_special_tokens),
            )
        else:
            assert body.prompt is not None  # one of the two is there
            (tokens,) = await encode(tokenizer, [body.prompt], body.add_special_tokens is not False)
        names = [token_name(tokenizer, token)[0] for token in tokens] if body.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": service.engine.max_model_len,
            "tokens": tokens,
            "token_strs": names,
        }

    @routes.post("/detokenize", responses={200: {"model": Detokenized}, **statuses})
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids, special ones included."""
        body.check()
        service.check_model(body.model)
        tokenizer = service.need_tokenizer("tokens", "there is nothing to detokenize with")
        vocab_size = service.engine.vocab_size
        for token in body.tokens:
            if not 0 <= token < vocab_size:
                raise refused("tokens", f"token ids are 0 to {vocab_size - 1} for this model, got {token}")
        return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}

    return routes
