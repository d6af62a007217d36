"""A chat of several turns, and an agent's chain of calls, with OpenAI's Python client (`pip install openai`).

    fastserve serve --model smollm2
    python examples/conversation.py [http://127.0.0.1:8000]

With keys on (`fastserve serve --api-key …`), set FASTSERVE_API_KEY.
"""

from __future__ import annotations

import os
import sys
import uuid
from typing import Any

from openai import OpenAI


def answer(client: OpenAI, model: str, messages: list[Any], **more: Any) -> tuple[str, str]:
    """The next message, and how much of the conversation the server had computed already."""
    said = client.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=48, temperature=0, user="ann", extra_body=more
    )
    usage = said.usage
    assert usage is not None  # it always comes
    details = usage.prompt_tokens_details
    found = details.cached_tokens if details is not None else None
    return said.choices[0].message.content or "", f"{found} of {usage.prompt_tokens} prompt tokens were cached"


def main(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("FASTSERVE_API_KEY", "none"))
    model = client.models.list().data[0].id

    # A conversation needs nothing: every turn finds what the turns before have computed.
    messages: list[Any] = [{"role": "system", "content": "You are a friendly guide to the lighthouses of the world."}]
    for question in ("Which lighthouse should I see first?", "How old is it?", "And who lives there?"):
        messages.append({"role": "user", "content": question})
        text, found = answer(client, model, messages)
        messages.append({"role": "assistant", "content": text})
        print(f"--- {question} ({found})\n{text.strip()}\n")

    # An agent says which calls are its own: together they are one job to the scheduler, and its KV is kept while it
    # thinks. Every run draws a new name: under an old one it would be taken for more of the same. The salt keeps what
    # it works on from all who do not know it.
    agent = f"agent-{uuid.uuid4()}"
    steps: list[Any] = []
    for step in ("Plan a day at the sea. First: the morning.", "Next: the afternoon.", "Last: the evening."):
        steps.append({"role": "user", "content": step})
        text, found = answer(client, model, steps, program_id=agent, cache_salt="only-ours")
        steps.append({"role": "assistant", "content": text})
        print(f"--- {agent}, {step} ({found})\n{text.strip()}\n")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8000")
