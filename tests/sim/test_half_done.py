"""Jobs that began and wait must not fill the memory, whatever may leave it: those that come after them want to run."""

from __future__ import annotations

from statistics import mean

import pytest

from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel, Link
from fastserve.simulator import simulate
from fastserve.types import Job
from fastserve.workloads.job import SimJob

LONG_FIRST = [SimJob(0.0, 900, 300), *(SimJob(0.5 + 0.09 * number, 64, 10) for number in range(600))]
CROWD_FIRST = [
    SimJob(0.0, 400, 600),
    *[SimJob(45.0, 256, 5)] * 32,
    *(SimJob(45.5 + 0.09 * number, 64, 10) for number in range(600)),
]


def mean_jct(jobs: list[SimJob], policy: str, swap_mode: str) -> float:
    """Seconds. 100 blocks, of which a short job needs 5: eleven rows' work for sixteen."""
    config = SchedulerConfig(
        policy=policy,
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        num_blocks=100,
        num_host_blocks=1000,
        starvation_limit=5.0,
        swap_mode=swap_mode,
    )
    done: list[Job] = []
    simulate(
        jobs, config, CostModel.constant(0.1), link=Link(offload_block=0.05, upload_block=0.05), on_finish=done.append
    )
    return mean(job.metrics.jct for job in done if job.metrics.jct is not None)


@pytest.mark.parametrize("jobs", [LONG_FIRST, CROWD_FIRST], ids=["one long job first", "a crowd first"])
@pytest.mark.parametrize("swap_mode", ["proactive", "reactive"])
def test_a_place_on_the_host_makes_nobody_wait(jobs: list[SimJob], swap_mode: str) -> None:
    own = mean_jct(jobs, "skip-join-mlfq", swap_mode)
    assert own < mean_jct(jobs, "fcfs", swap_mode)
    assert own < 1.1 * mean_jct(jobs, "skip-join-mlfq", "recompute")
