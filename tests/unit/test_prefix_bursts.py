"""Many jobs that begin alike and wait: what finding out costs, and that it finds the same."""

from __future__ import annotations

from typing import Any

import pytest
from toy import VOCAB, Toy, piece

from fastserve import prefixes as prefixes_module
from fastserve.cost import CostModel
from fastserve.types import Job, SamplingParams

BLOCK = 4
COST = CostModel(per_iteration=1.0, per_row=0.05, per_token=0.2, per_read=0.001, per_pair=0.001)


def toy(**options: Any) -> Toy:
    return Toy(COST, **{"block_size": BLOCK, "num_blocks": 64, "enable_prefix_caching": True, **options})


def ask(world: Toy, name: str, prompt: list[int], output: int = 1, **more: Any) -> Job:
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    return world.engine.add_job(name, prompt, params, seed=0, vocab_size=VOCAB, **more)


def burst(world: Toy, heads: int, jobs: int, head: int) -> list[Job]:
    """Jobs that wait, of which so many at a time begin alike and end differently."""
    return [
        ask(world, f"{kind} {number}", [*piece(kind, head), kind, *piece(number, number % 7)], output=2)
        for kind in range(heads)
        for number in range(jobs)
    ]


def hashed(world: Toy) -> list[int]:
    """Have it said how many blocks were hashed in each schedule, from now on."""
    scheduler, counts = world.engine.scheduler, [0]
    prefixes, schedule = scheduler.residency.prefixes, scheduler.schedule
    digest = prefixes._digest

    def counted(data: bytes) -> bytes:
        counts[-1] += 1
        return digest(data)

    def one(now: float) -> Any:
        counts.append(0)
        return schedule(now)

    prefixes._digest = counted
    scheduler.schedule = one  # type: ignore[method-assign]
    return counts


def test_a_common_beginning_is_hashed_once_however_many_wait_with_it() -> None:
    world = toy(max_num_seqs=2, max_num_batched_tokens=200, num_blocks=256, max_model_len=1000)
    jobs = burst(world, 1, 60, 100 * BLOCK)
    counts = hashed(world)
    world.run()
    assert sum(counts) < 100 + 8 * len(jobs)  # and what is each one's own
    assert all(job.output == world.expected(job) for job in jobs)
    assert {job.metrics.cached_tokens for job in jobs[2:]} == {100 * BLOCK}


def test_a_plan_looks_up_so_many_blocks_and_the_next_one_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes_module, "_MOST_LOOKED_UP", 16)
    world = toy(max_num_seqs=2, num_blocks=512, max_num_batched_tokens=2000, max_model_len=1000)
    jobs = burst(world, 6, 5, 40 * BLOCK)
    prefixes = world.engine.scheduler.residency.prefixes
    for kind in range(6):  # all of them are told of at once
        ask(world, f"first {kind}", [*piece(kind, 40 * BLOCK), 9], output=1)
    looked = []
    take = prefixes.take_found

    def taken() -> Any:
        before = prefixes._looked_up
        found = take()
        looked.append(prefixes._looked_up - before)
        return found

    monkeypatch.setattr(prefixes, "take_found", taken)
    world.run()
    assert max(looked) <= 16 + 2 * 41  # the last of them is told of all there is
    assert all(job.output == world.expected(job) for job in jobs)
    assert sum(job.metrics.cached_tokens == 40 * BLOCK for job in jobs) >= len(jobs) - 6


@pytest.mark.parametrize("collide", [False, True])
def test_who_follows_another_finds_what_it_would_have_found_alone(collide: bool) -> None:
    """Tokens are compared: where prompts part, and where all keys collide."""
    world = toy(num_blocks=200)
    if collide:
        world.engine.scheduler.residency.prefixes._digest = lambda data: b"!"
    head = piece(1, 10 * BLOCK)
    ask(world, "first", [*head, 1])
    world.run()
    for name, same in enumerate((0, 1, 3, 4, 5, 17, 39, 40)):
        prompt = [*head[:same], *((token + 1) % VOCAB for token in head[same:]), 1]
        job = ask(world, f"like {name}", prompt)
        assert job.cached == (same // BLOCK * BLOCK if not collide else min(same // BLOCK, 1) * BLOCK)
        job = ask(world, f"again {name}", [*head, name], tenant="other")
        assert job.cached == 0
        for job in list(world.engine.jobs):
            world.engine.abort(job.job_id)
