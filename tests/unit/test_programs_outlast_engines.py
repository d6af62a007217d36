"""What calls of a program were served before, elsewhere, counts for the next one."""

from __future__ import annotations

from toy import VOCAB, Toy

from fastserve.cost import CostModel
from fastserve.types import Job, SamplingParams


def call(world: Toy, name: str, inherited: float = 0.0) -> Job:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    return world.engine.add_job(
        name, [1, 2, 3], params, seed=0, vocab_size=VOCAB, program="p", tenant="t", inherited=inherited
    )


def test_a_call_joins_by_what_others_were_served_in_engines_that_are_gone() -> None:
    cost = CostModel(per_iteration=1.0)
    before = Toy(cost, policy="skip-join-mlfq")
    first = call(before, "first")
    before.run()
    assert first.metrics.service_seconds == first.attained == 3.0
    here = call(before, "second")

    after = Toy(cost, policy="skip-join-mlfq")
    second = call(after, "second", first.metrics.service_seconds)
    assert second.inherited == here.inherited == 3.0
    assert after.engine.scheduler.policy.level(second) == before.engine.scheduler.policy.level(here) > 0


def test_it_is_counted_once() -> None:
    """The server knows of calls that this engine has served itself, too."""
    world = Toy(CostModel(per_iteration=1.0), policy="skip-join-mlfq")
    first = call(world, "first")
    world.run()
    assert call(world, "second", first.metrics.service_seconds).inherited == 3.0
    assert call(world, "third", 8.0).inherited == 8.0
