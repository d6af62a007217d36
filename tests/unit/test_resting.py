"""Whose cache goes first where several tenants have some, in both tiers: against a model that counts all anew."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from toy import VOCAB, Toy, piece

from fastserve.cost import CostModel
from fastserve.kv import Block, BlockManager, check_blocks
from fastserve.origin import accounts_of
from fastserve.types import Job, SamplingParams

SIZE = 4
HALF_LIFE = 120.0  # seconds
WEIGHTS = {"ann": 2.0, "key 0": 3.0, "key 0/cy": 0.5}
TENANTS = ("ann", "bob", "key 0/cy", "key 0/dan", "key 1/eve")


def leave_in_cache(blocks: BlockManager, tenant: str, name: str, count: int, keep: float = 0.0) -> None:
    """Have a tenant's job compute a prompt of so many blocks, and end."""
    blocks.cache.arrives(accounts_of(tenant))
    blocks.grow(0, SIZE * count, accounts_of(tenant))
    blocks.bequeath(0, keys_of(tenant, name, count), keep)
    blocks.release(0)
    blocks.cache.departs(accounts_of(tenant))
    check_blocks(blocks)


def keys_of(tenant: str, name: str, count: int) -> list[tuple[bytes, bytes, float]]:
    return [(text := f"{tenant} {name} {index}".encode(), text, 1.0 + index) for index in range(count)]


def cached(blocks: BlockManager, tenant: str, name: str, count: int) -> int:
    parent, found = None, 0
    for key, tokens, _ in keys_of(tenant, name, count):
        parent = blocks.cache.find(key, tokens, parent)
        if parent is None:
            break
        found += 1
    return found


@pytest.mark.parametrize(("weights", "left"), [({}, 4), ({"flood": 3.0}, 2), ({"ann": 3.0}, 5)])
def test_a_flood_takes_no_more_of_the_cache_than_its_share_by_weight(weights: dict[str, float], left: int) -> None:
    blocks = BlockManager(num_blocks=8, block_size=SIZE, weights=weights)
    leave_in_cache(blocks, "ann", "chat", 5)
    for number in range(50):
        leave_in_cache(blocks, "flood", str(number), 1)
    assert cached(blocks, "ann", "chat", 5) == left
    assert blocks.cached == 8


@pytest.mark.parametrize("tenant", ["ann", "bob"])
def test_what_is_kept_for_a_program_goes_before_that_of_who_has_less(tenant: str) -> None:
    blocks = BlockManager(num_blocks=8, block_size=SIZE)
    leave_in_cache(blocks, "ann", "chat", 2)
    leave_in_cache(blocks, tenant, "agent", 6, keep=1000.0)
    leave_in_cache(blocks, "eve", "new", 1)
    assert (cached(blocks, "ann", "chat", 2), cached(blocks, tenant, "agent", 6)) == (
        (2, 5) if tenant == "bob" else (1, 6)  # her own are worth more where they are kept
    )


def test_users_of_a_key_share_what_the_key_has() -> None:
    blocks = BlockManager(num_blocks=12, block_size=SIZE)
    leave_in_cache(blocks, "bob", "chat", 5)
    for number in range(10):
        for user in range(3):
            leave_in_cache(blocks, f"key 0/{user}", str(number), 1)
    assert cached(blocks, "bob", "chat", 5) == 5, "three names are one key"
    for user in range(3):
        assert sum(cached(blocks, f"key 0/{user}", str(number), 1) for number in range(10)) >= 2


def test_what_was_left_long_ago_makes_way_for_those_who_are_there() -> None:
    blocks = BlockManager(num_blocks=8, block_size=SIZE)
    for number in range(4):
        leave_in_cache(blocks, f"once {number}", "a", 1)
    blocks.cache.expire(3 * HALF_LIFE)  # one block counts as eight
    leave_in_cache(blocks, "ann", "chat", 4)
    leave_in_cache(blocks, "ann", "more", 3)
    assert (cached(blocks, "ann", "chat", 4), cached(blocks, "ann", "more", 3)) == (4, 3)
    assert sum(cached(blocks, f"once {number}", "a", 1) for number in range(4)) == 1


def test_blocks_that_are_worked_on_count_as_well() -> None:
    blocks = BlockManager(num_blocks=8, block_size=SIZE)
    leave_in_cache(blocks, "ann", "chat", 3)
    leave_in_cache(blocks, "flood", "a", 2)
    blocks.grow(1, 3 * SIZE, accounts_of("flood"))
    blocks.grow(2, 2 * SIZE, accounts_of("flood"))
    assert (cached(blocks, "ann", "chat", 3), cached(blocks, "flood", "a", 2)) == (3, 0)
    assert blocks.cache.spared(accounts_of("flood"), 8) == 3
    assert blocks.cache.spared(accounts_of("ann"), 8) == 0
    check_blocks(blocks)


def test_a_flood_on_the_host_makes_place_for_who_has_less_there_and_never_the_other_way_round() -> None:
    blocks = BlockManager(num_blocks=4, block_size=SIZE, num_host_blocks=4)

    def leave_on_host(tenant: str, name: str, count: int, keep: float = 0.0) -> None:
        leave_in_cache(blocks, tenant, name, count, keep)
        for copy in {row[0] for row in blocks.save(count)}:
            blocks.acknowledge(copy)
        blocks.grow(9, 4 * SIZE)
        blocks.release(9)
        check_blocks(blocks)

    for number in range(4):
        leave_on_host("flood", str(number), 1, keep=1000.0)
    leave_on_host("ann", "chat", 2)
    assert cached(blocks, "ann", "chat", 2) == 2
    for number in range(4, 10):
        leave_on_host("flood", str(number), 1, keep=1000.0)
    assert cached(blocks, "ann", "chat", 2) == 2


def test_a_tenant_beyond_its_share_starts_no_more_jobs_in_the_cache_of_others() -> None:
    """It has jobs with KV for every row; more of them would only wait with theirs."""
    world = Toy(
        CostModel.constant(0.01),
        policy="mlfq", max_num_seqs=2, block_size=SIZE, num_blocks=44, max_num_batched_tokens=64,
        enable_prefix_caching=True,
    )  # fmt: skip

    def ask(name: str, prompt: list[int], output: int, tenant: str) -> Job:
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        return world.engine.add_job(name, prompt, params, seed=0, vocab_size=VOCAB, tenant=tenant)

    chat = ask("turn", piece(1, 10 * SIZE), 2, "ann")
    world.run()
    flood = [ask(f"flood {number}", piece(number + 2, 4 * SIZE), 8, "flood") for number in range(12)]
    world.run()
    again = ask("again", [*chat.prompt, *chat.output, 1], 1, "ann")
    assert again.cached >= 8 * SIZE  # those that decode may still need a block or two
    assert all(job.finished for job in flood)
    assert [len(plan.rows) for plan in world.executor.plans[-40:-20]] == [2] * 20, "and no row stays empty for it"


class Tenants(RuleBasedStateMachine):
    """Whatever leaves for want of a place is what the rule says, worked out from all blocks there are."""

    HOST = 6

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(10, SIZE, self.HOST, WEIGHTS)
        self.owners: dict[int, tuple[str, str]] = {}
        self.copies: set[int] = set()
        self.now = 0.0
        self.left = dict.fromkeys(TENANTS, 0.0)
        cache = self.blocks.cache
        for tier, away in ((cache._device, False), (cache._host, True)):
            self.watch(tier, away)

    def watch(self, tier: object, away: bool) -> None:
        pop = tier.pop  # type: ignore[attr-defined]

        def popped() -> Block | None:
            resting = [
                block
                for block in self.blocks.cache._index.values()
                if not block.tables and block.transfer is None and (block.device < 0) == away
            ]
            block: Block | None = pop()
            if block is not None:
                self.check(block, resting, away)
            return block

        tier.pop = popped  # type: ignore[attr-defined]

    def check(self, gone: Block, resting: list[Block], away: bool) -> None:
        owned = {} if away else self.blocks.accounts
        live = {name for tenant, _ in self.owners.values() for name in accounts_of(tenant)}
        for level in (0, -1):
            held = Counter(block.accounts[level] for block in resting)
            most = max(self.held(name, held, owned, live) for name in held)
            name = gone.accounts[level]
            assert self.held(name, held, owned, live) >= most * 2 ** (-1 / 32)  # time goes on in steps
            resting = [block for block in resting if block.accounts[level] == name]
        leaves = [block for block in resting if away or not any(child.here for child in block.children)]
        assert self.worth(gone) == min(map(self.worth, leaves))

    def held(self, name: str, held: Counter[str], owned: dict[str, int], live: set[str]) -> float:
        users = [tenant for tenant in TENANTS if name in accounts_of(tenant)]
        silence = 0.0 if name in live else self.now - max(self.left[tenant] for tenant in users)
        return (held[name] + owned.get(name, 0)) / WEIGHTS.get(name, 1.0) * math.pow(2.0, silence / HALF_LIFE)

    def worth(self, block: Block) -> tuple[bool, float, int]:
        kept = block.keep > self.now
        return kept, block.keep if kept else block.score, block.used

    owner = st.integers(0, 4)

    @rule(owner=owner, tenant=st.sampled_from(TENANTS), name=st.sampled_from("ab"), count=st.integers(1, 4))
    def begin(self, owner: int, tenant: str, name: str, count: int) -> None:
        if owner in self.owners or self.blocks.free_blocks < count:
            return
        path, parent = [], None
        for key, tokens, _ in keys_of(tenant, name, count):
            parent = self.blocks.cache.find(key, tokens, parent)
            if parent is None or not parent.here:
                break
            path.append(parent)
        self.blocks.cache.arrives(accounts_of(tenant))
        self.owners[owner] = tenant, name
        if path:
            self.blocks.attach(owner, path, accounts_of(tenant))
            self.blocks.cache.touch(path, hit=True)
        self.blocks.grow(owner, count * SIZE, accounts_of(tenant))

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), keep=st.sampled_from([0.0, 0.0, 50.0]), keeps=st.booleans())
    def end(self, data: st.DataObject, keep: float, keeps: bool) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owners)))
        tenant, name = self.owners.pop(owner)
        if keeps and not self.blocks.missing(owner):
            keys = keys_of(tenant, name, self.blocks.held(owner))[self.blocks.shared(owner) :]
            self.blocks.bequeath(owner, keys, self.now + keep)
        self.blocks.release(owner)
        self.blocks.cache.departs(accounts_of(tenant))
        self.left[tenant] = self.now

    @rule(count=st.integers(1, 4))
    def save(self, count: int) -> None:
        self.copies.update(row[0] for row in self.blocks.save(count))

    @rule(owner=owner, count=st.integers(1, 4))
    def offload(self, owner: int, count: int) -> None:
        if self.blocks.can_offload(owner):
            self.copies.update(row[0] for row in self.blocks.offload(owner, count)[0])

    @rule(owner=owner)
    def upload(self, owner: int) -> None:
        if self.blocks.can_upload(owner):
            self.copies.update(row[0] for row in self.blocks.upload(owner)[0])

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        copy = data.draw(st.sampled_from(sorted(self.copies)))
        self.copies.discard(copy)
        self.blocks.acknowledge(copy)

    @rule(seconds=st.sampled_from([1.0, 30.0, 400.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.blocks.cache.expire(self.now)

    @invariant()
    def the_books_balance(self) -> None:
        check_blocks(self.blocks)


class DeviceOnly(Tenants):
    HOST = 0


for machine in (Tenants, DeviceOnly):
    machine.TestCase.settings = settings(max_examples=120, stateful_step_count=60, deadline=None, derandomize=True)
TestTenants, TestDeviceOnly = Tenants.TestCase, DeviceOnly.TestCase
