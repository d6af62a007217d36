"""Benches: the demo's trace, summaries against NumPy, spans, the comparison, and the picture."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastserve.bench import latency, throughput
from fastserve.bench.demo import report, verdict
from fastserve.bench.plots import plot_runs
from fastserve.bench.runs import JobRun, PolicyRun, different_jobs, job_spans, wall_spans
from fastserve.bench.summary import STATISTICS, summarize, summarize_jobs
from fastserve.bench.tables import compare_policies
from fastserve.bench.trace import BURST_LENGTH, BURSTS, demo_trace
from fastserve.bench.view import TraceView
from fastserve.bench.workload import read_prompts, synthetic_prompts
from fastserve.types import InvalidRequest, JobMetrics, SamplingParams


@dataclass(frozen=True)
class Iteration:
    submitted: float
    completed: float
    job_ids: tuple[str, ...] = ()
    prefill_tokens: int = 0
    decode_tokens: int = 0
    waiting: int = 0


def job(name: str, arrival: float, first: float, finish: float, tokens: int, kind: str = "question") -> JobRun:
    metrics = JobMetrics(arrival, first_scheduled=first, first_token=first, finish=finish)
    return JobRun(name, kind, "Why?", "Because.", list(range(tokens)), "stop", metrics, [(arrival, finish)])


def two_runs() -> list[PolicyRun]:
    slow = [job("long", 0.0, 1.0, 8.0, 40, "story"), job("short", 0.5, 8.0, 10.0, 4)]
    fast = [job("long", 0.0, 1.0, 10.0, 40, "story"), job("short", 0.5, 1.0, 2.5, 4)]
    return [PolicyRun("fcfs", slow, 10.0, 44), PolicyRun("skip-join-mlfq", fast, 10.0, 44)]


def printed(*renderables: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    for renderable in renderables:
        console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- the trace


def test_trace_is_fixed_and_mixes_many_short_jobs_with_long_ones() -> None:
    trace = demo_trace()
    assert trace == demo_trace()
    assert trace != demo_trace(seed=1)
    kinds = [job.kind for job in trace]
    assert len(trace) >= 60
    assert kinds.count("question") > 2 * kinds.count("story") > 0
    assert len({job.prompt for job in trace}) == len({job.name for job in trace}) == len(trace)
    for asked in trace:
        assert asked.params.max_tokens is not None
        low, high = (8, 40) if asked.kind == "question" else (150, 400)
        assert low <= asked.params.max_tokens <= high
        assert asked.params.greedy or asked.params.seed is not None


def test_trace_arrives_in_bursts() -> None:
    arrivals = [job.arrival for job in demo_trace(iteration_seconds=0.01)]
    assert arrivals == sorted(arrivals)
    bursts = [[a for a in arrivals if start <= 100 * a <= start + BURST_LENGTH] for start in BURSTS]
    assert sum(map(len, bursts)) == len(arrivals)
    assert max(map(len, bursts)) - min(map(len, bursts)) <= 1


# --- summaries


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_summary_equals_numpy(values: list[float]) -> None:
    summary = summarize(values)
    assert summary.count == len(values)
    expected = (np.mean(values), *(np.percentile(values, p) for p in (50, 95, 99)))
    assert [getattr(summary, name) for name in STATISTICS] == pytest.approx(expected)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_summary_refuses_samples_without_a_meaning(values: list[float]) -> None:
    with pytest.raises(ValueError, match="cannot summarize"):
        summarize(values)


def test_summaries_of_jobs_are_those_of_their_times() -> None:
    summaries = two_runs()[0].summaries()
    assert summaries["jct"].mean == pytest.approx((8.0 + 9.5) / 2)
    assert summaries["ttft"].mean == pytest.approx((1.0 + 7.5) / 2)
    assert summaries["normalized_latency"].mean == pytest.approx((8.0 / 40 + 9.5 / 4) / 2)
    assert two_runs()[0].summaries("story")["jct"].count == 1


def test_a_job_counts_where_it_has_a_value() -> None:
    aborted = JobMetrics(0.0, finish=2.0)  # before its first token
    summaries = summarize_jobs([(aborted, 0), (JobMetrics(0.0, first_token=1.0, finish=4.0), 2)])
    assert {name: summary.count for name, summary in summaries.items()} == {
        "jct": 2,
        "ttft": 1,
        "normalized_latency": 1,
    }


# --- when a job ran


def test_a_queued_plan_has_the_device_once_the_one_before_it_is_done() -> None:
    iterations = [Iteration(0.0, 1.0), Iteration(0.25, 2.0), Iteration(5.0, 6.0)]
    assert wall_spans(iterations) == [(0.0, 1.0), (1.0, 2.0), (5.0, 6.0)]


def test_adjacent_iterations_of_a_job_merge_and_preemption_splits() -> None:
    iterations = [
        Iteration(10.0, 11.0, ("a", "b")),
        Iteration(10.5, 12.0, ("a",)),
        Iteration(11.5, 13.0, ("b",)),
        Iteration(12.5, 14.0, ("a", "b")),
    ]
    assert job_spans(iterations, origin=10.0) == {"a": [(0.0, 2.0), (3.0, 4.0)], "b": [(0.0, 1.0), (2.0, 4.0)]}


# --- the comparison


def test_the_table_compares_both_policies_by_every_measure() -> None:
    text = printed(compare_policies(two_runs()))
    for word in ("JCT", "TTFT", "Normalized latency", "mean", "P50", "P95", "P99", "fcfs", "skip-join-mlfq"):
        assert word in text
    assert f"{8.75 / 6.0:.2f}×" in text  # mean JCT


def test_the_verdict_says_so_when_the_baseline_is_better() -> None:
    slow, fast = two_runs()
    assert "skip-join-mlfq finishes the average job 1.46× sooner than fcfs" in verdict(slow, fast)
    assert "fcfs finishes the average job 1.46× later than skip-join-mlfq" in verdict(fast, slow)
    assert "story 8.0 → 10.0 s" in verdict(slow, fast)


def test_a_differing_token_is_found_and_reported() -> None:
    runs = two_runs()
    assert different_jobs(runs) == []
    runs[1].jobs[1].token_ids[-1] += 1
    console = Console(file=io.StringIO())
    assert report(runs, console) == ["short"]
    assert isinstance(console.file, io.StringIO)
    assert "Different words" in console.file.getvalue()


def test_a_run_is_json() -> None:
    run = json.loads(json.dumps(two_runs()[0].as_dict()))
    assert run["policy"] == "fcfs"
    assert run["tokens_per_second"] == pytest.approx(4.4)
    assert run["summary"]["jct"]["mean"] == pytest.approx(8.75)
    assert [job["metrics"]["jct"] for job in run["jobs"]] == [8.0, 9.5]


def test_the_view_shows_progress_the_queue_and_answers() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with TraceView(console, "fcfs", 3) as view:
        view.iteration(Iteration(100.0, 101.0, ("a", "b"), decode_tokens=2, waiting=5))
        view.finished(1.0, "Why?", "Because\nof that.", 8)
        view.iteration(Iteration(101.0, 104.0, ("b",), decode_tokens=1))
        view.refresh()
    assert isinstance(console.file, io.StringIO)
    screen = console.file.getvalue()
    assert "1 running" in screen
    assert "Why?" in screen
    assert "Because of that." in screen
    assert "1/3" in screen
    assert "2 tokens/s" in screen[screen.rindex("1/3") :]  # in the end, those of the whole run: eight in four seconds


@pytest.mark.parametrize("policies", [1, 2, 3])
def test_the_plot_is_a_png_of_readable_size(tmp_path: Path, policies: int) -> None:
    from PIL import Image

    path = tmp_path / "new" / "demo.png"
    plot_runs((two_runs() * 2)[:policies], path, "two jobs")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 800


# --- workloads


def test_synthetic_prompts_are_seeded_and_in_the_vocabulary() -> None:
    prompts = synthetic_prompts(5, 7, 11, seed=3)
    assert prompts == synthetic_prompts(5, 7, 11, seed=3) != synthetic_prompts(5, 7, 11, seed=4)
    assert [len(prompt) for prompt in prompts] == [7] * 5
    assert all(0 <= token < 11 for prompt in prompts for token in prompt)


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Hello\n\n  \nWörld\n", encoding="utf-8")
    assert read_prompts(path) == ["Hello", "Wörld"]


def test_only_newlines_end_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\u2028still\x0cone\rstill\r\ntwo\x85two\n".encode())
    assert read_prompts(path) == ["one\u2028still\x0cone\rstill", "two\x85two"]


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe"])
def test_a_file_without_prompts_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"prompts_file: .*prompts\.txt"):
        read_prompts(path)


# --- latency and throughput, on an engine whose clock is ours

PREFILL, DECODE = 0.5, 0.125  # seconds of an iteration


@dataclass
class ClockworkLLM:
    """Serves a batch in one prefill of all prompts and one decode of all jobs a token."""

    model: str
    on_iteration: Callable[[Iteration], None]
    seed: int
    max_model_len: int = 64
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 512
    enable_prefix_caching: bool = True
    now: float = 0.0
    spec = SimpleNamespace(vocab_size=97)
    info = SimpleNamespace()
    tokenizer = None

    def __enter__(self) -> ClockworkLLM:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[Any]:
        assert params.ignore_eos and params.max_tokens is not None
        self.now += 10.0  # idle before the batch: no part of it
        arrival = self.now
        names = tuple(map(str, range(len(prompts))))
        self._iterate(PREFILL, names, prefill_tokens=sum(map(len, prompts)))
        first = self.now
        for _ in range(params.max_tokens - 1):
            self._iterate(DECODE, names, decode_tokens=len(prompts))
        metrics = JobMetrics(arrival, first_token=first, finish=self.now)
        done = SimpleNamespace(token_ids=[0] * params.max_tokens, metrics=metrics)
        return [SimpleNamespace(outputs=[done], metrics=metrics) for _ in prompts]

    def _iterate(self, seconds: float, names: tuple[str, ...], **tokens: int) -> None:
        # As with two plans in flight: submitted before the one that runs is done.
        submitted = self.now - DECODE / 2 if "decode_tokens" in tokens else self.now
        self.now += seconds
        self.on_iteration(Iteration(submitted, self.now, names, **tokens))


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClockworkLLM, "info", {"threads": 2})
    monkeypatch.setitem(sys.modules, "fastserve.llm", SimpleNamespace(LLM=ClockworkLLM))


@pytest.mark.usefixtures("clockwork")
def test_latency_separates_prefill_from_decode_for_every_batch_size() -> None:
    console = Console(file=io.StringIO(), width=120)
    result = latency.run("toy", batch_sizes=(1, 4), input_len=6, output_len=9, warmup=1, iterations=3, console=console)
    assert [row["batch_size"] for row in result["results"]] == [1, 4]
    for row in result["results"]:
        batch = row["batch_size"]
        assert row["prefill_seconds"]["count"] == 3
        assert row["prefill_seconds"]["mean"] == pytest.approx(PREFILL)
        assert row["prefill_tokens_per_second"] == pytest.approx(batch * 6 / PREFILL)
        assert row["decode_iteration_seconds"]["count"] == 3 * 8
        assert row["decode_iteration_seconds"]["p99"] == pytest.approx(DECODE)
        assert row["decode_tokens_per_second"] == pytest.approx(batch / DECODE)
        assert row["total_seconds"]["mean"] == pytest.approx(PREFILL + 8 * DECODE)
    assert json.loads(json.dumps(result)) == result
    assert isinstance(console.file, io.StringIO)
    assert "decode tok/s" in console.file.getvalue()


@pytest.mark.usefixtures("clockwork")
def test_throughput_counts_every_token_once() -> None:
    console = Console(file=io.StringIO(), width=120)
    result = throughput.run("toy", num_prompts=4, input_len=6, output_len=9, console=console)
    seconds = PREFILL + 8 * DECODE
    assert result["seconds"] == pytest.approx(seconds)
    assert result["output_tokens_per_second"] == pytest.approx(4 * 9 / seconds)
    assert result["total_tokens_per_second"] == pytest.approx(4 * 15 / seconds)
    assert result["requests_per_second"] == pytest.approx(4 / seconds)
    assert result["summary"]["ttft"]["p50"] == pytest.approx(PREFILL)
    assert json.loads(json.dumps(result)) == result
    assert isinstance(console.file, io.StringIO)
    assert "4/4 jobs" in console.file.getvalue()


@pytest.mark.usefixtures("clockwork")
@pytest.mark.parametrize(
    ("run", "options", "option"),
    [
        (latency.run, {"batch_sizes": (1, 0)}, "batch_size"),
        (latency.run, {"batch_sizes": (9,), "max_num_seqs": 8}, "batch_size"),
        (latency.run, {"batch_sizes": ()}, "batch_size"),
        (latency.run, {"output_len": 1}, "output_len"),
        (latency.run, {"iterations": 0}, "iterations"),
        (latency.run, {"warmup": -1}, "warmup"),
        (throughput.run, {"num_prompts": 0}, "num_prompts"),
        (throughput.run, {"input_len": -3}, "input_len"),
    ],
)
def test_bad_options_are_named(run: Callable[..., Any], options: dict[str, Any], option: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        run("toy", **options)
    assert error.value.field == option
