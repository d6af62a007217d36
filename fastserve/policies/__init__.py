"""Scheduling policies, by the name every surface uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..config import SchedulerConfig
from ..cost import Cost, quantum_of, shared_seconds
from ..origin import sharer_of
from ..programs import Programs
from ..types import InvalidRequest
from .base import Policy
from .fcfs import FirstComeFirstServed
from .gittins import Gittins
from .indices import Indices
from .lengths import LengthDistribution
from .mlfq import MultiLevelFeedbackQueue
from .priority import ByPriority
from .srpt import ShortestRemainingTime
from .tenant import ByTenant


def _fcfs(config: SchedulerConfig, cost: Cost, programs: Programs) -> Callable[[], Policy]:
    return FirstComeFirstServed


def _mlfq(config: SchedulerConfig, cost: Cost, programs: Programs, *, skip_join: bool = False) -> Callable[[], Policy]:
    return lambda: MultiLevelFeedbackQueue(
        quantum=quantum_of(cost, config.max_num_seqs),
        shared=shared_seconds(cost, config.max_num_seqs),
        num_levels=config.num_levels,
        starvation_limit=config.starvation_limit,
        slowdown_limit=config.slowdown_limit,
        skip_join=skip_join,
        prefill=partial(cost.prefill_charge, 0),
    )


def _skip_join_mlfq(config: SchedulerConfig, cost: Cost, programs: Programs) -> Callable[[], Policy]:
    return _mlfq(config, cost, programs, skip_join=True)


def _srpt(config: SchedulerConfig, cost: Cost, programs: Programs) -> Callable[[], Policy]:
    return lambda: ShortestRemainingTime(cost)


def _gittins(config: SchedulerConfig, cost: Cost, programs: Programs) -> Callable[[], Policy]:
    lengths = LengthDistribution()
    indices = Indices(cost=cost, lengths=lengths, batch=config.max_num_seqs, programs=programs)
    return lambda: Gittins(
        cost=cost,
        lengths=lengths,
        indices=indices,
        num_levels=config.num_levels,
        starvation_limit=config.starvation_limit,
        slowdown_limit=config.slowdown_limit,
    )


# Each gives what makes one policy for each priority value of each tenant.
POLICIES: dict[str, Callable[[SchedulerConfig, Cost, Programs], Callable[[], Policy]]] = {
    "fcfs": _fcfs,
    "mlfq": _mlfq,
    "skip-join-mlfq": _skip_join_mlfq,
    "srpt": _srpt,
    "gittins": _gittins,
}

# Those that can serve, not knowing how long an output will be.
ONLINE_POLICIES = tuple(name for name in POLICIES if name != "srpt")


def create_policy(config: SchedulerConfig, cost: Cost, programs: Programs | None = None) -> Policy:
    """The policy that config.policy names. `programs`: what is known of those whose calls jobs are.

    Raises InvalidRequest, listing the choices, for a name unknown.
    """
    if config.policy not in POLICIES:
        raise InvalidRequest("policy", f"must be one of {', '.join(POLICIES)}; got {config.policy!r}")
    make = POLICIES[config.policy](config, cost, Programs() if programs is None else programs)
    return ByTenant(
        lambda: ByPriority(make),
        quantum=quantum_of(cost, config.max_num_seqs),
        rows=config.max_num_seqs,
        weights=config.tenant_weights,
        name=sharer_of,
    )


__all__ = ["ONLINE_POLICIES", "POLICIES", "Policy", "create_policy"]
