from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from toy import bare_job

from fastserve.cost import CostModel
from fastserve.decode_rows import DecodeRows
from fastserve.types import Job

COST = CostModel(per_iteration=1.0)
SIZE = 12


def batch_of(positions: list[int]) -> tuple[DecodeRows, list[Job]]:
    """A batch of jobs at these positions, each of which has decoded once since."""
    batch, jobs = DecodeRows(SIZE, COST), [bare_job(index, 1.0) for index in range(len(positions))]
    for job, position in zip(jobs, positions, strict=True):
        job.slot, job.computed = job.index, position
        batch.extend([job], [position + 2], [1e9])
    batch.advance()
    return batch, jobs


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=SIZE), st.data())
def test_leaving_together_is_leaving_one_by_one(positions: list[int], data: st.DataObject) -> None:
    leavers = data.draw(st.lists(st.integers(0, len(positions) - 1), unique=True))
    expected = list(range(len(positions)))  # the last takes the place of each
    for leaver in leavers:
        place, last = expected.index(leaver), expected.pop()
        if last != leaver:
            expected[place] = last
    batch, jobs = batch_of(positions)
    assert batch.remove([jobs[index] for index in leavers]) == [1.0] * len(leavers)
    assert [job.index for job in batch.jobs] == expected
    assert [job.row for job in batch.jobs] == list(range(len(expected)))
    for index in leavers:
        left = jobs[index]
        assert (left.batch, left.row, left.computed, left.served) == (None, -1, *[positions[index] + 1] * 2)
    assert batch.growing() == []
    rows = batch.advance()
    assert rows.tolist() == [[index, positions[index] + 1, 1, 1] for index in expected]
    assert batch.growing() == list(range(len(expected)))
    assert [batch.unreported(job) for job in batch.jobs] == [2.0] * len(expected)


def test_those_past_their_horizon_are_reported_and_renewed() -> None:
    batch, jobs = DecodeRows(SIZE, COST), [bare_job(index, 1.0) for index in range(3)]
    batch.extend(jobs, [10] * 3, [3.0, 1.0, 2.0])
    batch.advance()
    assert batch.expired() == ([jobs[1]], [1.0]) and jobs[1].served == 1
    batch.renew([3.0])
    batch.advance()
    assert batch.expired() == ([jobs[2]], [2.0])
    batch.renew([9.0])
    assert batch.expired() == ([], [])
    batch.advance()
    assert batch.expired() == ([jobs[0]], [3.0])
    batch.renew([9.0])
    batch.advance()
    assert batch.expired() == ([jobs[1]], [3.0])
