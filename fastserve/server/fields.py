"""Fields of OpenAI's and vLLM's requests that are not supported: what of them changes nothing, and what is refused.

A field that is in none of these tables is ignored with a warning, as vLLM does: clients send extras of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .errors import unsupported

logger = logging.getLogger("fastserve.server")

# They change nothing of an answer, whatever they are: what is billed, stored, cached or filed under.
_NO_EFFECT = frozenset(
    {
        "metadata", "store", "service_tier", "prompt_cache_retention", "prediction", "parallel_tool_calls",
        "request_id", "spaces_between_special_tokens",
    }
)  # fmt: skip

# They would change the answer. Those values are what an answer is like without them; null always is.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # of no tools
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "reasoning": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "grammar": ("",),
    "json_schema": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "thinking_token_budget": (),
    # of conversations
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "include_reasoning": (True, False),
    # of samplers that are not here
    "mirostat": (0,),
    "typical_p": (1, 1.0),
    "tfs_z": (1, 1.0),
    "dry_multiplier": (0, 0.0),
    "xtc_probability": (0, 0.0),
}
_warned: set[str] = set()
# A client may make names up: so many are warned of, and so many of a request are told, shortened to so many characters.
_MAX_WARNED, _MAX_TOLD, _MAX_NAME = 100, 32, 64


def check_extra(extra: Mapping[str, Any] | None) -> list[str]:
    """The names of those that are ignored. Raises ApiError for a field that would change the answer."""
    ignored = []
    for name, value in (extra or {}).items():
        if name in _REFUSED:
            if value is not None and not any(_same(value, plain) for plain in _REFUSED[name]):
                raise unsupported(name)
        elif name not in _NO_EFFECT:
            ignored.append(name[:_MAX_NAME])
    del ignored[_MAX_TOLD:]
    for name in ignored:
        if name not in _warned and len(_warned) < _MAX_WARNED:
            _warned.add(name)
            logger.warning("ignoring %r, a field of a request that is not known (said once)", name)
    return ignored


def _same(value: Any, plain: Any) -> bool:
    return type(value) is type(plain) and bool(value == plain)  # False is not 0 here
