"""One configuration of `fastserve simulate`, as an experiment states it: run, kept in the data, told on the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from fastserve.bench.experiment import Experiment
from fastserve.bench.simulation import Point, RunSummary, Setting, capacity, run

# A workload of this name draws its lengths from the trace file of the same name in --azure.
AZURE: Final = "azure"

# What is kept of a run.
_MEASURES: Final = (
    "rate",
    "jobs",
    "mean_jct",
    "p50_jct",
    "p95_jct",
    "p99_jct",
    "mean_ttft",
    "mean_normalized_latency",
    "p95_normalized_latency",
    "preemptions",
    "swapped_blocks",
    "recomputed_tokens",
    "stall_seconds",
    "seconds",
    "iterations",
    "mean_batch",
)

# What the command line leaves to its defaults.
_DEFAULTS: Final = {"warmup_jobs": 0, "tensor_parallel_size": 1, "pipeline_parallel_size": 1}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything of a run but policy, rate and seed; None: the default of `fastserve simulate`."""

    workload: str
    jobs: int
    warmup_jobs: int = 0
    arrivals: str = "gamma:1"
    model: str = "opt-13b"
    hardware: str = "a100-80g"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    pipelining: bool | None = None
    max_num_seqs: int = 16
    kv_blocks: int | None = None
    swap_blocks: int | None = None
    admission: str | None = None
    swap_mode: str | None = None
    repayment: float | None = None
    starvation_limit: str | None = None
    slowdown_limit: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """What is not a default; what from_dict reads."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Case:
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    def setting(self, azure: Path | None = None) -> Setting:
        """What runs. Raises InvalidRequest for an option out of range, ValueError without the trace it needs."""
        return _setting(self, azure)

    def experiment(self, azure: Path | None) -> Experiment:
        if self.workload == AZURE and azure is None:
            raise ValueError("needs the trace file given by --azure")
        scheduler: dict[str, Any] = {"max_num_seqs": self.max_num_seqs}
        for name in ("admission", "swap_mode", "repayment"):
            if (value := getattr(self, name)) is not None:
                scheduler[name] = value
        for name in ("starvation_limit", "slowdown_limit"):
            if (text := getattr(self, name)) is not None:
                scheduler[name] = None if text == "none" else float(text)
        traced = self.workload == AZURE
        return Experiment(
            workload=None if traced else self.workload,
            trace=azure if traced else None,
            arrivals=self.arrivals,
            jobs=self.jobs,
            warmup_jobs=self.warmup_jobs,
            model=self.model,
            hardware=self.hardware,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            pipelining=self.pipelining is not False,
            kv_blocks=self.kv_blocks,
            swap_blocks=self.swap_blocks,
            scheduler=scheduler,
        )

    def command(self, policies: str, rates: str, seeds: int) -> str:
        """The `fastserve simulate` that does the same."""
        words = []
        for name, value in self.as_dict().items():
            if _DEFAULTS.get(name) == value:
                continue
            if name == "pipelining":
                words += [] if value else ["--no-pipelining"]
                continue
            option = "trace" if name == "workload" and value == AZURE else name.replace("_", "-")
            words.append(f"--{option} {'azure_llm_2023_conv.csv' if option == 'trace' else value}")
        words += [f"--policy {policy}" for policy in policies.split()]
        return " ".join(["fastserve simulate", *words, rates, f"--seeds {seeds}"])


@lru_cache(maxsize=8)
def _setting(case: Case, azure: Path | None) -> Setting:
    return case.experiment(azure).setting()


def simulate(case: Case, policy: str, rate: float, seed: int, azure: Path | None = None) -> dict[str, Any]:
    """The measures of one run."""
    return measures(run(case.setting(azure), Point(policy, rate, seed)))


def measures(summary: RunSummary) -> dict[str, Any]:
    """What is kept of a run, to six digits."""
    values = {name: getattr(summary, name) for name in _MEASURES}
    return {name: rounded(value) if isinstance(value, float) else value for name, value in values.items()}


def measured_capacity(case: Case, seed: int, azure: Path | None = None) -> dict[str, Any]:
    """Jobs a second of fcfs when there is always more to do."""
    return {"jobs_per_second": rounded(capacity(case.setting(azure), seed))}


def rounded(value: float) -> float:
    return float(f"{value:.6g}")
