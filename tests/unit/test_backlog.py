"""How long the live jobs will take, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toy import Toy

from fastserve.backlog import Backlog
from fastserve.cost import CostModel

COST = CostModel(per_iteration=1.0, per_token=0.25)  # a decode alone takes 1.25 s, in a batch of 4 half of that


def backlog(toy: Toy, *lengths: int) -> Backlog:
    it = Backlog(toy.config, COST)
    for length in lengths:
        it.ended(length)
    return it


def test_nothing_to_do_takes_no_time() -> None:
    assert backlog(Toy(COST), 5).seconds([]) == 0.0


def test_one_job_takes_its_prefill_and_what_outputs_are_like() -> None:
    toy = Toy(COST, max_num_seqs=4)
    job = toy.add("a", 8, 500)
    assert backlog(toy, 10, 30).seconds([job]) == pytest.approx(1 + 8 * 0.25 + 20 * 1.25)
    assert backlog(toy).seconds([job]) == pytest.approx(1 + 8 * 0.25 + 128 * 1.25), "nothing is known"


def test_what_is_cached_need_not_be_computed() -> None:
    toy = Toy(COST, max_num_seqs=4)
    job = toy.add("a", 8, 500)
    job.cached = 6
    assert backlog(toy, 10, 30).seconds([job]) == pytest.approx(1 + 2 * 0.25 + 20 * 1.25)


def test_a_job_takes_no_longer_than_it_may() -> None:
    toy = Toy(COST, max_num_seqs=4)
    job = toy.add("a", 8, 12)
    assert backlog(toy, 10, 30).seconds([job]) == pytest.approx(1 + 8 * 0.25 + 12 * 1.25)


def test_jobs_share_iterations() -> None:
    toy = Toy(COST, max_num_seqs=4)
    jobs = [toy.add(str(k), 8, 500) for k in range(8)]
    # Each pays a quarter of the second that an iteration of four takes whatever is in it.
    assert backlog(toy, 20).seconds(jobs) == pytest.approx(8 * (0.25 + 8 * 0.25) + 8 * 20 * (1 + 4 * 0.25) / 4)


def test_every_stage_of_a_pipeline_has_a_batch() -> None:
    toy = Toy(COST, max_num_seqs=4)
    jobs = [toy.add(str(k), 8, 500) for k in range(8)]
    piped = Backlog(replace(toy.config, pipeline_parallel_size=2), COST)
    assert piped.seconds(jobs) == pytest.approx(backlog(toy).seconds(jobs) / 2)


def test_the_older_a_job_is_the_fewer_say_how_long_it_lasts() -> None:
    toy = Toy(COST, max_num_seqs=4)
    job = toy.add("a", 8, 500)
    while len(job.output) < 12:
        toy.engine.step()
    assert backlog(toy, 10, 30).seconds([job]) == pytest.approx((30 - 12) * 1.25), "one that got so old, and no prefill"
    assert backlog(toy, 4, 8).seconds([job]) == pytest.approx((12 + 6) * 1.25), "none did: as long again, and more"


def test_kv_that_is_lost_is_computed_again() -> None:
    toy = Toy(COST, max_num_seqs=4)
    job = toy.add("a", 8, 500)
    while len(job.output) < 12:
        toy.engine.step()
    toy.engine.scheduler.residency.release(job, toy.clock.now)
    assert backlog(toy, 10, 30).seconds([job]) == pytest.approx(1 + 20 * 0.25 + 18 * 1.25)


def test_it_forgets_what_outputs_were_like_long_ago() -> None:
    toy = Toy(COST, max_num_seqs=4)
    job = toy.add("a", 8, 500)
    assert backlog(toy, *[400] * 100, *[10] * 512).seconds([job]) == pytest.approx(1 + 8 * 0.25 + 10 * 1.25)
