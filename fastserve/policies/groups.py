"""Groups of jobs whose outputs are longer or shorter than those of others: a tenant's, a prompt's, a program's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Final

from ..types import Job
from .hazards import Hazards, deviation, drifted

# Groups of each sort that are remembered.
_MOST: Final = 4096

# Completions after which one of a group counts 1/e of a new one, and those that a table is made from at least.
_MEMORY: Final = 1000.0
_RECENT_MEMORY: Final = 100.0
_ENOUGH: Final = 32

# A table counts what others say as much as this many jobs of the group.
_OTHERS_WEIGHT: Final = 20.0

# A group gets a table of its own when its ends deviate by this many standard deviations (of thousands of groups, looked
# at time after time, chance makes hardly one do so) and by this share of jobs, and keeps it until one is half of that.
_DEVIATIONS, _DISTANCE = 5.0, 0.1


class Group:
    """Its hazards, and its table while it is unlike `parent`, or, without one, unlike all jobs."""

    __slots__ = ("completions", "parent", "remembered", "table", "told", "values")

    def __init__(self, parent: Group | None) -> None:
        self.parent = parent
        self.remembered = True
        self.told: list[Hazards] = []  # its hazards and, while it has a table, those of late, by which it may drift
        self.completions = 0
        self.table = 0  # its number; 0: none
        self.values: list[float] = []  # the table's hazards
        self.restart()

    @property
    def hazards(self) -> Hazards:
        return self.told[0]

    @property
    def drifted(self) -> bool:
        return len(self.told) > 1 and drifted(self.told[1], self.told[0])

    def restart(self) -> None:
        """What was learned of it is of no use any more."""
        self.told = [Hazards(_MEMORY)]
        self.completions = 0


class Groups:
    """Tables are numbered from 1 on; no number is given twice."""

    def __init__(self) -> None:
        self.changes = 0  # in which groups have a table
        self._tenants = _Recent()
        self._prompts = _Recent()
        self._programs = _Recent()
        self._tables: dict[int, Group] = {}
        self._next_table = 1
        self._news: dict[Group, None] = {}  # groups with completions since the last renewal

    def of(self, job: Job) -> Sequence[Group]:
        """The groups that the job belongs to, the most telling first: its program, its prompt's beginning, its tenant.

        What programs of a tenant do is compared with what all of that tenant do.
        """
        groups = []
        tenant = self._tenants.get(job.tenant, None) if job.tenant else None
        if job.program is not None:
            groups.append(self._programs.get((job.tenant, job.program), tenant))
        if job.group is not None:
            groups.append(self._prompts.get(job.group, None))
        if tenant is not None:
            groups.append(tenant)
        return groups

    def ended(self, groups: Sequence[Group]) -> None:
        """A job of the groups is complete; their hazards have been told."""
        for group in groups:
            if group.remembered:
                group.completions += 1
                self._news[group] = None

    def forget(self) -> None:
        """All jobs together are not as they were: keep only what is unlike them, and as it was."""
        for group in (*self._tenants, *self._prompts, *self._programs):
            if not group.table or group.drifted:
                self._drop(group)
                group.restart()
        self._news.clear()

    def hazard(self, table: int, index: int) -> float | None:
        """None where the table does not tell, or is no more."""
        group = self._tables.get(table)
        while group is not None:
            if group.table and index < len(group.values):
                return group.values[index]
            group = group.parent
        return None

    def renew(self, counts: Callable[[int], tuple[float, float]], hazard: Callable[[int, int], float]) -> None:
        """Make the tables anew. `counts(b)` are those of all jobs, `hazard(b, table)` what a table says, 0 for all."""
        for group in sorted(self._news, key=lambda group: group.parent is not None):
            if group.drifted:
                self._drop(group)
                group.restart()
            if group.completions < _ENOUGH or not group.remembered:
                continue
            parent = group.parent if group.parent is not None and group.parent.table else None
            deviations, distance = deviation(group.hazards, counts if parent is None else parent.hazards.counts)
            share = 0.5 if group.table else 1.0
            if deviations < share * _DEVIATIONS or distance < share * _DISTANCE:
                self._drop(group)
                continue
            if not group.table:
                group.table, self._next_table = self._next_table, self._next_table + 1
                self._tables[group.table] = group
                group.told.append(Hazards(_RECENT_MEMORY))
                self.changes += 1
            others = parent.table if parent is not None else 0
            group.values = [
                group.hazards.hazard(index, hazard(index, others), _OTHERS_WEIGHT)
                for index in range(len(group.hazards))
            ]
        self._news.clear()
        for gone in (*self._tenants.take_gone(), *self._prompts.take_gone(), *self._programs.take_gone()):
            self._drop(gone)

    def _drop(self, group: Group) -> None:
        if group.table:
            del self._tables[group.table]
            group.table, group.values = 0, []
            del group.told[1:]
            self.changes += 1


class _Recent:
    """The groups of one sort that were asked for last."""

    def __init__(self) -> None:
        self._groups: OrderedDict[Hashable, Group] = OrderedDict()
        self._gone: list[Group] = []  # those with a table that are no more among them

    def get(self, key: Hashable, parent: Group | None) -> Group:
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(parent)
            if len(self._groups) > _MOST:
                gone = self._groups.popitem(last=False)[1]
                gone.remembered = False
                if gone.table:
                    self._gone.append(gone)
        else:
            self._groups.move_to_end(key)
        return group

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    def take_gone(self) -> list[Group]:
        gone, self._gone = self._gone, []
        return gone
