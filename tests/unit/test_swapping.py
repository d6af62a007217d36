"""LLM and AsyncLLM with too little KV memory, and with priorities: what the options do, and that no word changes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import toy_llm
from toy import expected_output
from toy_llm import BLOCK_BYTES, CONTEXT, SPEC, ToyWorld

from fastserve import InvalidRequest, RequestOutput, SamplingParams
from fastserve.engine import IterationRecord
from fastserve.native import block_bytes
from fastserve.types import OFFLOAD, UPLOAD

PRESSED = {"kv_cache_memory": 8 * BLOCK_BYTES, "policy": "mlfq", "max_num_seqs": 3, "num_levels": 4}
PROMPTS = [[(7 * i + k) % 60 for i in range(20 + 5 * k)] for k in range(8)]  # two to four blocks of 16
PARAMS = [SamplingParams(temperature=0, max_tokens=20 + 9 * (k % 4), ignore_eos=True, seed=k) for k in range(8)]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    return toy_llm.enter(monkeypatch)


def tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def expected() -> list[list[int]]:
    return [
        expected_output(prompt, params, params.seed or 0, CONTEXT)
        for prompt, params in zip(PROMPTS, PARAMS, strict=True)
    ]


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("swap_mode", ["proactive", "reactive"])
def test_kv_goes_to_the_host_and_no_word_changes(world: ToyWorld, swap_mode: Any, max_in_flight: int) -> None:
    records: list[IterationRecord] = []
    options: dict[str, Any] = {"swap_mode": swap_mode, "max_in_flight": max_in_flight, "swap_space": 40 * BLOCK_BYTES}
    with world.llm(**PRESSED, **options, on_iteration=records.append) as llm:
        measured = dict(world.runtimes[-1].copied)
        outputs = llm.generate(PROMPTS, PARAMS)
        assert llm._engine is not None
        llm._engine.check_integrity()
        info = llm.info
    assert tokens(outputs) == expected()
    assert (info["num_blocks"], info["num_host_blocks"], info["swap_mode"]) == (8, 40, swap_mode)
    assert info["swap_space_bytes"] == 40 * BLOCK_BYTES
    copied = world.runtimes[-1].copied
    assert copied[OFFLOAD] > measured[OFFLOAD] and copied[UPLOAD] > measured[UPLOAD]
    assert sum(record.copied_blocks for record in records) > 0
    assert sum(len(record.copies) for record in records) == sum(len(record.copy_seconds) for record in records) > 0


@pytest.mark.parametrize(
    "options", [{"swap_mode": "recompute"}, {"swap_space": 0}, {"swap_space": 0, "swap_mode": "reactive"}]
)
def test_without_a_host_pool_nothing_is_measured_and_kv_is_computed_again(
    world: ToyWorld, options: dict[str, Any]
) -> None:
    with world.llm(**PRESSED, **{"swap_space": 40 * BLOCK_BYTES, **options}) as llm:
        assert world.plans == []  # no link to measure
        info = llm.info
        outputs = llm.generate(PROMPTS, PARAMS)
    assert tokens(outputs) == expected()
    assert world.runtimes[-1].copied == {OFFLOAD: 0, UPLOAD: 0}
    assert (info["num_host_blocks"], info["swap_space_bytes"], info["link"]) == (0, 0, None)
    assert info["swap_mode"] == "recompute"


def test_reserve_holds_the_longest_output_from_the_start(world: ToyWorld) -> None:
    """Two jobs of 16 + 97 - 1 = 112 tokens take seven of eight blocks each, so they run one after the other."""
    params = SamplingParams(temperature=0, max_tokens=97, ignore_eos=True)
    prompts = [[1] * 16, [2] * 16]
    spans = {}
    for admission in ("paged", "reserve"):
        records: list[IterationRecord] = []
        options: dict[str, Any] = {**PRESSED, "policy": "fcfs", "admission": admission, "swap_space": "1M"}
        with world.llm(**options, on_iteration=records.append) as llm:
            outputs = llm.generate(prompts, params)
        assert [len(each) for each in tokens(outputs)] == [97, 97]
        spans[admission] = max(len(record.job_ids) for record in records)
    assert spans == {"paged": 2, "reserve": 1}


def test_the_link_is_measured_at_the_start(world: ToyWorld) -> None:
    """The toy copies a block in an eighth of a second, whatever else is in the copy."""
    with world.llm(swap_space="1M") as llm:
        link = llm.info["link"]
        assert len(world.plans) > 0
    assert link["offload_bytes_per_second"] == link["upload_bytes_per_second"] == BLOCK_BYTES / 0.125
    assert link["latency"] == 0.0


def test_info_is_a_copy_that_outlives_the_model(world: ToyWorld) -> None:
    llm = world.llm(slowdown_limit=8)
    llm.info["cost"]["per_iteration"] = 0
    llm.close()
    assert llm.info["cost"]["per_iteration"] == toy_llm.COST.per_iteration
    assert (llm.info["slowdown_limit"], llm.info["admission"]) == (8.0, "paged")


# --- priority ------------------------------------------------------------------------------------------------------

SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def order(outputs: Sequence[RequestOutput]) -> list[int]:
    """The requests by when they ended."""
    return sorted(range(len(outputs)), key=lambda i: outputs[i].metrics.finish or 0.0)


@pytest.mark.parametrize("policy", ["fcfs", "mlfq", "skip-join-mlfq", "gittins"])
def test_lower_priority_goes_first_under_every_policy(world: ToyWorld, policy: str) -> None:
    prompts = [[k + 1] for k in range(4)]
    with world.llm(policy=policy, max_num_seqs=1) as llm:
        assert order(llm.generate(prompts, SHORT, priority=[1, 0, -5, 0]))[0] == 2
        assert order(llm.generate(prompts, SHORT, priority=[1, 0, -5, 0]))[3] == 0
        conversations = [[{"role": "user", "content": word}] for word in ("a", "b")]
        assert order(llm.chat(conversations, SHORT, priority=[1, 0])) == [1, 0]
        requests = [(0.0, prompt, SHORT) for prompt in prompts]
        assert order(llm.replay(requests, priority=[3, 2, 1, 0])) == [3, 2, 1, 0]
        last = {output.prompt: i for i, output in enumerate(llm.stream(["a", "b"], SHORT, priority=[1, 0]))}
        assert last["b"] < last["a"]


def test_one_priority_is_for_all(world: ToyWorld) -> None:
    with world.llm(policy="fcfs", max_num_seqs=1) as llm:
        assert order(llm.generate([[1], [2], [3]], SHORT, priority=7)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("priority", "message"),
    [
        ([1], "priority: must be an integer, or one for each of 2"),
        ([1, 0.5], r"priority: must be an integer between .* got 0.5 \(request 2 of 2\)"),
        ("high", "priority: must be an integer"),
        (2**31, "priority: must be at most 2147483647"),
        (True, "priority: must be an integer"),
    ],
)
def test_a_priority_that_is_none_is_refused(world: ToyWorld, priority: Any, message: str) -> None:
    with world.llm() as llm:
        with pytest.raises(InvalidRequest, match=message):
            llm.generate([[1], [2]], SHORT, priority=priority)
        assert world.plans == []


def test_priorities_of_asynchronous_requests(world: ToyWorld) -> None:
    async def last(stream: Any) -> RequestOutput:
        async for output in stream:
            final = output
        return final

    async def main() -> list[RequestOutput]:
        async with world.async_llm(policy="fcfs", max_num_seqs=1) as llm:
            long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
            conversation = [{"role": "user", "content": "a"}]
            streams = [
                llm.generate([1], long, priority=5),
                llm.generate([2], long, priority=1),
                llm.chat(conversation, SHORT, priority=-1),
            ]
            with pytest.raises(InvalidRequest, match="priority"):
                llm.generate([3], SHORT, priority=None)  # type: ignore[arg-type]
            everybody_came = threading.Event()
            llm._send(lambda: everybody_came.wait() and None)  # the engine's thread looks at no request before
            answers = asyncio.gather(*map(last, streams))
            await asyncio.sleep(0)
            everybody_came.set()
            return await answers

    assert order(asyncio.run(main())) == [2, 1, 0]


def test_an_int8_kv_cache_holds_more_tokens_in_the_same_memory(world: ToyWorld) -> None:
    """The pools are sized by the type of the KV cache, and what was measured with another one does not count."""
    told, profiles = {}, set()
    for kv_cache_dtype in ("auto", "bfloat16", "float32", "int8"):
        with world.llm(kv_cache_memory="64K", swap_space="32K", kv_cache_dtype=kv_cache_dtype) as llm:
            told[kv_cache_dtype] = llm.info
            profiles.add(llm.profile_path)
    assert {kv: info["kv_cache_dtype"] for kv, info in told.items()} == {**{kv: kv for kv in told}, "auto": "bfloat16"}
    for info in told.values():
        block = block_bytes(SPEC, info["kv_cache_dtype"], 16)
        assert info["kv_cache_bytes"] == info["num_blocks"] * block <= 2**16 < (info["num_blocks"] + 1) * block
        assert info["swap_space_bytes"] == info["num_host_blocks"] * block <= 2**15
    blocks = {kv: info["num_blocks"] for kv, info in told.items()}
    assert blocks["int8"] > blocks["bfloat16"] == blocks["auto"] > blocks["float32"]
    assert len(profiles) == 3
