"""Whatever JSON comes, the answer is a 200 or says what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

from http_world import World, run
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

MODELS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.integers(), st.floats(), st.text("abZ <\ud800\0é", max_size=4)
)
_values = st.recursive(
    _scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "4", "include_usage"]), inner, max_size=3),
        st.fixed_dictionaries({"role": st.sampled_from(["user", "tool", "assistant"]), "content": inner}).map(
            lambda message: [message]
        ),
    ),
    max_leaves=6,
)


@st.composite
def _requests(draw: Any) -> tuple[str, bytes]:
    path = draw(st.sampled_from(sorted(MODELS)))
    names = sorted(MODELS[path].model_fields)
    body = draw(st.one_of(_values, st.dictionaries(st.sampled_from(names), _values, max_size=5)))
    if isinstance(body, dict) and draw(st.booleans()):  # mostly right
        body |= {"prompt": "ab", "messages": [{"role": "user", "content": "a"}], "tokens": [4]}
    return path, json.dumps(body).encode()


@settings(max_examples=40)
@given(st.lists(_requests(), min_size=5, max_size=20))
def test_no_body_breaks_the_server(requests: list[tuple[str, bytes]]) -> None:
    async def scenario(world: World) -> None:
        for path, body in requests:
            response = await world.client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert response.status_code in (200, 400, 404, 408), (path, body, response.text)
            if response.status_code != 200:
                error = response.json()["error"]
                assert error["message"] and error["type"] == "invalid_request_error"

    run(scenario, max_body_size="1M")
