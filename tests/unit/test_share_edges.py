"""Where shares of tenants were once wrong: names that come and go, users of busy keys, light tenants, far weights."""

from __future__ import annotations

from collections import Counter

import pytest
from toy import VOCAB, Toy

from fastserve.config import SchedulerConfig
from fastserve.cost import CostModel
from fastserve.policies.average import Average
from fastserve.types import InvalidRequest, Job, SamplingParams

OPTIONS = {"policy": "fcfs", "max_num_seqs": 8, "num_blocks": 4000, "max_model_len": 4000, "starvation_limit": None}


def ask(toy: Toy, name: str, tenant: str, output: int) -> Job:
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    return toy.engine.add_job(name, [len(name), 1], params, seed=0, vocab_size=VOCAB, tenant=tenant)


def test_a_small_user_costs_its_busy_key_nothing() -> None:
    """Key 1 has a busy user and one with a job at a time, key 2 has a busy one: the keys get as much."""
    toy = Toy(CostModel(per_iteration=1.0, per_token=0.01), **OPTIONS)
    for number in range(600):
        ask(toy, f"x{number}", "key 1/busy", 40)
        ask(toy, f"y{number}", "key 2/busy", 40)
    rows: Counter[str] = Counter()
    small = ask(toy, "u", "key 1/small", 20)
    for step in range(600):
        if small.finished:
            small = ask(toy, f"u{step}", "key 1/small", 20)
        toy.engine.step()
        rows.update(name[0] for name in toy.records[-1].job_ids if step >= 200)
    assert rows["x"] + rows["u"] == pytest.approx(rows["y"], rel=0.05)


def test_a_light_flood_is_kept_in_bounds_too() -> None:
    """However little a flood weighs, it lengthens others' iterations no more than a heavy one does."""

    def finish(weight: float) -> float:
        cost = CostModel(per_iteration=1.0, per_row=1.0, per_token=0.1)
        toy = Toy(cost, **OPTIONS, tenant_weights={"flood": weight})
        calm = ask(toy, "calm", "calm", 600)
        for number in range(300):
            ask(toy, f"f{number}", "flood", 60)
        while not calm.finished:
            toy.engine.step()
        return toy.clock.now

    assert finish(0.05) < finish(0.2)


def test_those_who_were_there_lately_weigh_no_more_than_those_who_are() -> None:
    average = Average(1e9)
    average.wakes("steady", 1.0)
    for number in range(20):
        average.wakes(str(number), 1.0)
        average.rests(str(number), 1.0)
    assert average.weight == 2.0
    average.forget(1e3)
    assert average.weight == 1.0


def test_what_is_remembered_of_a_tenant_does_not_grow_with_its_comings_and_goings() -> None:
    toy = Toy(CostModel(per_iteration=1.0, per_token=0.01), **OPTIONS)
    ask(toy, "calm", "calm", 3000)
    for number in range(60):
        ask(toy, f"f{number}", "flood", 2000)
    for _ in range(300):
        toy.engine.step()
    for number in range(59, 29, -1):
        toy.engine.abort(f"f{number}")
    for number in range(200):
        for more in range(4):
            ask(toy, f"g{number}-{more}", "flood", 5)
        for more in range(4):
            toy.engine.abort(f"g{number}-{more}")
    assert len(toy.engine.scheduler.policy._standing._returning) < 10


@pytest.mark.parametrize("weight", [1e17, 1e-7, 0.0])
def test_weights_too_far_apart_for_sums_are_refused(weight: float) -> None:
    with pytest.raises(InvalidRequest, match="from 1e-06 to 1e"):
        SchedulerConfig(tenant_weights={"big": weight})
