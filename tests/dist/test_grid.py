"""Which ranks there are, by what launchers say, and who shares what with whom."""

from __future__ import annotations

import pytest

from fastserve.distributed import Grid, Launched, launched
from fastserve.types import InvalidRequest


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, Launched("mpiexec", 1, 4)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0"}, Launched("Open MPI", 0, 2)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}, Launched("srun", 3, 8)),
        ({"PMIX_RANK": "2", "SLURM_STEP_NUM_TASKS": "3"}, Launched("srun", 2, 3)),
        ({"PMI_RANK": "2", "PMI_SIZE": "3", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
         Launched("mpiexec", 2, 3)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a batch script, not a task of srun
        ({"FASTSERVE_RANK": "1", "FASTSERVE_WORLD_SIZE": "2", "PMI_RANK": "0", "PMI_SIZE": "1"},
         Launched("fastserve", 1, 2)),
    ],
)  # fmt: skip
def test_launchers(environment: dict[str, str], expected: Launched | None) -> None:
    assert launched(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PMI_RANK": "4", "PMI_SIZE": "4"}, "PMI_RANK: must be a whole number from 0 to 3, got '4'"),
        ({"PMI_RANK": "0", "PMI_SIZE": "many"}, "PMI_SIZE: must be a whole number from 1 to 65536, got 'many'"),
        ({"FASTSERVE_RANK": "-1", "FASTSERVE_WORLD_SIZE": "2"}, "FASTSERVE_RANK: must be"),
    ],
)
def test_variables_that_cannot_be(environment: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        launched(environment)


def test_a_grid_of_two_stages_of_three() -> None:
    grid = Grid(tensor_parallel_size=3, pipeline_parallel_size=2)
    assert grid.size == 6
    assert [grid.coordinates(rank) for rank in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [list(grid.tensor_ranks(rank)) for rank in (0, 2, 4)] == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    assert [list(grid.pipeline_ranks(rank)) for rank in (0, 2, 4)] == [[0, 3], [2, 5], [1, 4]]


def test_a_grid_names_what_is_wrong() -> None:
    Grid(2, 2).check(4)
    with pytest.raises(InvalidRequest) as caught:
        Grid(2, 3).check(4)
    assert str(caught.value) == (
        "tensor_parallel_size × pipeline_parallel_size: must be the number of ranks (4), got 2 × 3 = 6"
    )
    with pytest.raises(InvalidRequest, match="tensor_parallel_size: must be at least 1, got 0"):
        Grid(0, 1)
    with pytest.raises(InvalidRequest, match="pipeline_parallel_size"):
        Grid(1, "two")  # type: ignore[arg-type]
