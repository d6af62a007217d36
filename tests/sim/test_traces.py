"""Trace files: every format, what is wrong with a line, and traces as workloads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.config import SchedulerConfig
from fastserve.types import InvalidRequest, SamplingParams
from fastserve.workloads import Recorded, SimJob, read_trace, write_mooncake, write_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:59.6805900,374,44
2023-11-17 00:00:00.0000000,396,109
2023-11-17 00:00:01.1805901,12,1
"""
AZURE_ZONED = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00+00:00,374,44
2024-05-10 00:00:00.319410+00:00,396,109
2024-05-10 02:00:01.500001+02:00,12,1
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,374,44,418,Conversation log
5.5,"GPT-4, the second",396,109,505,API log
45,ChatGPT,99,0,99,Conversation log
46,ChatGPT,12,1,13,Conversation log
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 374, "output_length": 44, "hash_ids": [46]}
{"timestamp": 27982, "input_length": 396, "output_length": 109}

{"timestamp": 30000, "input_length": 12, "output_length": 1, "hash_ids": [46]}
"""
OWN = """{"arrival": 0.0, "prompt_tokens": 374, "output_tokens": 44}
{"arrival": 0.1, "prompt_tokens": 396, "output_tokens": 109, "user": "ann", "priority": -2}
{"arrival": 7, "prompt_tokens": 12, "output_tokens": 1, "max_tokens": 5, "note": "kept out"}
"""
LENGTHS = [(374, 44), (396, 109), (12, 1)]

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "trace.dat"  # a name that says nothing
        path.write_bytes(text.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("text", "arrivals"),
    [
        (AZURE, [0.0, 0.31941, 1.5000001]),
        (AZURE_ZONED, [0.0, 0.31941, 1.500001]),
        (BURSTGPT, [0.0, 0.5, 41.0]),
        (MOONCAKE, [0.0, 0.5, 2.518]),
        (OWN, [0.0, 0.1, 7.0]),
    ],
    ids=["azure", "azure-zoned", "burstgpt", "mooncake", "own"],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_every_format_is_told_by_its_content(write: Write, text: str, arrivals: list[float], ending: str) -> None:
    for mark in ("", "\ufeff"):
        jobs = list(read_trace(write(mark + text.replace("\n", ending).rstrip("\r\n"))))
        assert [job.arrival for job in jobs] == arrivals
        assert [(job.prompt_tokens, job.output_tokens) for job in jobs] == LENGTHS


def test_our_format_keeps_everything(write: Write) -> None:
    _, second, third = read_trace(write(OWN))
    assert second == SimJob(0.1, 396, 109, user="ann", priority=-2)
    assert third == SimJob(7.0, 12, 1, max_tokens=5)


def test_a_trace_is_written_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    path, link = folder / "trace.jsonl", folder / "link.jsonl"
    path.write_text("what was there\n")
    path.chmod(0o640)
    link.symlink_to(path)

    def failing() -> Iterator[SimJob]:
        yield SimJob(0.0, 1, 1)
        raise InterruptedError

    for write_as in (write_trace, write_mooncake):
        with pytest.raises(InterruptedError):
            write_as(path, failing())
        assert path.read_text() == "what was there\n" and sorted(folder.iterdir()) == [link, path]
    assert write_trace(link, [SimJob(0.0, 1, 1)]) == 1
    assert write_trace(path, read_trace(path)) == 1, "it is read while it is written"
    assert list(read_trace(path)) == [SimJob(0.0, 1, 1)]
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640 and sorted(folder.iterdir()) == [link, path]


def test_what_is_no_file_is_written_to_as_it_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_trace(pipe, [SimJob(0.0, 1, 1)])
        assert json.loads(os.read(reader, 1000)) == {"arrival": 0.0, "prompt_tokens": 1, "output_tokens": 1}
    finally:
        os.close(reader)
    assert list(tmp_path.iterdir()) == [pipe] and pipe.is_fifo()
    with pytest.raises(IsADirectoryError):
        write_trace(tmp_path, [])


def test_columns_may_be_more_and_in_another_order(write: Write) -> None:
    text = "GeneratedTokens,Region,TIMESTAMP,ContextTokens\n44,west,2023-11-16 18:15:46.68,374\n"
    assert list(read_trace(write(text))) == [SimJob(0.0, 374, 44)]


def test_the_first_job_with_output_arrives_at_0(write: Write) -> None:
    text = BURSTGPT.replace("374,44,418", "374,0,374")
    assert [job.arrival for job in read_trace(write(text))] == [0.0, 40.5]


jobs = st.builds(
    SimJob,
    arrival=st.floats(0.0, 1e7),
    prompt_tokens=st.integers(1, 10**6),
    output_tokens=st.integers(1, 10**6),
    user=st.none() | st.text(max_size=5),
    priority=st.integers(-5, 5),
    max_tokens=st.none() | st.integers(10**6, 2 * 10**6),
)


@given(st.lists(jobs, min_size=1, max_size=8))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, given_jobs: list[SimJob]) -> None:
    path = tmp_path_factory.mktemp("trace") / "jobs.jsonl"
    ordered = sorted(given_jobs, key=lambda job: job.arrival)
    first = SimJob(0.0, 1, 1)
    assert write_trace(path, [first, *ordered]) == len(ordered) + 1
    assert list(read_trace(path)) == [first, *ordered]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "trace.dat is empty; readable are Azure LLM CSV"),
        ("a,b,c\n1,2,3\n", "trace.dat, line 1: a format unknown; readable are Azure.*BurstGPT.*Mooncake.*FastServe"),
        ('{"arrival": 1}\n', "line 1: a format unknown"),
        ("{not json\n", "line 1: a format unknown"),
        (AZURE + "2023-11-17 00:00:02.0,5\n", "line 5: has 2 columns, and the header has 3"),
        (AZURE + "2023-11-17 00:00:02.0,many,5\n", "line 5: ContextTokens must be a whole number, got 'many'"),
        (AZURE + "yesterday,5,5\n", "line 5: the time must be written 2023-11-16 18:15:46.*got 'yesterday'"),
        (AZURE + "2023-11-17 00:00:02.0,0,5\n", "line 5: a prompt must have at least 1 token, got 0"),
        (AZURE + "2023-11-17 00:00:02.0,5,-5\n", "line 5: an output cannot have -5 tokens"),
        (AZURE + "2023-11-16 00:00:02.0,5,5\n", "line 5: arrives before the job above it; sort the file by time"),
        (BURSTGPT + "soon,ChatGPT,1,2,3,x\n", "line 6: the time must be a number, got 'soon'"),
        (BURSTGPT + "nan,ChatGPT,1,2,3,x\n", "line 6: the time must be a number, got 'nan'"),
        (BURSTGPT + "50,ChatGPT,1,,3,x\n", "line 6: Response tokens must be a whole number, got ''"),
        (MOONCAKE + "{}\n", "line 5: lacks 'timestamp'"),
        (MOONCAKE + "[1]\n", r"line 5: must be a JSON object, got '\[1\]'"),
        (MOONCAKE + '{"timestamp": 1e9\n', "line 5: is not JSON"),
        (OWN + '{"arrival": true, "prompt_tokens": 1, "output_tokens": 1}\n', "line 4: the time must be a number"),
        (OWN + '{"arrival": 9, "prompt_tokens": 1.5, "output_tokens": 1}\n', "line 4: prompt_tokens must be a whole"),
        (OWN + '{"arrival": 9, "prompt_tokens": 1, "output_tokens": "1"}\n', "output_tokens must be a whole number"),
        (
            OWN + '{"arrival": 9, "prompt_tokens": 1, "output_tokens": 1, "priority": "low"}\n',
            "priority must be a whole",
        ),
        (
            OWN + '{"arrival": 9, "prompt_tokens": 1, "output_tokens": 9, "max_tokens": 8}\n',
            "max_tokens is 8, less than",
        ),
        (
            OWN + '{"arrival": 9, "prompt_tokens": 1, "output_tokens": 9, "max_tokens": 20000000000}\n',
            "line 4: max_tokens must be at most 2147483647, got 20000000000$",
        ),
        (
            OWN + '{"arrival": 9, "prompt_tokens": 1, "output_tokens": 9, "priority": -2147483648}\n',
            "line 4: priority must be between -2147483647 and 2147483647, got -2147483648$",
        ),
        (
            OWN + '{"arrival": 9, "prompt_tokens": 1073741824, "output_tokens": 1}\n',
            "line 4: prompt and output must have at most 1073741824 tokens together, got 1073741825$",
        ),
        (AZURE + f"2023-11-17 00:00:02.0,1,{10**30}\n", "line 5: prompt and output must have at most 1073741824"),
        (
            OWN + '{"arrival": 1000000000.5, "prompt_tokens": 1, "output_tokens": 1}\n',
            "line 4: arrives more than 1000000000 seconds after the first job$",
        ),
        ('{"arrival":' + "[" * 100_000, "line 1: a format unknown"),
        (OWN + '{"arrival":' + "[" * 100_000, "line 4: is nested too deeply$"),
        (MOONCAKE + '{"timestamp":' + "[" * 500 + "]" * 500 + "}", r"the time must be a number, got \[{6,8}\.\.\."),
        (OWN + '{"arrival": 1' + "0" * 400 + ', "prompt_tokens": 1, "output_tokens": 1}', "line 4: the time must be a"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens," + "x" * 200_000, "line 1: a format unknown"),
        (AZURE + "x" * 200_000 + ",1,1\n", r"line 5: is not CSV: field larger than field limit \(131072\)$"),
        (AZURE + "2023-11-17 00:00:02.0," + "x" * 100_000 + ",1\n", r"line 5: ContextTokens must .* got 'x+\.\.\.x+'$"),
    ],
)
def test_a_bad_line_is_named(write: Write, text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        list(read_trace(write(text)))
    assert caught.value.field == "trace" and "trace.dat" in str(caught.value)


def test_what_a_trace_may_hold_an_engine_takes(write: Write) -> None:
    limit = 2**31 - 1
    line = f'{{"arrival": 1e9, "prompt_tokens": {2**30 - 1}, "output_tokens": 1, "max_tokens": {limit}}}\n'
    (*_, job) = read_trace(write(OWN + line))
    assert job == SimJob(1e9, 2**30 - 1, 1, max_tokens=limit)
    assert SchedulerConfig(max_model_len=2**30).max_model_len == job.prompt_tokens + job.output_tokens
    assert SamplingParams(max_tokens=limit).max_tokens == job.max_tokens
    with pytest.raises(InvalidRequest):
        SchedulerConfig(max_model_len=2**30 + 1)
    with pytest.raises(InvalidRequest):
        SamplingParams(max_tokens=limit + 1)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"trace: cannot read .*missing.csv"):
        list(read_trace(tmp_path / "missing.csv"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InvalidRequest, match="trace: cannot read"):
        list(read_trace(tmp_path / "binary"))


def test_lines_are_read_as_jobs_are_taken(write: Write) -> None:
    jobs = read_trace(write(AZURE + "rubbish\n"))
    assert [next(jobs).prompt_tokens for _ in range(3)] == [374, 396, 12]
    with pytest.raises(InvalidRequest):
        next(jobs)


# --- as a workload -------------------------------------------------------------------------------------------------


def test_a_recorded_workload_keeps_its_own_time_or_takes_a_rate(write: Write) -> None:
    recorded = Recorded(write(MOONCAKE))
    assert (recorded.name, recorded.longest, recorded.shape.jobs) == ("trace.dat", 505, 3)
    assert [job.arrival for job in recorded.jobs(0, 9, None)] == [0.0, 0.5, 2.518]
    scaled = list(recorded.jobs(0, 9, 4.0))  # two gaps a quarter of a second long on average
    assert [job.arrival for job in scaled] == pytest.approx([0.0, 0.5 * 0.5 / 2.518, 0.5])
    assert [job.output_tokens for job in scaled] == [44, 109, 1]


def test_a_recorded_workload_can_be_its_beginning(write: Write) -> None:
    beginning = Recorded(write(MOONCAKE), limit=2)
    assert (beginning.shape.jobs, beginning.shape.rate) == (2, 2.0)
    assert [job.arrival for job in beginning.jobs(0, 9, 1.0)] == [0.0, 1.0]
    assert len(beginning.lengths().prompts) == 2
    assert [job.arrival for job in beginning.jobs(0, 1, None)] == [0.0]


def test_what_cannot_be_stretched_is_refused(write: Write) -> None:
    recorded = Recorded(write("\n".join([MOONCAKE.splitlines()[0]] * 3)))
    assert recorded.shape.rate is None
    with pytest.raises(InvalidRequest, match=r"cannot be stretched to a rate or a load: all its jobs arrive at once"):
        recorded.jobs(0, 3, 1.0)
    with pytest.raises(InvalidRequest, match="rate: jobs a second must be"):
        recorded.jobs(0, 3, 0.0)


def test_a_trace_without_output_holds_no_job(write: Write) -> None:
    with pytest.raises(InvalidRequest, match=r"trace: .*trace.dat holds no job with output"):
        _ = Recorded(write("Timestamp,Request tokens,Response tokens\n1,2,0\n")).shape
