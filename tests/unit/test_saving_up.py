"""Nobody saves up service that it did not ask for: by always having a job, or by an accomplice's."""

from __future__ import annotations

from collections import Counter

import pytest
from unit_server import COST, UnitServer, unit_job

from fastserve.config import SchedulerConfig
from fastserve.policies import create_policy
from fastserve.policies.average import Average

ROWS = 8
SLICE = 16  # decodes
BURST = 64 * SLICE  # what one who always had a job may have before the others


class World:
    """Eight rows, and jobs of one token of prompt."""

    def __init__(self, **weights: float) -> None:
        config = SchedulerConfig(policy="fcfs", max_num_seqs=ROWS, tenant_weights=weights)
        self.server = UnitServer(create_policy(config, COST), ROWS, lumped=True)
        self.count = 0

    def ask(self, tenant: str, jobs: int = 1, output: int = 5000) -> None:
        for _ in range(jobs):
            job = unit_job(self.count, self.server.now, 1, output, max_output=output)
            job.tenant = tenant
            self.server.add(job)
            self.count += 1

    def steps(self, count: int, *always: str) -> Counter[str]:
        """Rows, by tenant, of so many iterations; some tenants have a job of 20 tokens more every 20."""
        rows: Counter[str] = Counter()
        for step in range(count):
            if step % 20 == 0:
                for tenant in always:
                    self.ask(tenant, output=21)  # one token longer, so that there always is one
            rows.update(job.tenant for job in self.server.step())
        return rows


named = pytest.mark.parametrize(
    "name", ["{}", "key 0/{}", "key {}/"], ids=["tenants", "users of a key", "keys"]
)  # fmt: skip
# Jobs of the other: a flood; not many more than there are rows; and no more than are left, so that nobody waits. And
# what comes then: another flood, or no more than fills four batches.
busy = pytest.mark.parametrize(("jobs", "more"), [(600, 300), (12, 30), (7, 30)])


@named
@busy
def test_who_always_has_a_job_saves_nothing_up_for_a_flood(name: str, jobs: int, more: int) -> None:
    """After 600 iterations with a row of eight it is 3,000 decodes behind, and goes first for 64 slices only."""
    world, calm, other = World(), name.format(1), name.format(2)
    world.ask(other, jobs)
    assert world.steps(600, calm)[calm] < 640
    world.ask(calm, more)
    rows = world.steps(500)
    assert rows.total() == pytest.approx(500 * ROWS, abs=2)
    assert 0 <= rows[calm] - rows[other] <= BURST + 4 * SLICE
    rows = world.steps(300)
    assert rows[calm] == pytest.approx(rows[other], abs=4 * SLICE)


@named
@busy
def test_an_accomplice_who_always_has_a_job_saves_nothing_up_for_others(name: str, jobs: int, more: int) -> None:
    """Whoever comes is served as those are that compete for rows, not as who has all that it asks for.

    It has no less than tenants have on average, and no more than the other.
    """
    world, calm, other, flood = World(), name.format(1), name.format(2), name.format(3)
    world.ask(other, jobs)
    world.steps(600, calm)
    world.ask(flood, more)
    rows = world.steps(400, calm)
    assert rows.total() / 3 - 4 * SLICE <= rows[flood] <= rows[other] + 4 * SLICE


@named
def test_two_that_saved_up_together_have_nothing_either(name: str) -> None:
    world, other, floods = World(), name.format(2), [name.format(1), name.format(3)]
    world.ask(other, 600)
    world.steps(600, *floods)
    for flood in floods:
        world.ask(flood, 300)
    rows = world.steps(700)
    assert all(0 <= rows[flood] - rows[other] <= BURST + 4 * SLICE for flood in floods)


@pytest.mark.parametrize("weight", [0.25, 4.0])
def test_what_may_be_had_before_the_others_does_not_weigh(weight: float) -> None:
    """A burst's worth of rows, whatever the weight; then rows by weight."""
    world = World(**{"1": weight})
    world.ask("2", 600)
    world.steps(800, "1")
    world.ask("1", 300)
    rows = world.steps(500)
    share = weight / (1 + weight)
    ahead = rows["1"] - share * rows.total()  # of what it takes to catch up, the others' shares are theirs again
    assert 0 <= ahead <= BURST + 8 * SLICE


def test_a_small_burst_of_one_who_always_had_a_job_waits_for_nobody() -> None:
    """Which is why something is left: of five jobs at once beside a flood, every one has its row in every iteration."""
    world = World()
    world.ask("2", 600)
    world.steps(600, "1")
    world.ask("1", 5, output=40)
    rows = world.steps(40)
    assert rows["1"] >= 5 * 40


def test_nobody_is_further_behind_the_average_than_ahead() -> None:
    average = Average(1000.0)
    average.wakes("a", 2.0)
    average.wakes("b", 2.0)
    average.serve(0.0, 40_000.0, 2.0)
    assert average.serve(0.0, 40.0, 2.0) == 10_010.0 - 500.0
