"""Detokenizing as tokens arrive: however they are split, the text is that of the whole decode, cut at a stop string."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from vocabularies import quick, sentencepiece, small_tokenizer, smollm2, texts

from fastserve.tokenizer import IncrementalDetokenizer, Tokenizer


def _pieces(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    bounds = [0, *sorted(cut % (len(tokens) + 1) for cut in cuts), len(tokens)]
    return [tokens[start:end] for start, end in pairwise(bounds)]


def _stream(tokenizer: Tokenizer, tokens: list[int], cuts: list[int], **options: Any) -> IncrementalDetokenizer:
    """Feed the tokens in pieces; what comes out, joined, must be `.text`."""
    detokenizer = IncrementalDetokenizer(tokenizer, **({"stop": ()} | options))
    out = ""
    for piece in _pieces(tokens, cuts):
        out += detokenizer.append(piece)
        assert detokenizer.text == out
    out += detokenizer.flush()
    assert detokenizer.text == out and detokenizer.flush() == ""
    return detokenizer


_cuts = st.lists(st.integers(0, 200), max_size=8)


@quick
@given(tokens=st.lists(st.integers(0, 49151), max_size=40), cuts=_cuts, skip=st.booleans())
def test_any_split_gives_the_whole_decode(tokens: list[int], cuts: list[int], skip: bool) -> None:
    text = smollm2().decode(tokens, skip_special_tokens=skip)
    assert _stream(smollm2(), tokens, cuts, skip_special_tokens=skip).text == text


@quick
@given(text=texts, cuts=_cuts)
def test_any_split_of_text_gives_the_text(text: str, cuts: list[int]) -> None:
    tokens = small_tokenizer().encode(text)  # a small vocabulary: most characters take several tokens
    assert _stream(small_tokenizer(), tokens, cuts, skip_special_tokens=False).text == text


@quick
@given(tokens=st.lists(st.integers(0, 276), max_size=40), cuts=_cuts, skip=st.booleans())
@example(tokens=[1, 259, 1, 261], cuts=[], skip=True)  # a skipped token between two words
@example(tokens=[259, 3 + 0xE4, 3 + 0xBD, 3 + 0xA0, 3 + 0xFF], cuts=[2, 4], skip=True)
def test_sentencepiece_any_split_gives_the_whole_decode(tokens: list[int], cuts: list[int], skip: bool) -> None:
    tokenizer = sentencepiece()
    text = tokenizer.decode(tokens, skip_special_tokens=skip)
    assert _stream(tokenizer, tokens, cuts, skip_special_tokens=skip).text == text


def test_incomplete_characters_are_held_back() -> None:
    tokenizer = small_tokenizer()
    tokens = tokenizer.encode("🙂", add_special_tokens=False) * 2
    detokenizer = IncrementalDetokenizer(tokenizer, (), False, True)
    half = len(tokens) // 2
    assert half > 1 or len(tokenizer.token_bytes(tokens[0])) == 4
    emitted = [detokenizer.append([token]) for token in tokens[:-1]]
    assert "\ufffd" not in "".join(emitted)


def test_incomplete_character_at_the_end() -> None:
    tokenizer = small_tokenizer()
    first = next(token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token) == b"\xf0")
    detokenizer = IncrementalDetokenizer(tokenizer, (), False, True)
    assert detokenizer.append([first]) == ""
    assert detokenizer.flush() == "\ufffd" == tokenizer.decode([first])


def _first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """By the definition: walk along the text; the first place where it ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return end - len(longest), end, longest
    return None


@quick
@given(
    text=st.text("ab\n🙂é", max_size=30),
    stops=st.lists(st.text("ab\n🙂é", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
    cuts=_cuts,
    include=st.booleans(),
)
@example(text="aab", stops=["ab", "aab"], cuts=[1, 2], include=False)
@example(text="abab", stops=["abb", "bab"], cuts=[], include=True)
def test_stop_strings_across_token_borders(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    tokens = small_tokenizer().encode(text)
    detokenizer = _stream(
        small_tokenizer(), tokens, cuts, stop=stops, include_stop_str_in_output=include, skip_special_tokens=True
    )
    match = _first_stop(text, stops)
    if match is None:
        assert (detokenizer.text, detokenizer.matched_stop) == (text, None)
    else:
        start, end, stop = match
        assert (detokenizer.text, detokenizer.matched_stop) == (text[: end if include else start], stop)


def test_a_possible_stop_string_is_held_back_and_released() -> None:
    tokenizer = small_tokenizer()
    detokenizer = IncrementalDetokenizer(tokenizer, ["END"], False, True)
    pieces = [detokenizer.append(tokenizer.encode(part)) for part in ("x", "E", "N", "x", "EN")]
    assert pieces == ["x", "", "", "ENx", ""]
    assert detokenizer.flush() == "EN" and detokenizer.text == "xENxEN"
    stopped = IncrementalDetokenizer(tokenizer, ["END"], False, True)
    assert stopped.append(tokenizer.encode("xEND and more")) == "x" and stopped.matched_stop == "END"
    assert stopped.append(tokenizer.encode("more")) == stopped.flush() == "" and stopped.text == "x"


@given(texts)
def test_pieces_are_the_bytes_of_a_text(text: str) -> None:
    """Those of a sentencepiece vocabulary show the space that is cut off at the start of a text."""
    for tokenizer in (sentencepiece(), small_tokenizer()):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(map(tokenizer.piece, tokens))
        assert joined.decode() in (text, f" {text}")
        assert tokenizer.piece(10**6) == b""


def test_long_stop_strings_take_no_more_memory_than_they_have_characters() -> None:
    tokenizer = small_tokenizer()
    stop = "ab" * 4000
    tokens = tokenizer.encode(stop[2:] + "x" + stop)
    tracemalloc.start()
    detokenizer = IncrementalDetokenizer(tokenizer, (stop, stop + "c"))
    for token in tokens:
        detokenizer.append((token,))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert detokenizer.matched_stop == stop and detokenizer.text == stop[2:] + "x"
    assert peak < 2**20


@quick
@given(
    text=st.text("ab", max_size=30),
    stop=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3),
    allowed=st.integers(0, 30),
)
def test_stop_strings_that_overlap_themselves(text: str, stop: list[str], allowed: int) -> None:
    """Held back is exactly what may become a stop string, and the first that ends late enough is found."""
    tokenizer = small_tokenizer()
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    ends = [end for end in range(allowed + 1, len(text) + 1) if any(text[:end].endswith(each) for each in stop)]
    for place, character in enumerate(text[: ends[0] if ends else None]):
        detokenizer.append(tokenizer.encode(character), match_stop=place >= allowed)
        seen = text[: place + 1]
        if detokenizer.matched_stop is None:
            begun = (len(seen) - at for at in range(len(seen)) if _begins_one(seen[at:], stop))
            assert detokenizer.text == seen[: len(seen) - max(begun, default=0)]
    if ends:
        matched = max((each for each in stop if text[: ends[0]].endswith(each)), key=len)
        assert detokenizer.matched_stop == matched and detokenizer.text == text[: ends[0] - len(matched)]
    else:
        assert detokenizer.matched_stop is None


def _begins_one(text: str, stop: list[str]) -> bool:
    return any(len(text) < len(each) and each.startswith(text) for each in stop)
