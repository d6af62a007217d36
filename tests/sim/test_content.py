"""What tokens prompts hold whose content is known, and what it takes to tell."""

from __future__ import annotations

import tracemalloc
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.workloads import SimJob
from fastserve.workloads.content import Answer, ContentPrompt, content_tokens

VOCABULARY = 2**31 - 1


def tokens_of(job: SimJob) -> list[int]:
    return list(ContentPrompt(job, 2, VOCABULARY))


CONTENTS = st.builds(
    lambda content, block, part: SimJob(
        0.0, max(1, block * (len(content) - 1) + part % block + 1), 1, content=tuple(content), content_block=block
    ),
    st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6),
    st.integers(1, 40),
    st.integers(0, 39),
)


@given(CONTENTS, st.integers(0, 300), st.integers(0, 300))
def test_a_part_of_a_prompt_is_a_part_of_the_whole(job: SimJob, start: int, stop: int) -> None:
    prompt, whole = ContentPrompt(job, 2, 1000), tokens_of(job)
    assert len(whole) == len(prompt) == job.prompt_tokens and list(prompt) == np.asarray(prompt).tolist()
    assert prompt[start:stop] == list(prompt)[start:stop] and prompt[::-3] == list(prompt)[::-3]
    assert prompt[-1] == list(prompt)[-1] and all(2 <= token < 1000 for token in prompt)
    with pytest.raises(IndexError):
        prompt[job.prompt_tokens]


def test_tokens_are_what_they_were_in_earlier_releases() -> None:
    """Splitmix64 of the identity's splitmix64, as many steps on as the token has places before it, in plain Python."""
    word = 2**64 - 1

    def mixed(state: int) -> int:
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & word
        state = (state ^ state >> 27) * 0x94D049BB133111EB & word
        return state ^ state >> 31

    job = SimJob(0.0, 40, 1, content=(7, 2**63 - 1, 9), content_block=16)
    expected = [
        2 + mixed(mixed(job.content[at // 16]) + (at % 16 + 1) * 0x9E3779B97F4A7C15 & word) % (VOCABULARY - 2)
        for at in range(40)
    ]  # fmt: skip
    assert tokens_of(job) == expected
    assert ContentPrompt(job, 2, VOCABULARY).array(13, 35).tolist() == expected[13:35]


def test_of_a_long_part_only_what_is_asked_for_is_worked_out() -> None:
    job = SimJob(0.0, 2**24, 1, content=(7,), content_block=2**24)
    prompt = ContentPrompt(job, 2, VOCABULARY)
    tracemalloc.start()
    try:
        tokens = prompt[2**23 : 2**23 + 16]
        assert [prompt[2**23 + at] for at in range(16)] == tokens and len(set(tokens)) == 16
        assert list(islice(prompt, 20)) == prompt[:20]
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(8, 600))
def test_equal_identities_are_equal_tokens_and_others_are_not(one: int, other: int, block: int) -> None:
    def tokens(*identities: int) -> list[int]:
        return tokens_of(SimJob(0.0, block * len(identities), 1, content=identities, content_block=block))

    assert tokens(one, other)[:block] == tokens(one) == tokens(other, one)[block:]
    assert (tokens(one) == tokens(other)) == (one == other)


def test_a_salt_gives_other_tokens() -> None:
    job = SimJob(0.0, 40, 1, content=(7, 8, 9), content_block=16)

    def salted(salt: bytes) -> list[int]:
        return content_tokens(job, 0, 40, first=300, ids=1000, salt=salt).tolist()

    assert salted(b"a") == salted(b"a") != salted(b"b") and salted(b"") != salted(b"a")
    assert all(300 <= token < 1300 for token in salted(b"a"))


def test_answers_are_where_they_were_given() -> None:
    job = SimJob(0.0, 40, 1, content=(7, 8, 9), content_block=16)
    plain, prompt = tokens_of(job), ContentPrompt(job, 2, VOCABULARY, (Answer(10, 5, 1), Answer(30, 2, 0)))
    expected = [*plain[:10], 0, 0, 0, 0, 1, *plain[15:30], 0, 0, *plain[32:]]
    assert list(prompt) == expected
    assert [prompt[a:b] for a in range(40) for b in range(a, 41)] == [
        expected[a:b] for a in range(40) for b in range(a, 41)
    ]
