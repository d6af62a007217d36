"""What Prometheus scrapes: vLLM's names where it has them, so that its dashboards work; `fastserve:` for the rest."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..types import JobMetrics
from .engine_api import EngineState
from .tenants import TenantService

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
_SLOWDOWNS = (1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100)

# Histograms of jobs that ended by themselves: attribute, name, help, buckets.
_HISTOGRAMS: tuple[tuple[str, str, str, Sequence[float]], ...] = (
    ("jct", "vllm:e2e_request_latency_seconds", "Job completion time: arrival to last token.", _SECONDS),
    ("ttft", "vllm:time_to_first_token_seconds", "Arrival to first token.", _SECONDS),
    ("tpot", "vllm:request_time_per_output_token_seconds", "Time of a token after the first.", _TOKEN_SECONDS),
    ("queue", "vllm:request_queue_time_seconds", "Time in which no iteration worked on the job.", _SECONDS),
    ("prefill", "vllm:request_prefill_time_seconds", "Time in iterations that worked on the prompt.", _SECONDS),
    ("decode", "vllm:request_decode_time_seconds", "Time in iterations that worked on the output.", _SECONDS),
    ("inference", "vllm:request_inference_time_seconds", "Both of these.", _SECONDS),
    ("swap", "fastserve:request_swap_time_seconds", "Of the queue time, with the KV on its way back.", _SECONDS),
    ("prompt", "vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS),
    ("output", "vllm:request_generation_tokens", "Tokens of an output.", _TOKENS),
    ("normalized", "fastserve:normalized_latency_seconds", "Job completion time over output tokens.", _TOKEN_SECONDS),
    ("slowdown", "fastserve:slowdown", "Job completion time over the time that iterations worked on it.", _SLOWDOWNS),
    ("preempted", "fastserve:request_preemptions", "Preemptions of a job.", (0, 1, 2, 5, 10, 20, 50, 100)),
)

# Counters of all engines there were: field of Status, name, help.
_COUNTERS = (
    ("prefill_tokens", "vllm:prompt_tokens", "Prompt tokens computed, those computed again included."),
    ("decode_tokens", "vllm:generation_tokens", "Tokens put out."),
    ("preemptions", "vllm:num_preemptions", "Times a job that could run was left out of an iteration."),
    ("iterations", "fastserve:iterations", "Iterations."),
    ("busy_seconds", "fastserve:iteration_seconds", "Time in iterations."),
    ("recomputed_tokens", "fastserve:recomputed_tokens", "KV entries computed again because their blocks were taken."),
    ("offloaded_bytes", "fastserve:swapped_out_bytes", "KV moved to host memory."),
    ("uploaded_bytes", "fastserve:swapped_in_bytes", "KV moved back."),
    ("copy_seconds", "fastserve:swap_seconds", "Time in which KV was on its way."),
    ("hidden_copy_seconds", "fastserve:swap_hidden_seconds", "Of that, beside an iteration that did not wait for it."),
    ("prefix_queries", "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    ("prefix_hits", "vllm:prefix_cache_hits", "Of those, the ones found."),
    ("evicted_blocks", "fastserve:prefix_cache_evicted_blocks", "Blocks of the prefix cache given up for others."),
)


class EngineView(Protocol):
    """What metrics look at of the engine's client."""

    @property
    def engines(self) -> Sequence[EngineState]: ...
    @property
    def restarts(self) -> int: ...
    @property
    def counters(self) -> Mapping[str, float]: ...
    @property
    def tenants(self) -> TenantService: ...


class EndedJob(Protocol):
    """What metrics look at of a job."""

    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def output(self) -> Sequence[int]: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def metrics(self) -> JobMetrics | None: ...


class Metrics:
    """All metrics of one server, labelled with the name of its model as vLLM does."""

    def __init__(self, engine: EngineView, model_name: str, regret: Callable[[], float | None]) -> None:
        self._registry = CollectorRegistry()
        labels = ("model_name",)
        self._histograms = {
            key: Histogram(name, text, labels, registry=self._registry, buckets=buckets).labels(model_name)
            for key, name, text, buckets in _HISTOGRAMS
        }
        self._model = model_name
        self._ended = Counter(
            "vllm:request_success", "Jobs that ended.", (*labels, "finished_reason"), registry=self._registry
        )
        self._registry.register(_EngineCollector(engine, model_name, regret))

    def ended(self, job: EndedJob) -> None:
        """A job has ended, in whatever way."""
        self._ended.labels(self._model, job.finish_reason or "abort").inc()
        if job.metrics is None or job.finish_reason not in ("stop", "length"):
            return
        for key, value in _measured(job, job.metrics).items():
            self._histograms[key].observe(value)

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


def _measured(job: EndedJob, metrics: JobMetrics) -> Mapping[str, float]:
    """A job's share of each histogram it belongs in."""
    output, figures = len(job.output), metrics.as_dict(len(job.output))
    service = metrics.prefill_seconds + metrics.decode_seconds
    values: dict[str, float | None] = {
        "jct": figures["jct"],
        "ttft": figures["ttft"],
        "tpot": figures["tpot"],
        "queue": figures["queue_seconds"],
        "prefill": metrics.prefill_seconds,
        "decode": metrics.decode_seconds,
        "prompt": len(job.prompt),
        "output": output,
        "normalized": figures["normalized_latency"],
        "slowdown": figures["jct"] / service if figures["jct"] is not None and service > 0.0 else None,
        "inference": service,
        "swap": metrics.swap_seconds,
        "preempted": metrics.preemptions,
    }
    return {key: value for key, value in values.items() if value is not None}


class _EngineCollector(Collector):
    """Reads the engines' latest Status when Prometheus asks."""

    def __init__(self, engine: EngineView, model_name: str, regret: Callable[[], float | None]) -> None:
        self._engine = engine
        self._model = model_name
        self._regret = regret

    def collect(self) -> Iterator[Metric]:
        yield self._counter("fastserve:engine_restarts", "Times the engine was started again.", self._engine.restarts)
        tasks = len(asyncio.all_tasks())
        yield self._gauge("fastserve:asyncio_tasks", "Tasks of the API server's event loop, this request's too.", tasks)
        counters = self._engine.counters
        for key, name, text in _COUNTERS:
            yield self._counter(name, text, counters[key])
        yield self._tenants()
        if (regret := self._regret()) is not None:
            yield self._gauge("fastserve:regret", "Mean JCT of late over that under SRPT in hindsight.", regret)
        yield from self._gauges()

    def _gauges(self) -> Iterator[Metric]:
        """What there is of each engine, with its number where there are several; most of it while it is up only."""
        running = self._family("vllm:num_requests_running", "Jobs in the current iteration.")
        waiting = self._family("vllm:num_requests_waiting", "Other live jobs.")
        usage = self._family("vllm:kv_cache_usage_perc", "Share of the device's KV blocks in use, 1 is all.")
        backlog = self._family("fastserve:backlog_seconds", "Work left in all live jobs, by the cost model.")
        programs = self._family("fastserve:programs", "Programs that are alive.")
        blocks = self._family("fastserve:kv_blocks", "KV blocks.", "tier", "state")
        jobs = self._family("fastserve:level_jobs", "Jobs of a level.", "level", "state")
        waits = self._family("fastserve:level_oldest_wait_seconds", "Longest wait on a level.", "level")
        for number, engine in enumerate(self._engine.engines):
            of = (self._model, str(number)) if self._several else (self._model,)
            status = engine.status
            if status is None:  # the rest is known again when the next engine is up
                running.add_metric(of, 0)
                waiting.add_metric(of, engine.jobs)
                continue
            running.add_metric(of, status.running)
            waiting.add_metric(of, status.live - status.running)
            usage.add_metric(of, status.device_blocks_used / max(1, status.device_blocks))
            backlog.add_metric(of, status.backlog)
            programs.add_metric(of, status.programs)
            for tier, total, taken, cached in (
                ("device", status.device_blocks, status.device_blocks_used, status.device_blocks_cached),
                ("host", status.host_blocks, status.host_blocks_used, status.host_blocks_cached),
            ):
                blocks.add_metric((*of, tier, "used"), taken)
                blocks.add_metric((*of, tier, "cached"), cached)
                blocks.add_metric((*of, tier, "free"), total - taken - cached)
            for level, its in enumerate(status.levels):
                jobs.add_metric((*of, str(level), "waiting"), its.waiting)
                jobs.add_metric((*of, str(level), "running"), its.running)
                waits.add_metric((*of, str(level)), its.oldest_wait)
        families = (running, waiting, usage, backlog, programs, blocks, jobs, waits)
        yield from (family for family in families if family.samples)

    def _tenants(self) -> Metric:
        text = "Modelled seconds of service; the largest tenants have names."
        family = CounterMetricFamily("fastserve:tenant_service_seconds", text, labels=("model_name", "tenant"))
        tenants = self._engine.tenants
        labelled: defaultdict[str, float] = defaultdict(float)
        for name, seconds in tenants.seconds().items():  # two users may have one hash
            labelled[tenants.label(name)] += seconds
        for label, seconds in labelled.items():
            family.add_metric((self._model, label), seconds)
        return family

    @property
    def _several(self) -> bool:
        return len(self._engine.engines) > 1

    def _family(self, name: str, text: str, *labels: str) -> GaugeMetricFamily:
        of = ("model_name", "engine") if self._several else ("model_name",)
        return GaugeMetricFamily(name, text, labels=(*of, *labels))

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family
