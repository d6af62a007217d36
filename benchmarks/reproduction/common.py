"""What the experiments share: how much to run, loads, numbers as text, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastserve.bench.stats import estimate
from fastserve.bench.tables import number

from .cases import AZURE, Case, measured_capacity, simulate
from .lab import Data, Lab, Task

# A contender is a policy, and for Orca how it admits jobs.
ORCA = "orca"


@dataclass(frozen=True)
class Scale:
    """How much an experiment runs."""

    quick: bool = False
    azure: Path | None = None

    def pick(self, full: Any, quick: Any) -> Any:
        return quick if self.quick else full

    def seeds(self, full: int) -> range:
        return range(min(full, 2) if self.quick else full)


def contender(case: Case, name: str) -> tuple[Case, str]:
    """The case and the policy that a contender's name stands for."""
    if name != ORCA:
        return case, name
    return Case.from_dict(case.as_dict() | {"admission": "reserve"}), "fcfs"


def capacities(lab: Lab, cases: Iterable[Case], seeds: Iterable[int], scale: Scale) -> dict[tuple[Case, int], float]:
    """Jobs a second that fcfs can do, by case and seed."""
    keys = [(case, seed) for case in cases for seed in seeds]
    tasks = [
        Task({"capacity": case.as_dict(), "seed": seed}, measured_capacity, (case, seed, _trace(case, scale)))
        for case, seed in keys
    ]
    results = lab.run(tasks, "capacities")
    return {key: result["jobs_per_second"] for key, result in zip(keys, results, strict=True)}


def point(case: Case, name: str, seed: int, rate: float, scale: Scale, **more: Any) -> Task:
    """One run of a contender; `more` is kept with it, a load for instance."""
    own, policy = contender(case, name)
    what = {"case": case.as_dict(), "policy": name, "seed": seed, **(more or {"rate": rate})}
    return Task(what, simulate, (own, policy, rate, seed, _trace(case, scale)))


def at_loads(
    lab: Lab, cases: Sequence[Case], loads: Sequence[float], names: Sequence[str], seeds: Iterable[int], scale: Scale
) -> None:
    """Every contender of every case at every load, with every seed. Loads are shares of the seed's own capacity."""
    seeds = list(seeds)
    rates = capacities(lab, cases, seeds, scale)
    tasks = [
        point(case, name, seed, load * rates[case, seed], scale, load=load)
        for case in cases
        for load in loads
        for seed in seeds
        for name in names
    ]
    lab.run(tasks, "runs")


def _trace(case: Case, scale: Scale) -> Path | None:
    return scale.azure if case.workload == AZURE else None


class Missing(Exception):
    """The data lack a run that the page is about: they are of another configuration, or not complete."""


def values(data: Data, measure: str, case: Case, policy: str, **more: Any) -> list[float]:
    """One measure of the runs of a contender, by seed. Raises Missing when there is none."""
    found = data.values(measure, case=case.as_dict(), policy=policy, **more)
    if not found:
        raise Missing(f"{policy} on {case.workload}")
    return found


def capacities_of(data: Data, case: Case) -> list[float]:
    """Jobs a second, by seed, as `capacities` has measured. Raises Missing when it has not."""
    found = data.values("jobs_per_second", capacity=case.as_dict())
    if not found:
        raise Missing(f"the capacity on {case.workload}")
    return found


def ratios(data: Data, measure: str, case: Case, baseline: str, policy: str, **more: Any) -> list[float]:
    """How many times smaller a measure is than the baseline's, seed by seed."""
    pairs = zip(values(data, measure, case, baseline, **more), values(data, measure, case, policy, **more), strict=True)
    return [base / own for base, own in pairs]


def text(numbers: Sequence[float]) -> str:
    """`4.23 ± 0.12`: the mean over seeds and its 95 % confidence interval."""
    value = estimate(numbers)
    if value.half_width is None:
        return number(value.mean)
    # To the digit that the mean has.
    digits = len(number(value.mean).partition(".")[2])
    return f"{number(value.mean)} ± {value.half_width:.{digits}f}"


def times(numbers: Sequence[float]) -> str:
    """`5.12 ± 0.40 ×`"""
    return f"{text(numbers)} ×"


Item = TypeVar("Item")
Row = TypeVar("Row")


def present(make: Callable[[Item], Row], items: Iterable[Item]) -> Iterator[Row]:
    """What is made of each item, without those whose runs are missing."""
    for item in items:
        with suppress(Missing):
            yield make(item)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; all columns but the first `left` are flush right."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
