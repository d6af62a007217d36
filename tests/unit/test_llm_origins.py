"""LLM: whose a request is, and what the prefix cache has of it."""

from __future__ import annotations

from typing import Any

import pytest
import toy_llm
from toy_llm import ToyWorld

from fastserve import InvalidRequest, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, seed=5)
CONVERSATION = [{"role": "user", "content": "hi"}]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    return toy_llm.enter(monkeypatch)


def origins(llm: Any) -> list[tuple[str, str | None, str]]:
    """Of the live jobs."""
    return [(job.tenant, job.program, job.cache_salt) for job in llm._engine.jobs]


def test_tenant_program_and_salt_reach_the_job(world: ToyWorld) -> None:
    with world.llm() as llm:
        given: dict[str, Any] = {"tenant": "ann", "program_id": "agent", "cache_salt": "s"}
        streams = [llm.stream("abc", GREEDY, **given), llm.stream_chat(CONVERSATION, GREEDY, **given)]
        each = {"tenant": ["ann", "bob"], "program_id": ["agent", None], "cache_salt": ["", "s"]}
        streams.append(llm.stream(["a", "b"], GREEDY, **each))
        for stream in streams:
            next(stream)
        assert origins(llm) == [("ann", "agent", "s")] * 2 + [("ann", "agent", ""), ("bob", None, "s")]
        for stream in streams:
            stream.close()


def test_calls_that_answer_at_once_take_them_too(world: ToyWorld) -> None:
    seen: set[tuple[str, str | None, str]] = set()
    with world.llm(on_iteration=lambda record: seen.update(origins(llm))) as llm:
        more: dict[str, Any] = {"tenant": "ann", "program_id": "agent"}
        llm.generate("abc", GREEDY, cache_salt="1", **more)
        llm.chat(CONVERSATION, GREEDY, cache_salt="2", **more)
        llm.replay([(0.0, "abc", GREEDY)], cache_salt="3", **more)
    assert seen == {("ann", "agent", salt) for salt in "123"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tenant": 4}, r"tenant: must be a string, got 4"),
        ({"tenant": None}, r"tenant: must be a string, got None"),
        ({"tenant": ["ann"]}, r"tenant: must be a string, or one for each of 2, got \['ann'\]"),
        ({"tenant": ["ann", 4]}, r"tenant: must be a string, got 4 \(request 2 of 2\)"),
        ({"program_id": "p" * 257}, r"program_id: must have at most 256 characters, got 257"),
        ({"program_id": b"ab"}, r"program_id: must be a string, got 97"),
        ({"cache_salt": "\ud800"}, r"cache_salt: must be valid Unicode"),
    ],
)
def test_what_is_no_origin_is_refused(world: ToyWorld, given: dict[str, Any], message: str) -> None:
    with world.llm() as llm:
        with pytest.raises(InvalidRequest, match=message):
            llm.generate(["a", "b"], GREEDY, **given)
        assert world.plans == []


def test_the_options_of_the_cache_reach_the_scheduler(world: ToyWorld) -> None:
    with world.llm() as llm:
        assert llm._engine is not None and llm._engine.config.enable_prefix_caching
        assert llm.info["enable_prefix_caching"] is True and llm.info["tenant_weights"] == {}
    with world.llm(enable_prefix_caching=False, tenant_weights={"ann": 2}) as llm:
        assert llm._engine is not None and not llm._engine.config.enable_prefix_caching
        assert llm._engine.config.tenant_weights == llm.info["tenant_weights"] == {"ann": 2.0}
    with pytest.raises(InvalidRequest, match="tenant_weights"):
        world.llm(tenant_weights={"ann": 0})
    with pytest.raises(InvalidRequest, match="enable_prefix_caching: must be True or False"):
        world.llm(enable_prefix_caching="yes")


def test_cached_tokens_of_several_answers_are_the_first_ones(world: ToyWorld) -> None:
    with world.llm() as llm:
        (output,) = llm.generate("abc", SamplingParams(n=3, max_tokens=4, ignore_eos=True))
    for answer, found in zip(output.outputs, (2, 3, 3), strict=True):
        answer.metrics.cached_tokens, answer.metrics.finish = found, 100.0 + answer.index
    assert output.metrics.cached_tokens == output.num_cached_tokens == 2
    assert output.metrics.as_dict(4)["cached_tokens"] == 2
