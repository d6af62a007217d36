"""The runtime's slots: which are taken, and what the next plan has to tell of them."""

from __future__ import annotations

from .planning import PlanBuilder
from .types import Job


class Slots:
    """A slot holds what sampling and attention need of a job that has KV. Numbers are used again, the latest first."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._count = 0
        self._opened: dict[Job, None] = {}
        self._closed: list[int] = []
        self._tables: dict[int, list[tuple[int, int]]] = {}  # (index, block), by slot

    @property
    def untold(self) -> bool:
        """Whether the runtime does not know which are open."""
        return bool(self._closed or self._opened)

    def take(self, job: Job) -> int:
        """Give the job a slot; whoever plans tells the runtime of it."""
        slot = job.slot = self._free.pop() if self._free else self._count
        self._count = max(self._count, slot + 1)
        return slot

    def open(self, job: Job) -> None:
        """Give the job a slot; the next plan tells the runtime of it."""
        self.take(job)
        self._opened[job] = None

    def change(self, slot: int, blocks: list[tuple[int, int]]) -> None:
        """More of a slot's table, as (index, block), for the next plan to tell."""
        self._tables.setdefault(slot, []).extend(blocks)

    def give_back(self, job: Job) -> None:
        """The job has no slot any more."""
        slot = job.slot
        assert slot is not None
        self._tables.pop(slot, None)
        if job in self._opened:
            del self._opened[job]
        else:
            self._closed.append(slot)
        self._free.append(slot)
        job.slot = None

    def tell(self, plan: PlanBuilder) -> list[int]:
        """Add opened slots and changed tables to a plan; returns those closed."""
        for job in self._opened:
            assert job.slot is not None
            plan.open(job, job.slot)
        self._opened.clear()
        for slot, blocks in self._tables.items():
            plan.grow(slot, blocks)
        closed, self._closed, self._tables = self._closed, [], {}
        return closed

    def balance(self, jobs: list[Job]) -> bool:
        """Whether every slot is one job's or free."""
        taken = [job.slot for job in jobs if job.slot is not None]
        return len(taken) == len(jobs) and sorted([*taken, *self._free]) == list(range(self._count))
