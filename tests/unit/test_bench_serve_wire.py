"""What `fastserve bench serve` reads from a wire, cut into pieces of every size."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from fastserve.bench.serve.answer import ErrorEvent, message_of, note
from fastserve.bench.serve.http import MAX_HEAD, ProtocolError, Response
from fastserve.bench.serve.record import JobRecord
from fastserve.bench.serve.sse import EventStream

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"transfer-encoding: Chunked\r\n\r\n"
BODY = b'data: {"a": 1}\n\n: ping\n\ndata: [DONE]\n\n'


def pieces(data: bytes) -> Iterator[list[bytes]]:
    """All ways to cut it in two, and byte by byte."""
    yield [data]
    yield [data[i : i + 1] for i in range(len(data))]
    yield from ([data[:i], data[i:]] for i in range(1, len(data)))


RESPONSES = {
    "chunks": CHUNKED
    + b"".join(b"%X;ext=1\r\n%b\r\n" % (len(part), part) for part in (BODY[:7], BODY[7:]))
    + b"0\r\n\r\n",
    "trailers": CHUNKED + b"%x\r\n%b\r\n0\r\nX-Late: yes\r\nY: z\r\n\r\n" % (len(BODY), BODY),
    "length": HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY,
    "something before": b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
}


@pytest.mark.parametrize("data", RESPONSES.values(), ids=RESPONSES)
def test_a_response_is_the_same_however_it_is_cut(data: bytes) -> None:
    for cut in pieces(data):
        response = Response()
        assert b"".join(map(response.feed, cut)) == BODY
        assert (response.status, response.complete, response.end()) == (200, True, True)
        assert response.headers["content-type"] == "text/event-stream"
        assert response.feed(b"more") == b""


def test_a_body_may_end_with_the_connection() -> None:
    for cut in pieces(HEAD + b"\r\n" + BODY):
        response = Response()
        assert b"".join(map(response.feed, cut)) == BODY
        assert not response.complete
        assert response.end()


@pytest.mark.parametrize("kept", [*range(1, len(RESPONSES["chunks"])), -1])
def test_a_response_that_is_cut_off_is_not_complete(kept: int) -> None:
    response = Response()
    response.feed(RESPONSES["chunks"][:kept])
    assert not response.end()


def test_a_response_may_have_no_body() -> None:
    for head in (b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.0 200\r\nContent-Length: 0\r\n\r\n"):
        response = Response()
        assert response.feed(head) == b""
        assert response.complete


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not HTTP/1: b'S"),
        (b"HTTP/2 200 OK\r\n\r\n", "not HTTP/1"),
        (b"HTTP/1.1 two OK\r\n\r\n", "not HTTP/1"),
        (b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n", "a header without a colon: 'nonsense'"),
        (HEAD + b"Content-Length: -1\r\n\r\n", "a Content-Length of '-1'"),
        (HEAD + b"X: " + b"x" * MAX_HEAD, "a head of more than"),
        (CHUNKED + b"zz\r\n", "a chunk of size b'zz'"),
        (CHUNKED + b"-1\r\n", "a chunk of size b'-1'"),
        (CHUNKED + b"\r\n", "a chunk of size b''"),
        (CHUNKED + b"2\r\nabc\r\n", "a chunk longer than it says"),
        (CHUNKED + b"1" * 5000, "a chunk without a size"),
    ],
)
def test_what_is_no_response_is_said(data: bytes, message: str) -> None:
    for cut in ([data], [data[i : i + 1] for i in range(len(data))]):
        response = Response()
        with pytest.raises(ProtocolError, match=message.replace("(", r"\(")):
            for piece in cut:
                response.feed(piece)


# --- events ----------------------------------------------------------------------------------------------------------


EVENTS = (
    "data: one\n\n: keep-alive\n\nevent: x\ndata:two\nid: 7\ndata:  lines ü\n\n\n\nretry: 5\n\ndata\n\ndata: [DONE]\n\n"
)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_events_are_the_same_however_they_are_cut(ending: str) -> None:
    data = EVENTS.replace("\n", ending).encode()
    for cut in pieces(data):
        stream = EventStream()
        found = [event for piece in cut for event in stream.feed(piece)]
        assert found == [b"one", "two\n lines ü".encode(), b"[DONE]"]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
def test_an_event_does_not_wait_for_the_next(ending: bytes) -> None:
    stream = EventStream()
    assert stream.feed(b"data: one" + ending + ending) == [b"one"]
    assert stream.feed(b"data: two" + ending + ending) == [b"two"]


# --- answers ---------------------------------------------------------------------------------------------------------


def noted(*events: object) -> JobRecord:
    record = JobRecord(0, 0.0, 5, 4)
    for moment, event in enumerate(events):
        note(record, json.dumps(event).encode(), float(moment))
    return record


def text(value: str | None, reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": value, "logprobs": None, "finish_reason": reason}], "usage": None}


def delta(reason: str | None = None, **values: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": values, "finish_reason": reason}]}


def test_tokens_of_a_completion() -> None:
    """An empty text is a token, of half a character; an empty text that only brings the reason is none."""
    record = noted(text("a"), text(""), text("b"), text("", "length"))
    assert list(record.times) == [0.0, 1.0, 2.0]
    assert (record.finish_reason, record.usage_tokens, record.tokens) == ("length", None, 3)
    assert list(noted(text("a"), text("b", "stop")).times) == [0.0, 1.0]


def test_tokens_of_a_chat() -> None:
    opening, closing = delta(role="assistant", content=""), delta("stop")
    record = noted(opening, delta(content="a"), delta(content=""), delta(reasoning_content="b"), closing)
    assert list(record.times) == [1.0, 2.0, 3.0]
    calls = [{"index": 0, "function": {"name": "f", "arguments": ""}}]
    assert list(noted(opening, delta(tool_calls=calls), delta("tool_calls", content=None)).times) == [1.0]
    assert list(noted(delta(role="assistant", content="a"), delta("stop", content="b")).times) == [0.0, 1.0]


def test_usage_counts_where_there_is_one() -> None:
    record = noted(
        text("a b"), text("c d", "length"), {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}
    )
    assert (record.tokens, record.prompt_tokens, list(record.times)) == (4, 9, [0.0, 1.0])
    assert record.tpot == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"error": {"message": "out of\nmemory", "code": 500}}, "out of memory"),
        ({"error": "boom"}, "boom"),
        ({"object": "error", "message": "old vLLM", "code": 400}, "old vLLM"),
    ],
)
def test_an_error_in_the_stream_is_one(event: object, message: str) -> None:
    with pytest.raises(ErrorEvent, match=message):
        noted(event)


@pytest.mark.parametrize("event", [b"{", b"null", b"[]", b'{"choices": 1}', b'{"choices": [{"text": 5}]}', b"\xff"])
def test_what_is_no_chunk_is_said(event: bytes) -> None:
    with pytest.raises(ProtocolError, match="no chunk of an answer"):
        note(JobRecord(0, 0.0, 1, 1), event, 0.0)


def test_messages_of_errors() -> None:
    assert message_of(b'{"error": {"message": "slow  down"}}') == "slow down"
    assert message_of(b'{"detail": "Not Found"}') == "Not Found"
    assert message_of(b"<html>\nBad Gateway</html>") == "<html> Bad Gateway</html>"
    assert len(message_of(b"x" * 10_000)) == 300
