"""Scheduling policies by name."""

from __future__ import annotations

from collections.abc import Callable

from ..config import SchedulerConfig
from ..cost import Cost
from ..types import InvalidRequest
from .base import Policy
from .fcfs import FirstComeFirstServed
from .mlfq import MultiLevelFeedbackQueue

POLICIES: dict[str, Callable[[SchedulerConfig, Cost], Policy]] = {
    "fcfs": lambda config, cost: FirstComeFirstServed(),
    "mlfq": lambda config, cost: MultiLevelFeedbackQueue(
        quantum=cost.decode_seconds(1),
        num_levels=config.num_levels,
        starvation_limit=config.starvation_limit,
        skip_join=False,
    ),
    "skip-join-mlfq": lambda config, cost: MultiLevelFeedbackQueue(
        quantum=cost.decode_seconds(1),
        num_levels=config.num_levels,
        starvation_limit=config.starvation_limit,
        skip_join=True,
    ),
}


def create_policy(config: SchedulerConfig, cost: Cost) -> Policy:
    """The policy that config.policy names. Raises InvalidRequest, listing the choices, for a name unknown."""
    if config.policy not in POLICIES:
        raise InvalidRequest("policy", f"must be one of {', '.join(POLICIES)}; got {config.policy!r}")
    return POLICIES[config.policy](config, cost)


__all__ = ["POLICIES", "Policy", "create_policy"]
