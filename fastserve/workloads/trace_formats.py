"""The lines of trace files: formats told apart by what the first line holds, never by the file's name.

One format is no lines but a document of JSON, {"requests": [{"t_unit": …, "prompt_len": …, "output_len": …}, …]}: its
times are on the clock of one job a second, to be divided by the rate wanted.
"""

from __future__ import annotations

import csv
import json
import math
import reprlib
from collections.abc import Callable
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any, Final, NamedTuple

from .checks import LONGEST_JOB
from .content import MAX_IDENTITY
from .job import SimJob

MOONCAKE_BLOCK: Final = 512  # tokens of a hash in Mooncake's traces

FORMATS = (
    "Azure LLM CSV (TIMESTAMP,ContextTokens,GeneratedTokens), BurstGPT CSV (Timestamp,Model,Request tokens,Response "
    "tokens,…), Mooncake JSONL (timestamp, input_length, output_length, hash_ids), FastServe JSONL (arrival, "
    "prompt_tokens, output_tokens) and a JSON document of requests (t_unit, prompt_len, output_len)"
)


class BadLine(ValueError):
    """What is wrong with a line, without where it is."""


class Record(NamedTuple):
    """A job as its line tells it."""

    time: Decimal  # seconds on the trace's own clock; exact, since clocks start far from 0
    prompt_tokens: int
    output_tokens: int
    more: dict[str, Any]  # SimJob's other fields


_SHORT = reprlib.Repr()  # of whatever a line holds: an error is a line itself
_SHORT.maxstring = 60

Parser = Callable[[str], Record]  # raises BadLine

# (time, prompt, output) columns of each CSV format, and how its time is written.
_COLUMNS: tuple[tuple[tuple[str, str, str], Callable[[str], Decimal]], ...] = (
    (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), lambda text: _date(text)),
    (("Timestamp", "Request tokens", "Response tokens"), lambda text: _seconds(text)),
)


def parser_for(first: str) -> tuple[Parser | None, bool]:
    """How to read the lines of a file that begins with this one, and whether this one is a header; None: unknown."""
    if not first.lstrip().startswith("{"):
        return _csv_parser(first), True
    try:
        keys = set(_object(first))
    except BadLine:
        keys = set()
    if {"timestamp", "input_length", "output_length"} <= keys:
        return _mooncake, False
    if {"arrival", "prompt_tokens", "output_tokens"} <= keys:
        return _own, False
    return None, False


def in_order_of_end(first: str) -> bool:
    """Whether a file that begins with this line is what a server has recorded, a line when a job had ended."""
    try:
        return parser_for(first)[0] is _own and "ended" in _object(first)
    except BadLine:
        return False


def unit_requests(text: str) -> list[Any] | None:
    """The requests of a document, for `parse_unit`; None where the text is no such document."""
    try:
        requests = _object(text).get("requests")
    except BadLine:
        return None
    return requests if isinstance(requests, list) else None


def parse_unit(request: Any) -> Record:
    """A request of a document. Raises BadLine."""
    if not isinstance(request, dict):
        raise BadLine(f"must be a JSON object, got {_SHORT.repr(request)}")
    time = _seconds(_member(request, "t_unit"))
    return Record(time, _whole(request, "prompt_len"), _whole(request, "output_len"), {})


def _csv_parser(header: str) -> Parser | None:
    try:
        names = [name.strip() for name in _cells(header)]
    except BadLine:
        return None
    for columns, clock in _COLUMNS:
        if set(columns) <= set(names):
            return _parser_of_columns(names, columns, clock)
    return None


def _parser_of_columns(names: list[str], columns: tuple[str, str, str], clock: Callable[[str], Decimal]) -> Parser:
    at, prompt_at, output_at = map(names.index, columns)

    def parse(line: str) -> Record:
        cells = _cells(line)
        if len(cells) != len(names):
            raise BadLine(f"has {len(cells)} columns, and the header has {len(names)}")
        prompt, output = _tokens(columns[1], cells[prompt_at]), _tokens(columns[2], cells[output_at])
        return Record(clock(cells[at]), prompt, output, {})

    return parse


def _mooncake(line: str) -> Record:
    values = _object(line)
    time = _seconds(_member(values, "timestamp")) / 1000
    prompt, more = _whole(values, "input_length"), {}
    hashes = values.get("hash_ids")
    if hashes is not None and hashes != []:  # these say that nothing is known; 0, "" and {} are mistakes
        more = {"content": _content("hash_ids", hashes, prompt, MOONCAKE_BLOCK)}
    return Record(time, prompt, _whole(values, "output_length"), more)


def _own(line: str) -> Record:
    values = _object(line)
    time = _seconds(_member(values, "arrival"))
    more = _own_fields(values)
    if (calls := values.get("then")) is not None:
        more["then"] = _calls(calls)
        more["think_time"] = _think_time(values)
    return Record(time, _whole(values, "prompt_tokens"), _whole(values, "output_tokens"), more)


def _calls(given: Any) -> SimJob:
    """The calls of a program behind its first, the first of which holds the others."""
    if not isinstance(given, list) or not given:
        raise BadLine(f"then must be a list of calls, got {_SHORT.repr(given)}")
    following: SimJob | None = None
    for values in reversed(given):
        if not isinstance(values, dict):
            raise BadLine(f"then must hold JSON objects, got {_SHORT.repr(values)}")
        prompt, output = _whole(values, "prompt_tokens"), _whole(values, "output_tokens")
        if output < 1:
            raise BadLine(f"a call in then must have at least 1 output token, got {output}")
        more = _own_fields(values)
        if following is not None:
            more |= {"then": following, "think_time": _think_time(values)}
        following = SimJob(0.0, prompt, output, **more)
    assert following is not None
    return following


def _think_time(values: dict[str, Any]) -> float:
    seconds = float(_seconds(values.get("think_time", 0.0)))
    if seconds < 0:
        raise BadLine(f"think_time must be at least 0, got {seconds!r}")
    return seconds


def _content(key: str, given: Any, prompt_tokens: int, block: int) -> tuple[int, ...]:
    """Identities of a prompt's blocks."""
    if not isinstance(given, list):
        raise BadLine(f"{key} must be a list of whole numbers, got {_SHORT.repr(given)}")
    expected = -(-prompt_tokens // block)
    if len(given) != expected:
        raise BadLine(
            f"{key} must hold {expected} identities, one for each {block} of {prompt_tokens} tokens, got {len(given)}"
        )
    for identity in given:
        if type(identity) is not int or not 0 <= identity <= MAX_IDENTITY:  # True is an int to isinstance
            raise BadLine(f"{key} must hold whole numbers between 0 and {MAX_IDENTITY}, got {_SHORT.repr(identity)}")
    return tuple(given)


def _own_fields(values: dict[str, Any]) -> dict[str, Any]:
    """What may be said of any call."""
    more: dict[str, Any] = {}
    if values.get("user") is not None:
        more["user"] = _name(values, "user")
    if values.get("priority") is not None:
        more["priority"] = _whole(values, "priority")
    if values.get("max_tokens") is not None:
        more["max_tokens"] = _whole(values, "max_tokens")
        if more["max_tokens"] < _whole(values, "output_tokens"):
            raise BadLine(f"max_tokens is {more['max_tokens']}, less than output_tokens")
    if values.get("program") is not None:
        more["program"] = _name(values, "program")
    if values.get("content") is not None:
        block = _whole(values, "content_block") if "content_block" in values else MOONCAKE_BLOCK
        if not 1 <= block <= LONGEST_JOB:
            raise BadLine(f"content_block must be between 1 and {LONGEST_JOB}, got {block}")
        more["content"] = _content("content", values["content"], _whole(values, "prompt_tokens"), block)
        more["content_block"] = block
    return more


def _name(values: dict[str, Any], key: str) -> str:
    """Text that can be written down: JSON can say half of a surrogate pair, and UTF-8 cannot."""
    name = str(values[key])
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise BadLine(f"{key} must be valid Unicode, and has a lone surrogate at character {error.start}") from None
    return name


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line]))
    except csv.Error as error:
        raise BadLine(f"is not CSV: {error}") from None


def _object(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise BadLine(f"is not JSON: {error}") from None
    except RecursionError:
        raise BadLine("is nested too deeply") from None
    if not isinstance(values, dict):
        raise BadLine(f"must be a JSON object, got {line[:40]!r}")
    return values


def _member(values: dict[str, Any], key: str) -> Any:
    if key not in values:
        raise BadLine(f"lacks {key!r}")
    return values[key]


def _whole(values: dict[str, Any], key: str) -> int:
    value = _member(values, key)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadLine(f"{key} must be a whole number, got {_SHORT.repr(value)}")
    return value


def _tokens(column: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadLine(f"{column} must be a whole number, got {_SHORT.repr(text)}") from None


def _seconds(value: Any) -> Decimal:
    """Of a number, or one written down."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # the last: an integer beyond any float
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise BadLine(f"the time must be a number, got {_SHORT.repr(value)}")
    return Decimal(value) if isinstance(value, int) else Decimal(repr(number))


def _date(text: str) -> Decimal:
    """Seconds since 1970 of `2023-11-16 18:15:46.6805900`, with or without a zone (then UTC) and a fraction."""
    clock, _, rest = text.strip().partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    zone = rest[len(digits) :]
    try:
        moment = datetime.fromisoformat(clock + zone.replace("Z", "+00:00"))
    except ValueError:
        raise BadLine(f"the time must be written 2023-11-16 18:15:46.6805900, got {_SHORT.repr(text)}") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return int(moment.timestamp()) + Decimal(f"0.{digits or 0}")
