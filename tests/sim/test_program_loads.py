"""Conversations and agents: how prompts nest, what a cache could find, and traces of them."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.types import InvalidRequest
from fastserve.workloads import (
    ProgramLoad,
    SimJob,
    Synthetic,
    calls_of,
    open_loop,
    parse_load,
    read_trace,
    write_mooncake,
    write_trace,
)
from fastserve.workloads.content import ContentPrompt, continues
from fastserve.workloads.programs import BLOCK
from fastserve.workloads.reuse import Reuse
from fastserve.workloads.specs import PROGRAMS

SPECS = ["chat:4,3", "chat:2,5,0.5,20,30,100", "agents", "agents:5,0", "agents:9,2,30,10,50,7"]
VOCABULARY = 2**31 - 1


def heads(spec: str, seed: int, count: int, rate: float = 1.0, arrivals: str = "poisson") -> list[SimJob]:
    return list(parse_load(spec, arrivals).jobs(seed, count, rate))


def tokens_of(job: SimJob) -> list[int]:
    return list(ContentPrompt(job, 2, VOCABULARY))


# --- what programs are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 60))
@settings(max_examples=15)
def test_every_prompt_begins_with_the_one_before_and_its_answer(spec: str, seed: int, count: int) -> None:
    load = parse_load(spec, "poisson")
    programs = list(load.jobs(seed, count, 1.0))
    assert sum(len(list(calls_of(job))) for job in programs) == count
    for job in programs:
        for before, after in pairwise(calls_of(job)):
            assert after.prompt_tokens > before.prompt_tokens + before.output_tokens
            assert continues(before, after)
            assert tokens_of(after)[: before.prompt_tokens] == tokens_of(before)
            assert (before.program, before.user) == (after.program, after.user)
        for call in calls_of(job):
            assert call.content is not None and call.content_block == BLOCK
            assert len(call.content) == math.ceil(call.prompt_tokens / BLOCK)
            assert call.prompt_tokens + call.output_tokens <= load.longest
            assert call.think_time >= 0


def test_programs_differ_but_for_what_they_share() -> None:
    programs = heads("chat:1,4,0,40,10,320", 3, 60)
    beginnings = {tuple(tokens_of(job)[:320]) for job in programs}
    assert 2 <= len(beginnings) <= 8, "eight system prompts, of different popularity"
    private = [tuple(tokens_of(job)[320:336]) for job in programs]
    assert len(set(private)) == len(programs)
    counts = sorted(sum(tuple(tokens_of(job)[:320]) == each for job in programs) for each in beginnings)
    assert counts[-1] >= 3 * counts[0], "by Zipf's law"


def test_turns_and_users_are_as_asked_for() -> None:
    programs = heads("chat:4,3", 0, 40)
    assert [len(list(calls_of(job))) for job in programs] == [4] * 10
    assert [job.user for job in programs] == [f"user-{number % 3}" for number in range(10)]
    assert len({job.program for job in programs}) == 10


def test_agents_have_two_to_most_calls_as_their_tools_have_it() -> None:
    """The four sets of tools take 2–4, 4–6, 6–11 and 11–20 calls, and 12, 6, 4 and 3 of 25 agents have them."""
    by_tools: dict[int, list[int]] = {}
    for job in heads("agents:20", 1, 60_000)[:-1]:
        assert job.content is not None
        by_tools.setdefault(job.content[0], []).append(len(list(calls_of(job))))
    count = sum(map(len, by_tools.values()))
    ranges = {(min(lengths), max(lengths)): lengths for lengths in by_tools.values()}
    for (low, high), share in (((2, 4), 12), ((4, 6), 6), ((6, 11), 4), ((11, 20), 3)):
        lengths = np.array(ranges[low, high])
        assert len(lengths) / count == pytest.approx(share / 25, abs=4 * math.sqrt(1 / 4 / count))
        assert lengths.mean() == pytest.approx((low + high) / 2, abs=4 * lengths.std() / math.sqrt(len(lengths)))


def test_means_are_as_asked_for() -> None:
    calls = [call for job in heads("chat:3,1,7,50,80,160", 2, 30_000) for call in calls_of(job)]
    assert np.mean([call.output_tokens for call in calls]) == pytest.approx(80, rel=0.02)
    assert np.mean([call.think_time for call in calls if call.then]) == pytest.approx(7, rel=0.05)


def test_calls_come_at_the_rate() -> None:
    programs = heads("agents:8", 0, 20_000, rate=5.0)
    assert 20_000 / programs[-1].arrival == pytest.approx(5.0, rel=0.05)
    assert programs[0].arrival == 0.0


@pytest.mark.parametrize("spec", SPECS)
def test_equal_seeds_give_equal_programs_at_every_rate(spec: str) -> None:
    def without_times(jobs: list[SimJob]) -> list[list[tuple[object, ...]]]:
        return [[(call.prompt_tokens, call.output_tokens, call.content) for call in calls_of(job)] for job in jobs]

    assert without_times(heads(spec, 5, 90)) == without_times(heads(spec, 5, 90, 7.0, "burst:4"))
    assert without_times(heads(spec, 5, 90)) != without_times(heads(spec, 6, 90))
    assert without_times(heads(spec, 5, 90))[:-1] == without_times(heads(spec, 5, 500))[: len(heads(spec, 5, 90)) - 1]


@pytest.mark.parametrize("spec", SPECS)
def test_a_names_is_how_it_is_asked_for(spec: str) -> None:
    load = parse_load(f" {spec.upper()} ", "poisson")
    assert isinstance(load, ProgramLoad) and load.name == spec
    assert isinstance(parse_load("zipf:2", "poisson"), Synthetic)
    assert all(entry.usage.startswith(name) and entry.help for name, entry in PROGRAMS.items())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("chat", r"must be written chat:TURNS,USERS\[,THINK"),
        ("chat:0,1", "turns of chat must be an integer between 1"),
        ("chat:1,0", "users of chat must be an integer between 1"),
        ("chat:1,1,-1", "think-time of chat must be a number between 0"),
        ("chat:1,1,0,0", "mean message must be an integer between 1"),
        ("chat:1,1,0,5,5,-1", "tokens of system prompts must be an integer between 0"),
        ("agents:1", "most calls of agents must be an integer between 2"),
        ("agents:2,x", "with numbers"),
        ("chats:2", r"must be one of sharegpt.*chat:TURNS.*agents\[:MOST.*got 'chats:2'"),
    ],
)
def test_a_bad_workload_is_explained(spec: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse_load(spec, "poisson")
    assert caught.value.field == "workload"


# --- the bound --------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=12),
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(0, 6),
)
def test_the_bound_is_what_brute_force_finds(
    contents: list[list[int]], content_block: int, block: int, cut: int
) -> None:
    jobs = [
        SimJob(0.0, max(1, len(each) * content_block - cut % content_block), 1, content=tuple(each),
               content_block=content_block)
        for each in contents
    ]  # fmt: skip
    reuse, seen, found = Reuse(block), set[tuple[int, ...]](), 0
    for job in jobs:
        reuse.add(job)
        tokens = tuple(tokens_of(job))
        ends = range(block, len(tokens) + 1, block)
        found += max((end for end in ends if tokens[:end] in seen and end < len(tokens)), default=0)
        seen |= {tokens[:end] for end in ends}
    assert (reuse.found_tokens, reuse.prompt_tokens) == (found, sum(job.prompt_tokens for job in jobs))


@pytest.mark.parametrize("spec", SPECS)
def test_the_bound_counts_answers_that_later_prompts_hold(spec: str) -> None:
    block, reuse, seen, found = 16, Reuse(16), set[tuple[str | None, tuple[int, ...]]](), 0
    for job in heads(spec, 4, 40):
        reuse.add(job)
        for call in calls_of(job):
            tokens = tuple(tokens_of(call))
            ends = range(block, len(tokens), block)
            found += max((end for end in ends if (job.user, tokens[:end]) in seen), default=0)
            if call.then is not None:  # with its answer, but for the last token
                tokens = tuple(tokens_of(call.then)[: call.prompt_tokens + call.output_tokens - 1])
            seen |= {(job.user, tokens[:end]) for end in range(block, len(tokens) + 1, block)}
    assert reuse.found_tokens == found > 0


def test_without_content_nothing_is_found() -> None:
    reuse = Reuse(16)
    assert reuse.rate is None
    reuse.add(SimJob(0.0, 100, 5))
    reuse.add(SimJob(0.0, 100, 5))
    assert reuse.rate == 0.0


# --- traces -----------------------------------------------------------------------------------------------------------


def test_programs_are_read_as_they_were_written(tmp_path: Path) -> None:
    programs = heads("agents:6,1.5", 2, 50)
    assert write_trace(tmp_path / "agents.jsonl", programs) == len(programs)
    assert list(read_trace(tmp_path / "agents.jsonl")) == programs


def test_an_open_loop_has_every_call_when_a_free_server_would_get_it() -> None:
    last = SimJob(0.0, 64, 3, content=(1, 2), content_block=32)
    first = SimJob(1.0, 20, 5, content=(1,), content_block=32, then=last, think_time=2.0)
    asked = []

    def service(new: int, prompt: int, output: int) -> float:
        asked.append((new, prompt, output))
        return 10.0

    calls = list(open_loop([SimJob(0.0, 7, 7), first, SimJob(12.5, 8, 8), SimJob(14.0, 9, 9)], service))
    assert [(call.arrival, call.prompt_tokens) for call in calls] == [
        (0.0, 7), (1.0, 20), (12.5, 8), (13.0, 64), (14.0, 9)
    ]  # fmt: skip
    assert asked == [(20, 20, 5)] and all(call.then is None for call in calls)


@pytest.mark.parametrize("spec", SPECS)
def test_mooncakes_hashes_say_what_prompts_have_in_common(tmp_path: Path, spec: str) -> None:
    path = tmp_path / "mooncake.jsonl"
    jobs = list(open_loop(heads(spec, 1, 120), lambda new, prompt, output: new / 1e4 + output / 50))
    assert [job.arrival for job in jobs] == sorted(job.arrival for job in jobs)
    assert write_mooncake(path, jobs) == 120
    read = list(read_trace(path))
    assert [(job.prompt_tokens, job.output_tokens) for job in read] == [
        (job.prompt_tokens, job.output_tokens) for job in jobs
    ]
    assert [job.arrival for job in read] == pytest.approx([job.arrival for job in jobs], abs=1.1e-3)
    blocks = [[(job.user, *tokens_of(job)[: end + 512]) for end in range(0, job.prompt_tokens, 512)] for job in jobs]
    by_hash: dict[int, tuple[object, ...]] = {}
    for job, own in zip(read, blocks, strict=True):
        for identity, tokens in zip(job.content or (), own, strict=True):
            assert by_hash.setdefault(identity, tokens) == tokens
    assert len(set(by_hash.values())) == len(by_hash) == 1 + max(by_hash)
    keys = set(json.loads(path.read_text().splitlines()[0]))
    assert keys == {"timestamp", "input_length", "output_length", "hash_ids"}


def test_users_have_no_hashes_in_common(tmp_path: Path) -> None:
    jobs = [
        SimJob(number, 1100, 1, user, content=(5, 6), content_block=600)
        for number, user in enumerate(("ann", "bob", "ann", None, ""))
    ]
    write_mooncake(tmp_path / "x", jobs)
    hashes = [job.content for job in read_trace(tmp_path / "x")]
    assert hashes == [(0, 1, 2), (3, 4, 5), (0, 1, 2), (6, 7, 8), (6, 7, 8)], "without a user they are one tenant's"


def test_parts_of_other_lengths_have_no_hashes_in_common(tmp_path: Path) -> None:
    """Equal identities, cut elsewhere, are other tokens."""
    jobs = [SimJob(0.0, 512, 1, content=(5, 6), content_block=block) for block in (300, 400, 300)]
    write_mooncake(tmp_path / "x", jobs)
    assert [job.content for job in read_trace(tmp_path / "x")] == [(0,), (1,), (0,)]


def test_a_trace_of_mooncakes_has_no_calls_that_wait(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="open loop"):
        write_mooncake(tmp_path / "x", heads("chat:2,1", 0, 2))
    write_mooncake(tmp_path / "x", [SimJob(0.0, 1000, 1), SimJob(0.5, 3, 1)])
    assert [job.content for job in read_trace(tmp_path / "x")] == [(0, 1), (2,)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}',
            "line 1: hash_ids must hold 2 identities, one for each 512 of 513 tokens, got 1$",
        ),
        (
            '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [-1]}',
            "hash_ids must hold whole numbers between 0 and 9223372036854775807, got -1$",
        ),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [true]}', "whole numbers.*got True$"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": "ab"}', "hash_ids must be a list"),
        *(
            (f'{{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": {ids}}}', f"hash_ids .* got {got}$")
            for ids, got in (("0", "0"), ('""', "''"), ("{}", "{}"), ("false", "False"))
        ),
        *(
            (
                f'{{"arrival": 0, "prompt_tokens": 5, "output_tokens": 1, "{key}": "ann\\udc80"}}',
                f"line 1: {key} must be valid Unicode, and has a lone surrogate at character 3$",
            )
            for key in ("user", "program")
        ),
        (
            '{"arrival": 0, "prompt_tokens": 5, "output_tokens": 1, '
            '"then": [{"prompt_tokens": 1, "output_tokens": 1, "user": "\\ud800"}]}',
            "line 1: user must be valid Unicode",
        ),
        (
            '{"arrival": 0, "prompt_tokens": 5, "output_tokens": 1, "content": [1], "content_block": 0}',
            "content_block must be between 1 and",
        ),
        ('{"arrival": 0, "prompt_tokens": 5, "output_tokens": 1, "then": {}}', "then must be a list of calls, got {}$"),
        ('{"arrival": 0, "prompt_tokens": 5, "output_tokens": 1, "then": [3]}', "then must hold JSON objects, got 3$"),
        (
            '{"arrival": 0, "prompt_tokens": 5, "output_tokens": 1, '
            '"then": [{"prompt_tokens": 0, "output_tokens": 1}]}',
            "a prompt must have at least 1 token, got 0$",
        ),
        (
            '{"arrival": 0, "prompt_tokens": 5, "output_tokens": 1, '
            '"then": [{"prompt_tokens": 1, "output_tokens": 0}]}',
            "a call in then must have at least 1 output token, got 0$",
        ),
        (
            '{"arrival": 0, "prompt_tokens": 5, "output_tokens": 1, "think_time": -1, '
            '"then": [{"prompt_tokens": 1, "output_tokens": 1}]}',
            "think_time must be at least 0, got -1.0$",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InvalidRequest, match=message):
        list(read_trace(path))


@pytest.mark.parametrize("ids", ['"hash_ids": null', '"hash_ids": []', '"other": 0'])
def test_nothing_may_be_known_of_a_prompt(tmp_path: Path, ids: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f'{{"timestamp": 0, "input_length": 5, "output_length": 1, {ids}}}\n')
    assert list(read_trace(path)) == [SimJob(0.0, 5, 1)]
