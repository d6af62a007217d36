"""What jobs find of each other in the prefix cache, one thing after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from toy import VOCAB, Toy, expected_output, piece

from fastserve.cost import CostModel, Link
from fastserve.engine import Engine
from fastserve.kv import Block, BlockManager, check_blocks
from fastserve.types import UPLOAD, InvalidRequest, Job, SamplingParams

BLOCK = 4
COST = CostModel(per_iteration=1.0, per_row=0.05, per_token=0.2, per_read=0.001, per_pair=0.001)


def toy(cost: CostModel = COST, **options: Any) -> Toy:
    return Toy(cost, **{"block_size": BLOCK, "num_blocks": 64, "enable_prefix_caching": True, **options})


def ask(world: Toy, name: str, prompt: list[int], output: int = 1, **more: Any) -> Job:
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    return world.engine.add_job(name, prompt, params, seed=0, vocab_size=VOCAB, **more)


def computed(world: Toy) -> list[int]:
    """Tokens of the rows of each iteration."""
    return [int(plan.rows[:, 2].sum()) for plan in world.executor.plans if len(plan.rows)]


def test_the_second_turn_computes_only_what_is_new() -> None:
    world = toy()
    first = ask(world, "a", piece(0, 10), output=3)
    world.run()
    second = ask(world, "b", [*first.prompt, *first.output, 1, 2])
    assert (first.cached, second.cached) == (0, 12)  # the last token of an output is never computed
    world.run()
    assert (second.metrics.cached_tokens, computed(world)) == (12, [10, 1, 1, 3])
    assert second.output == world.expected(second)


def test_a_prompt_that_is_all_there_computes_its_last_block_for_a_row_to_sample_from() -> None:
    world = toy()
    for name in "ab":
        ask(world, name, piece(0, 3 * BLOCK))
        world.run()
    assert computed(world) == [12, 4]


@pytest.mark.parametrize("other", [{"tenant": "x"}, {"cache_salt": "x"}, {}])
def test_tenants_and_salts_share_nothing(other: dict[str, str]) -> None:
    """Also where tenant and salt run together to the same letters."""
    world = toy()
    ask(world, "a", piece(0, 12), tenant="a", cache_salt="b")
    world.run()
    job = ask(world, "b", piece(0, 12), **{"tenant": "a", "cache_salt": "b", **other})
    assert job.cached == (0 if other else 8)
    job = ask(world, "c", piece(0, 12), tenant="ab")
    assert job.cached == 0


def test_tenants_share_nothing_even_where_all_keys_collide() -> None:
    world = toy()
    world.engine.scheduler.residency.prefixes._digest = lambda data: b"!"
    for tenant in ("a", "b"):
        assert ask(world, tenant, piece(0, 5), tenant=tenant).cached == 0
        world.run()
    assert ask(world, "again", piece(0, 5), tenant="a").cached == 4


def test_of_jobs_that_come_at_once_one_computes_what_they_have_in_common() -> None:
    world = toy()
    for name in "abc":
        ask(world, name, [*piece(0, 12), ord(name) % VOCAB])
    world.run()
    assert computed(world) == [13, 2]


@pytest.mark.parametrize("policy", ["fcfs", "mlfq", "skip-join-mlfq", "gittins"])
@pytest.mark.parametrize("stages", [1, 3])
def test_a_common_prompt_is_computed_once_in_chunks_too(policy: str, stages: int) -> None:
    """Whoever is told that more is there may overtake who computes it, which then finds what the other has added."""
    cost = CostModel(per_iteration=1.0, per_token=0.1)
    limits = {"max_num_seqs": 6, "max_num_batched_tokens": 32, "num_blocks": 2000, "max_model_len": 1000}
    world = toy(cost, policy=policy, **limits, pipeline_parallel_size=stages, max_in_flight=stages)
    prompt = [(i * i + 3 * i) % VOCAB for i in range(400)]
    jobs = [ask(world, str(number), [*prompt, number], output=2) for number in range(6)]
    world.run()
    # Of each the last token of the prompt and one of output; and some chunks may be under way twice.
    assert 400 + 6 * 2 <= sum(computed(world)) <= 400 + 6 * 2 + 3 * 32
    assert all(job.output == world.expected(job) for job in jobs)


def test_a_short_beginning_is_not_worth_waiting_for() -> None:
    world = toy()
    for number in range(2):
        ask(world, str(number), piece(0, BLOCK) + piece(1 + number, 8 * BLOCK))
    world.run()
    assert computed(world) == [72]


def test_a_job_joins_by_what_is_left_of_its_prefill() -> None:
    cost = CostModel(per_iteration=1.0, per_token=1.0)
    world = toy(cost, policy="skip-join-mlfq", max_num_seqs=1)
    policy = world.engine.scheduler.policy
    first = ask(world, "a", piece(0, 40))
    assert policy.level(first) == 5  # 41 seconds, of quanta of 2, 4, 8, …
    world.run()
    second = ask(world, "b", piece(0, 40))
    assert (policy.level(second), second.next_seconds) == (2, 5.0)
    world.run()
    # 5 seconds of its prefill alone are charged.
    assert (first.attained, second.attained) == (41.0, 5.0)


def test_a_job_that_waits_moves_up_when_another_computes_what_it_needs() -> None:
    cost = CostModel(per_iteration=1.0, per_token=1.0)
    world = toy(cost, policy="skip-join-mlfq", max_num_seqs=1)
    policy = world.engine.scheduler.policy
    ask(world, "a", piece(0, 40), output=2)
    waiting = ask(world, "b", [*piece(0, 40), 5])
    assert policy.level(waiting) == 5
    world.run()
    assert (world.ran, waiting.cached) == ("a b a", 40)


def test_what_is_worth_least_is_thrown_away_first_from_its_end() -> None:
    world = toy(num_blocks=9)
    for number in (0, 1, 0):  # the first is used twice
        ask(world, str(len(world.records)), piece(number, 12))
        world.run()
    ask(world, "new", piece(2, 20))  # five of nine blocks: three are idle
    world.run()
    assert [ask(world, f"{n}?", piece(n, 12)).cached for n in (0, 1)] == [8, 4]


def test_a_job_whose_blocks_were_taken_finds_what_is_left_of_them() -> None:
    world = toy(num_blocks=8, max_num_seqs=2, policy="fcfs", swap_mode="recompute")
    jobs = [ask(world, str(number), piece(number, 12), output=9) for number in range(2)]
    world.run()
    assert [job.output for job in jobs] == [world.expected(job) for job in jobs]
    again = jobs[1].metrics.recomputed_tokens
    assert 0 < again < 13, "all of it was computed again"


def test_saving_a_block_never_throws_away_another_that_is_being_saved() -> None:
    """One on the host that is worth less than what is to be saved has below it one that is to be saved first."""

    def keys(name: str, count: int, cost: float) -> list[tuple[bytes, bytes, float]]:
        return [(f"{name}{number}".encode(), b"", cost) for number in range(count)]

    blocks = BlockManager(256, BLOCK, 3)
    blocks.grow(1, 2 * BLOCK)
    blocks.acknowledge(blocks.offload(1, 1)[0][0][0])
    blocks.bequeath(1, keys("a", 2, 1.0))
    blocks.release(1)
    blocks.grow(2, BLOCK)
    blocks.bequeath(2, keys("b", 1, 5.0))
    blocks.release(2)
    blocks.grow(3, BLOCK)
    blocks.acknowledge(blocks.offload(3, 1)[0][0][0])
    copies = blocks.save(2)
    check_blocks(blocks)
    assert len(copies) == 2 and all(source >= 0 and place >= 0 for _, _, source, place in copies)


def test_what_is_too_far_away_is_computed_once_more_and_no_more() -> None:
    cost = CostModel(per_iteration=1.0, per_token=0.1)
    world = toy(cost, num_blocks=64, num_host_blocks=2048, max_num_seqs=2)
    far = Link(offload_block=0.01, upload_block=100.0)
    world.engine = Engine(world.config, world.executor, cost, link=far, clock=world.clock)
    world.engine.scheduler.residency.link.observe = lambda *copy: None  # type: ignore[method-assign]
    ask(world, "first", piece(0, 40))
    world.run()
    for number in range(1, 14):
        ask(world, f"other {number}", piece(number, 120), output=2)
        world.run()
    found = []
    for number in range(3):
        job = ask(world, f"again {number}", [*piece(0, 40), number, 1], output=2)
        world.run()
        found.append(job.metrics.cached_tokens)
    assert found == [0, 40, 40]


def test_a_job_of_a_lost_engine_is_not_charged_again_for_what_is_found_meanwhile() -> None:
    attained = []
    for shares in (False, True):
        world = toy(CostModel(per_iteration=1.0, per_token=1.0), max_num_seqs=1, policy="fcfs")
        prompt = [*piece(0, 40), 5]
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        output = expected_output(prompt, params, 0, world.config.max_model_len)
        ask(world, "before", piece(0 if shares else 3, 40), output=2)
        job = world.engine.add_job("job", prompt, params, seed=0, vocab_size=VOCAB, output=output[:8])
        world.run()
        assert job.output == output
        attained.append(job.attained)
    assert attained[0] == attained[1]


def test_where_a_lost_engine_had_found_a_part_of_a_prompt_it_is_charged_for_the_rest_as_before() -> None:
    lost, again = (toy(max_num_seqs=2) for _ in range(2))
    for world in (lost, again):
        ask(world, "before", piece(0, 24))
        if world is lost:
            world.run()
    job = ask(lost, "job", [*piece(0, 40), 5], output=12)
    for _ in range(8):
        lost.engine.step()
    output, found = list(job.output), job.metrics.cached_tokens
    lost.run()
    assert (len(output), found) == (8, 24)
    resumed = again.engine.add_job(
        "job", job.prompt, job.params, seed=0, vocab_size=VOCAB, output=output, cached_tokens=found
    )
    again.run()
    assert resumed.output == job.output and resumed.metrics.cached_tokens == found
    assert (resumed.attained, resumed.charged) == pytest.approx((job.attained, job.charged))


@pytest.mark.parametrize(("output", "cached"), [([], 1), ([1], 3), ([1], -1)])
def test_only_a_part_of_the_prompt_of_a_job_with_output_can_have_been_found(output: list[int], cached: int) -> None:
    with pytest.raises(InvalidRequest, match="cached_tokens"):
        params = SamplingParams(max_tokens=9)
        toy().engine.add_job("job", [1, 2, 3], params, seed=0, vocab_size=VOCAB, output=output, cached_tokens=cached)


def test_what_another_computes_while_a_job_waits_for_its_beginning_is_part_of_what_it_found() -> None:
    """The first begins with 36 tokens that come back from the host; meanwhile the other computes 60 of its 62."""
    cost = CostModel(per_iteration=1.0, per_token=1.0)
    world = toy(cost, num_blocks=40, num_host_blocks=64, max_num_seqs=1, policy="fcfs")
    ask(world, "a", piece(0, 36))
    world.run()
    for number in range(1, 5):
        ask(world, str(number), piece(number, 60), output=3)
        world.run()
    uploaded = world.executor.copied[UPLOAD]
    first, second = (ask(world, name, [*piece(0, 60), ord(name) % VOCAB, 1], output=2) for name in "bc")
    assert first.cached == second.cached == 36
    world.run()
    assert world.executor.copied[UPLOAD] == uploaded + 9
    assert (first.metrics.cached_tokens, second.metrics.cached_tokens) == (60, 0)
    assert (first.attained, second.attained) == (cost.prefill_seconds(60, 2) + 2.0, cost.prefill_seconds(0, 62) + 2.0)
    assert first.charged == pytest.approx(first.attained)  # a batch of one shares nothing
    assert first.output == world.expected(first)


def test_cache_leaves_for_the_host_and_comes_back_before_its_job_runs() -> None:
    cost = CostModel(per_iteration=1.0, per_token=1.0)
    world = toy(cost, num_blocks=12, num_host_blocks=32, max_num_seqs=1)
    ask(world, "a", piece(0, 36))
    world.run()
    for number in range(1, 5):
        ask(world, str(number), piece(number, 36), output=3)
        world.run()
    assert world.engine.scheduler.blocks.cached_host > 0
    before = dict(world.executor.copied)
    back = ask(world, "b", [*piece(0, 36), 1])
    assert back.cached > 0
    world.run()
    assert back.metrics.cached_tokens == back.cached > 0
    assert world.executor.copied[UPLOAD] > before[UPLOAD]
    assert back.output == world.expected(back)


def test_kv_of_a_program_outlasts_others_but_gives_way_to_live_jobs() -> None:
    world = toy(CostModel(per_iteration=0.1, per_token=0.01), num_blocks=16)  # ten seconds are long
    for name in ("call", "call again"):  # who calls but once is kept for like anybody
        ask(world, name, piece(0, 16), program="p")
        world.run()
    for number in range(1, 8):
        ask(world, str(number), piece(number, 16))
        world.run()
    assert ask(world, "next call", [*piece(0, 16), 1], program="p").cached == 16
    world.run()
    ask(world, "all", piece(9, 62))
    world.run()
    assert ask(world, "another", [*piece(0, 16), 2], program="p").cached == 0


def test_what_a_program_does_not_come_back_for_is_as_good_as_others() -> None:
    world = toy(num_blocks=16)
    for name in ("call", "call again"):  # who calls but once is kept for like anybody
        ask(world, name, piece(0, 16), program="p")
        world.run()
    world.clock.now += 3600.0
    for number in range(1, 8):
        ask(world, str(number), piece(number, 16))
        world.run()
    assert ask(world, "next call", [*piece(0, 16), 1], program="p").cached == 0


def test_without_the_cache_nothing_is_found() -> None:
    world = toy(enable_prefix_caching=False)
    for name in "ab":
        ask(world, name, piece(0, 12))
        world.run()
    assert computed(world) == [12, 12]


def test_prompts_that_begin_alike_are_a_group_without_the_cache_too() -> None:
    world = toy(enable_prefix_caching=False)
    prompts = {"a": piece(0, 12), "b": [*piece(0, 8), 1, 2], "c": piece(1, 12), "short": piece(0, 5)}
    groups = {name: ask(world, name, prompt).group for name, prompt in prompts.items()}
    assert groups["a"] == groups["b"] is not None and groups["c"] not in (groups["a"], None)
    assert groups["short"] is None


def test_integrity_notices_a_wrong_owner_a_lost_reference_and_a_wrong_index() -> None:
    def shared() -> tuple[Toy, list[Block]]:
        world = toy()
        for name in "ab":
            ask(world, name, [*piece(0, 12), *([1] if name == "a" else [2, 3])], output=9)
            world.engine.step()
            world.engine.step()
        blocks = world.engine.scheduler.blocks
        check_blocks(blocks)
        (path,) = {tuple(blocks.path(job.index)[:3]) for job in world.engine.jobs}
        return world, list(path)

    def wrong_key(block: Block) -> None:
        block.key = b"another"

    breakages: list[Callable[[Block], object]] = [
        lambda block: setattr(block, "tables", block.tables[1:]),
        lambda block: setattr(block, "tables", (*block.tables, block.tables[0])),
        lambda block: setattr(block, "children", ()),
        wrong_key,
    ]
    for damage in breakages:
        world, path = shared()
        damage(path[1])
        with pytest.raises(RuntimeError):
            check_blocks(world.engine.scheduler.blocks)
