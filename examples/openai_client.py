"""FastServe through OpenAI's own client, which needs to know only where the server is.

fastserve serve                                     # in another terminal
pip install openai
python examples/openai_client.py [http://127.0.0.1:8000]
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from openai import AsyncOpenAI


async def ask(client: AsyncOpenAI, model: str, question: str, priority: int, max_tokens: int) -> tuple[str, Any]:
    """The answer, and what FastServe tells of its time: seconds in the queue, in prefill, in decode, and swapping."""
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_completion_tokens=max_tokens,
        seed=7,  # the same question with the same seed has the same answer
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"priority": priority},  # lower goes first; without it, the scheduler decides alone
    )
    text, spent = "", None
    async for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        if chunk.usage is not None:  # in the last event
            spent = (chunk.usage.model_extra or {})["fastserve"]
    return text, spent


async def main(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=os.environ.get("FASTSERVE_API_KEY", "none")) as client:
        model = (await client.models.list()).data[0].id
        asked = {
            "in the background": ask(client, model, "Tell me a long story about a lighthouse.", 10, 120),
            "as usual": ask(client, model, "Why is the sky blue?", 0, 60),
            "urgently": ask(client, model, "What is the capital of France?", -10, 20),
        }
        for how, (text, spent) in zip(asked, await asyncio.gather(*asked.values()), strict=True):
            print(f"--- {how}: {spent}\n{text.strip()}\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8000"))
