"""Prometheus' page, read by Prometheus' own parser, against what has happened."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from http_world import World, run
from prometheus_client.parser import text_string_to_metric_families
from statuses import LEVELS, status
from toy_engine import Beside, ToyEngine

from fastserve.ipc import Ready, Status, Step
from fastserve.server.client import EngineClient
from fastserve.server.metrics import Metrics
from fastserve.server.totals import COUNTERS, Totals, together
from fastserve.types import JobMetrics, SamplingParams

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
COUNTERS_OF_THE_PAGE = {
    "vllm:prompt_tokens_total": 12,
    "vllm:generation_tokens_total": 13,
    "vllm:num_preemptions_total": 14,
    "fastserve:iterations_total": 11,
    "fastserve:iteration_seconds_total": 9.5,
    "fastserve:recomputed_tokens_total": 15,
    "fastserve:swapped_out_bytes_total": 16,
    "fastserve:swapped_in_bytes_total": 17,
    "fastserve:swap_seconds_total": 1.5,
    "fastserve:swap_hidden_seconds_total": 1.25,
    "vllm:prefix_cache_queries_total": 18,
    "vllm:prefix_cache_hits_total": 10,
    "fastserve:prefix_cache_evicted_blocks_total": 19,
}


@dataclass
class Ended:
    """A job that is over."""

    metrics: JobMetrics | None
    finish_reason: str | None = "length"
    prompt: list[int] = field(default_factory=lambda: [1] * 30)
    output: list[int] = field(default_factory=lambda: [1] * 9)


class Page:
    """A page as Prometheus reads it. All its samples carry the model's name."""

    def __init__(self, text: bytes | str) -> None:
        text = text if isinstance(text, str) else text.decode()
        self.families = list(text_string_to_metric_families(text))
        self.samples: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for family in self.families:
            for sample in family.samples:
                labels = dict(sample.labels)
                assert labels.pop("model_name") == "toy", sample
                key = sample.name, tuple(sorted(labels.items()))
                assert key not in self.samples, "told twice"
                self.samples[key] = sample.value

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples.get((name, tuple(sorted(labels.items()))))


def page_of(engine: Any, *ended: Ended, regret: float | None = 1.5) -> Page:
    metrics = Metrics(engine, "toy", lambda: regret)
    for job in ended:
        metrics.ended(job)
    return rendered(metrics)


def rendered(metrics: Metrics) -> Page:
    async def in_a_loop() -> bytes:  # whose tasks are counted
        return metrics.render()

    return Page(asyncio.run(in_a_loop()))


def told_engine(told: Status) -> ToyEngine:
    engine = ToyEngine(held=True)
    engine.told, engine.counted = told, {name: getattr(told, name) for name in COUNTERS}
    return engine


def test_histograms_of_a_known_history() -> None:
    """Two jobs that ended by themselves, and what is no measure of anything."""
    one = JobMetrics(100.0, 101.0, 102.0, 110.0, 3, 0, 1.5, 6.0, 0.75)  # 10 s, of which 2.5 in the queue
    other = JobMetrics(100.0, 100.0, 100.5, 102.0, 0, 0, 0.5, 1.5)  # 2 s, all in iterations
    page = page_of(
        ToyEngine(),
        Ended(one),
        Ended(other, "stop", [1] * 7, [1] * 1),
        Ended(JobMetrics(100.0, finish=1e6), "abort"),
        Ended(None, "error"),
        Ended(None, None),
    )
    sums = {
        "vllm:e2e_request_latency_seconds": (2, 12.0),
        "vllm:time_to_first_token_seconds": (2, 2.5),
        "vllm:request_time_per_output_token_seconds": (1, 1.0),  # of one token, nobody knows
        "vllm:request_queue_time_seconds": (2, 2.5),
        "vllm:request_prefill_time_seconds": (2, 2.0),
        "vllm:request_decode_time_seconds": (2, 7.5),
        "vllm:request_inference_time_seconds": (2, 9.5),
        "vllm:request_prompt_tokens": (2, 37.0),
        "vllm:request_generation_tokens": (2, 10.0),
        "fastserve:normalized_latency_seconds": (2, 10 / 9 + 2.0),
        "fastserve:slowdown": (2, 10 / 7.5 + 1.0),
        "fastserve:request_swap_time_seconds": (2, 0.75),
        "fastserve:request_preemptions": (2, 3.0),
    }
    for name, (count, total) in sums.items():
        assert page.value(f"{name}_count") == page.value(f"{name}_bucket", le="+Inf") == count, name
        assert page.value(f"{name}_sum") == pytest.approx(total), name
    histograms = {family.name for family in page.families if family.type == "histogram"}
    assert histograms == set(sums), "a histogram that this test does not know"
    assert page.value("vllm:e2e_request_latency_seconds_bucket", le="2.5") == 1
    assert page.value("vllm:e2e_request_latency_seconds_bucket", le="10.0") == 2
    assert page.value("fastserve:slowdown_bucket", le="1.0") == 1
    reasons = {reason: page.value("vllm:request_success_total", finished_reason=reason) for reason in REASONS}
    assert reasons == {"length": 1, "stop": 1, "abort": 2, "error": 1}


REASONS = ("length", "stop", "abort", "error")


def test_what_the_engine_says_of_itself() -> None:
    engine = told_engine(status())
    engine.restarts = 3
    page = page_of(engine, regret=1.75)
    for name, value in COUNTERS_OF_THE_PAGE.items():
        assert page.value(name) == value, name
    assert len(COUNTERS_OF_THE_PAGE) == len(COUNTERS), "a counter that this test does not know"
    assert page.value("fastserve:engine_restarts_total") == 3
    assert page.value("vllm:num_requests_running") == 2 and page.value("vllm:num_requests_waiting") == 5
    assert page.value("vllm:kv_cache_usage_perc") == 0.25 and page.value("fastserve:backlog_seconds") == 12.5
    assert page.value("fastserve:regret") == 1.75
    blocks = {
        (tier, state): page.value("fastserve:kv_blocks", tier=tier, state=state)
        for tier in ("device", "host")
        for state in ("used", "cached", "free")
    }
    assert blocks == {
        ("device", "used"): 25, ("device", "cached"): 30, ("device", "free"): 45,
        ("host", "used"): 8, ("host", "cached"): 5, ("host", "free"): 27,
    }  # fmt: skip
    assert page.value("fastserve:programs") == 3
    for number, level in enumerate(LEVELS):
        assert page.value("fastserve:level_jobs", level=str(number), state="waiting") == level.waiting
        assert page.value("fastserve:level_jobs", level=str(number), state="running") == level.running
        assert page.value("fastserve:level_oldest_wait_seconds", level=str(number)) == level.oldest_wait
    assert page.value("fastserve:level_jobs", level="3", state="waiting") is None


def test_each_of_several_engines_has_its_own_gauges() -> None:
    """Whoever is down has none but the jobs that wait for it. Counters are sums."""
    engine = told_engine(status())
    engine.others = [Beside(status=status(live=3, running=3, backlog=1.5)), Beside(ready=False, jobs=4)]
    page = page_of(engine)
    for name, values in {
        "vllm:num_requests_running": (2, 3, 0),
        "vllm:num_requests_waiting": (5, 0, 4),
        "vllm:kv_cache_usage_perc": (0.25, 0.25, None),
        "fastserve:backlog_seconds": (12.5, 1.5, None),
    }.items():
        assert tuple(page.value(name, engine=str(number)) for number in range(3)) == values, name
    assert page.value("fastserve:kv_blocks", engine="1", tier="host", state="used") == 8
    assert page.value("fastserve:level_jobs", engine="1", level="0", state="waiting") == LEVELS[0].waiting
    assert page.value("fastserve:level_oldest_wait_seconds", engine="1", level="2") == LEVELS[2].oldest_wait
    assert page.value("fastserve:iterations_total") == 11


def test_several_engines_are_told_as_one() -> None:
    counters = {name: 100.0 + place for place, name in enumerate(COUNTERS)}
    first = status(time=1.0, levels=LEVELS[:2])
    one = together([first, status(time=2.0, live=3, running=1, backlog=20.0, device_blocks_used=75)], counters)
    assert one is not None and (one.time, one.live, one.running, one.backlog) == (2.0, 10, 3, 20.0)
    assert (one.device_blocks, one.device_blocks_used, one.host_blocks) == (200, 100, 80)
    assert (one.device_blocks_cached, one.host_blocks_cached, one.programs) == (60, 10, 6)
    told = [(level.quantum, level.waiting, level.running, level.oldest_wait) for level in one.levels]
    assert told == [(0.5, 6, 2, 1.25), (1.0, 0, 2, 0.0), (None, 2, 0, 60.5)]
    assert {name: getattr(one, name) for name in COUNTERS} == counters
    assert together([], counters) is None and first.live == 7 and first.levels[0].waiting == 3


def test_without_jobs_there_is_no_regret() -> None:
    assert page_of(ToyEngine(), regret=None).value("fastserve:regret") is None


def test_counters_do_not_fall_when_the_engine_is_started_again() -> None:
    """Through deaths, before the first Status of the next engine and with its smaller figures."""

    async def scenario() -> None:
        client = EngineClient(["nothing"], None)
        (engine,) = client.engines
        metrics = Metrics(client, "toy", lambda: None)
        pages = [Page(metrics.render())]
        for life in range(3):
            engine.engine_up(Ready([1], {}, 61, 256), lambda message: None)
            pages.append(Page(metrics.render()))
            for told in (status(**dict.fromkeys(COUNTERS, 0.25 * life)), status()):
                engine.engine_said(told)
                pages.append(Page(metrics.render()))
            for _ in range(3):
                engine.engine_said(Step([], []))  # nobody was running: this death is nobody's fault
            engine.engine_down(crashed=True)
            client.open([1], SamplingParams(), seed=0)
            pages.append(Page(metrics.render()))
            # Nothing runs, and nothing is lost.
            assert pages[-1].value("vllm:num_requests_running") == 0
            assert pages[-1].value("vllm:num_requests_waiting") == life + 1
            assert pages[-1].value("fastserve:kv_blocks", tier="device", state="used") is None
        for name, value in COUNTERS_OF_THE_PAGE.items():
            seen = [page.value(name) for page in pages]
            assert None not in seen and seen == sorted(map(float, seen)), name  # type: ignore[arg-type]
            assert seen[0] == 0 and seen[-1] == 3 * value, name

    asyncio.run(scenario())


def test_totals_count_a_status_once() -> None:
    totals = Totals()
    totals.said(status(iterations=5))
    totals.said(status(iterations=8))
    totals.lost()
    totals.lost()
    assert totals.values()["iterations"] == 8
    totals.said(status(iterations=2))
    assert totals.values()["iterations"] == 10


def test_the_page_of_a_server() -> None:
    async def scenario(world: World) -> None:
        for tokens in (2, 5):
            await world.post("/v1/completions", {"prompt": "abc", "max_tokens": tokens, "ignore_eos": True})
        answer = await world.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        page = Page(answer.text)
        assert page.value("vllm:request_success_total", finished_reason="length") == 2
        assert page.value("vllm:request_generation_tokens_sum") == 7
        assert page.value("vllm:request_prompt_tokens_sum") == 6
        assert page.value("vllm:e2e_request_latency_seconds_sum") == 20.0  # the toy's jobs take 10 s each

    run(scenario)


def test_docs_and_code_agree() -> None:
    """docs/metrics.md lists every metric with its type and labels, and no other."""
    page = page_of(told_engine(status()), Ended(JobMetrics(0.0, 0.0, 1.0, 2.0, 0, 0, 1.0, 1.0)))
    found = {}
    for family in page.families:
        if family.name.endswith("_created"):  # of the client library, beside each counter and histogram
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"model_name", "le"}
        found[name] = (family.type, ", ".join(sorted(labels)) or "–")
    rows = re.findall(
        r"^\| `([a-z]+:\w+)` \| (\w+) \| ([^|]*) \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text("utf-8"), re.M
    )
    assert {name: (kind, labels) for name, kind, _, labels, _ in rows} == found
    for name, _, unit, _, meaning in rows:
        assert meaning.strip() and ("_seconds" not in name or unit == "s") and ("_bytes" not in name or unit == "bytes")
