"""benchmarks/chaos.py, small: a real server and a real engine that is killed and stopped; streams stay as they were."""

from __future__ import annotations

import chaos
import pytest
import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model.write(tmp_path_factory.mktemp("tiny")))


def test_no_stream_breaks_repeats_or_skips(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kills", "3", "--stop", "1", "--streams", "16", "--tokens", "600", "--window", "0.3"]
    code = chaos.main(["--model", model, "--heartbeat-timeout", "2", *options])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err


def test_nor_where_they_go_on_in_another_engine(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kills", "4", "--stop", "0", "--streams", "16", "--tokens", "600", "--window", "0.3"]
    code = chaos.main(["--model", model, *options, "--options", "--data-parallel-size", "2"])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err


def test_what_differs_is_seen() -> None:
    """Of a stream, everything but its pauses counts."""
    event = {"choices": [{"index": 0, "text": "a", "finish_reason": None, "logprobs": None}]}
    last = {"choices": [{"index": 0, "text": "b", "finish_reason": "stop", "stop_reason": "c"}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    whole, without_one, twice = (_stream(*events) for events in ((event, last), (last,), (event, event, last)))
    assert whole.choices[0] == chaos.Choice("ab", [], "stop", "c")
    assert whole == _stream(event, last) and whole not in (without_one, twice, _stream(event, last, usage))
    with pytest.raises(ValueError, match="goes on after its finish_reason"):
        _stream(last, event)
    with pytest.raises(ValueError, match="the engine is gone"):
        _stream(event, {"error": {"message": "the engine is gone"}})


def _stream(*events: dict[str, object]) -> chaos.Stream:
    stream = chaos.Stream()
    for event in events:
        chaos._take(stream, event)
    return stream


def test_requests_are_of_all_kinds_and_repeatable() -> None:
    requests = chaos.make_requests(32, 160, 0)
    assert requests == chaos.make_requests(32, 160, 0) != chaos.make_requests(32, 160, 1)
    bodies = [request.body for request in requests]
    for field in ("stop", "logprobs", "n", "messages", "prompt", "top_p", "frequency_penalty"):
        assert 0 < sum(field in body for body in bodies) < 32
    assert len({body["max_tokens"] for body in bodies}) > 16
    assert {body["temperature"] for body in bodies} == {0.0, 0.7, 1.0}
