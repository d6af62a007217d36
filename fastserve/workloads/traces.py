"""Trace files: jobs in, line by line, and out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain
from typing import Any, TextIO

from ..types import InvalidRequest
from .checks import LARGEST_LIMIT, LAST_ARRIVAL, LONGEST_JOB
from .files import replacing
from .job import SimJob
from .programs import calls_of
from .trace_formats import FORMATS, BadLine, Record, in_order_of_end, parse_unit, parser_for, unit_requests

_LONGEST_DOCUMENT = 2**26  # characters: unlike lines, a document is read as a whole


def read_trace(path: str | os.PathLike[str]) -> Iterator[SimJob]:
    """The jobs of a trace file, one at a time, the first at 0 seconds.

    Jobs without output produced nothing (BurstGPT: they failed) and are left out. Raises InvalidRequest, naming file
    and line, for a file that cannot be read, a format unknown, a line that is malformed or has a number that no engine
    takes, and a job that arrives before the one above it. What a server has recorded has the order in which jobs ended:
    it is read as a whole, and sorted.
    """
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from _jobs(name, file)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("trace", f"cannot read {name}: {error}") from None


def nominal_rate(path: str | os.PathLike[str]) -> float | None:
    """Jobs a second that the times of a trace stand for: 1 in a document of requests, elsewhere None, as nothing says.

    Raises InvalidRequest for a file that cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = next((line for line in file if line.strip()), "")
            return 1.0 if parser_for(first)[0] is None and _document(first, file) is not None else None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("trace", f"cannot read {os.fspath(path)}: {error}") from None


def write_trace(path: str | os.PathLike[str], jobs: Iterable[SimJob]) -> int:
    """Write jobs as FastServe JSONL, one a line, and return how many; what is default is left out.

    The calls behind a job are in its line. The file appears, or is replaced, once all jobs are written: jobs may come
    out of it as they are taken.
    """
    count = 0
    with replacing(path) as file:
        for job in jobs:
            line = {"arrival": job.arrival, **_fields(job)}
            if job.then is not None:
                line["then"] = [_fields(call) for call in calls_of(job.then)]
            file.write(json.dumps(line) + "\n")
            count += 1
    return count


def _fields(job: SimJob) -> dict[str, Any]:
    """What a line says of one call, its arrival left out."""
    fields: dict[str, Any] = {"prompt_tokens": job.prompt_tokens, "output_tokens": job.output_tokens}
    for name in ("user", "max_tokens", "program"):
        if getattr(job, name) is not None:
            fields[name] = getattr(job, name)
    if job.priority:
        fields["priority"] = job.priority
    if job.content is not None:
        fields |= {"content": list(job.content), "content_block": job.content_block}
    if job.then is not None and job.think_time:
        fields["think_time"] = job.think_time
    return fields


@dataclass(frozen=True, slots=True)
class TraceShape:
    """A trace at a glance."""

    jobs: int  # all calls of programs included
    seconds: float  # from the first arrival to the last
    longest: int  # tokens of the longest job, prompt and output together

    @property
    def rate(self) -> float | None:
        """Jobs a second; None where all arrive at once."""
        return (self.jobs - 1) / self.seconds if self.seconds > 0 else None


def shape_of(jobs: Iterable[SimJob]) -> TraceShape:
    """Count jobs, seconds and tokens in one pass."""
    count, last, longest = 0, 0.0, 0
    for job in jobs:
        last = job.arrival
        for call in calls_of(job):
            count += 1
            longest = max(longest, call.prompt_tokens + call.output_tokens)
    return TraceShape(count, last, longest)


def _jobs(name: str, file: TextIO) -> Iterator[SimJob]:
    filled = ((number, line.rstrip("\r\n")) for number, line in enumerate(file, start=1) if line.strip())
    first = next(filled, None)
    if first is None:
        raise InvalidRequest("trace", f"{name} is empty; readable are {FORMATS}")
    place = "line"
    parse: Callable[[Any], Record] | None
    parse, is_header = parser_for(first[1])
    items: Iterator[tuple[int, Any]] = filled if is_header else chain([first], filled)
    if parse is None:
        requests = _document(first[1], file)
        if requests is None:
            raise InvalidRequest("trace", f"{name}, line {first[0]}: a format unknown; readable are {FORMATS}")
        place, parse, items = "request", parse_unit, enumerate(requests)
    parsed: Iterable[tuple[int, Record]] = _parsed(f"{name}, {place}", items, parse)
    if in_order_of_end(first[1]):
        parsed = sorted(parsed, key=lambda numbered: numbered[1].time)
    origin = last = None
    for number, record in parsed:
        try:
            _check(record, origin, last)
        except BadLine as error:
            raise InvalidRequest("trace", f"{name}, {place} {number}: {error}") from None
        last = record.time
        if record.output_tokens:
            origin = last if origin is None else origin
            yield SimJob(float(last - origin), record.prompt_tokens, record.output_tokens, **record.more)


def _parsed(
    place: str, items: Iterable[tuple[int, Any]], parse: Callable[[Any], Record]
) -> Iterator[tuple[int, Record]]:
    for number, item in items:
        try:
            yield number, parse(item)
        except BadLine as error:
            raise InvalidRequest("trace", f"{place} {number}: {error}") from None


def _document(first: str, file: TextIO) -> list[Any] | None:
    """The requests of a document that begins with this line and goes on in the file; None: it is none."""
    if not first.lstrip().startswith("{"):
        return None
    rest = file.read(_LONGEST_DOCUMENT + 1)
    return unit_requests(f"{first}\n{rest}") if len(rest) <= _LONGEST_DOCUMENT else None


def _check(record: Record, origin: Decimal | None, last: Decimal | None) -> None:
    if last is not None and record.time < last:
        raise BadLine("arrives before the job above it; sort the file by time")
    if origin is not None and record.time - origin > LAST_ARRIVAL:
        raise BadLine(f"arrives more than {LAST_ARRIVAL} seconds after the first job")
    if record.output_tokens < 0:
        raise BadLine(f"an output cannot have {record.output_tokens} tokens")
    for call in calls_of(SimJob(0.0, record.prompt_tokens, record.output_tokens, **record.more)):
        _check_call(call)


def _check_call(call: SimJob) -> None:
    if call.prompt_tokens < 1:
        raise BadLine(f"a prompt must have at least 1 token, got {call.prompt_tokens}")
    tokens = call.prompt_tokens + call.output_tokens
    if tokens > LONGEST_JOB:
        raise BadLine(f"prompt and output must have at most {LONGEST_JOB} tokens together, got {tokens}")
    max_tokens, priority = call.max_tokens or 1, call.priority
    if max_tokens > LARGEST_LIMIT:
        raise BadLine(f"max_tokens must be at most {LARGEST_LIMIT}, got {max_tokens}")
    if abs(priority) > LARGEST_LIMIT:
        raise BadLine(f"priority must be between {-LARGEST_LIMIT} and {LARGEST_LIMIT}, got {priority}")
