"""Tenants in figures: counters of a few of them that never fall, and shares of late."""

from __future__ import annotations

import asyncio

import pytest
from http_world import World, run
from hypothesis import given, settings
from hypothesis import strategies as st
from statuses import status
from test_metrics import page_of
from toy import Clock
from toy_engine import ToyEngine

from fastserve.ipc import Ready, TenantStatus
from fastserve.server.client import EngineClient
from fastserve.server.tenants import MOST, OTHERS, TenantService, named


def said(service: TenantService, **seconds: float) -> None:
    service.said([TenantStatus(name, value) for name, value in seconds.items()])


def test_what_was_said_adds_up() -> None:
    service = TenantService(Clock())
    said(service, ann=1.0, bob=0.5)
    said(service, ann=2.0)
    assert service.seconds() == {"ann": 3.0, "bob": 0.5, OTHERS: 0.0}
    assert [(each["tenant"], each["share"]) for each in service.shares()] == [("ann", 6 / 7), ("bob", 1 / 7)]
    assert TenantService(Clock()).shares() == []


def test_shares_are_of_the_last_minutes() -> None:
    clock = Clock()
    service = TenantService(clock)
    said(service, ann=8.0)
    clock.now = 120.0  # of which a quarter is left after two half-lives
    said(service, bob=6.0)
    assert [(each["tenant"], each["share"]) for each in service.shares()] == [("bob", 0.75), ("ann", 0.25)]


def test_a_few_have_names_and_a_large_one_takes_the_least_ones() -> None:
    service = TenantService(Clock())
    said(service, **{f"t{number}": 10.0 + number for number in range(MOST)})
    said(service, late=15.0)
    assert service.seconds()[OTHERS] == 15.0 and "late" not in service.seconds()
    said(service, late=6.0)  # 21 s in all, more than twice the 10 of t0
    told = service.seconds()
    assert "t0" not in told and (told["late"], told[OTHERS]) == (6.0, 15.0) and len(told) == MOST + 1
    said(service, t0=1.0)
    assert service.seconds()[OTHERS] == 16.0
    assert service.shares()[-1]["tenant"] is None


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.floats(0.01, 50), st.sampled_from([0.0, 1.0, 100.0])), min_size=1, max_size=200
    )
)
def test_no_counter_falls_and_nothing_is_lost(events: list[tuple[int, float, float]]) -> None:
    """Of those still named, with what was told of those that no longer are, it is all that was said."""
    clock = Clock()
    service = TenantService(clock)
    before, gone, total = service.seconds(), 0.0, 0.0
    for number, seconds, passed in events:
        clock.now += passed
        name = OTHERS if number == 40 else f"t{number}"  # a user may be called so
        said(service, **{name: seconds})
        total += seconds
        now = service.seconds()
        assert len(now) <= MOST + 1
        assert all(now[name] >= before[name] for name in now.keys() & before.keys())
        gone += sum(before[name] for name in before.keys() - now.keys())
        assert sum(now.values()) + gone == pytest.approx(total)
        assert sum(each["share"] for each in service.shares()) == pytest.approx(1.0)
        before = now


def test_names_for_those_without_a_key() -> None:
    service, other = TenantService(), TenantService()
    assert (service.label("ann"), service.label("")) == ("ann", "")
    assert service.label(named(3, "")) == "key 3"
    hashed = service.label(named(0, "ann@example.org"))
    assert hashed.startswith("key 0/") and len(hashed) == len("key 0/") + 8 and "ann" not in hashed
    assert hashed == service.label(named(0, "ann@example.org")) != service.label(named(0, "bob@example.org"))
    assert hashed != other.label(named(0, "ann@example.org"))


def series(page: str) -> list[str]:
    return [line.rpartition(" ")[0] for line in page.splitlines() if line.startswith("fastserve:tenant_service")]


def test_without_keys_names_are_as_they_are_and_no_two_alike() -> None:
    async def scenario(world: World) -> None:
        names = ("key 0", "key 0/", "key 0/ann", "ann", OTHERS, "")
        said(world.engine.tenants, **dict.fromkeys(names, 1.0))
        text = (await world.client.get("/metrics")).text
        told = series(text)
        assert len(told) == len(set(told)) == len(names)  # who is called as the others are is one of them
        assert all(f'tenant="{name}"' in "".join(told) for name in names)

    run(scenario)


def test_users_of_a_key_whose_hashes_are_alike_are_one_series(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastserve.server.tenants._DIGITS", 0)

    async def scenario(world: World) -> None:
        said(world.engine.tenants, **{"key 0/": 1.0, "key 0/ann": 2.0, "key 0/bob": 3.0})
        text = (await world.client.get("/metrics")).text
        told = series(text)
        assert len(told) == len(set(told)) == 3  # nobody in particular, the users, and the others
        assert 'tenant="key 0/"} 5.0' in text and "ann" not in text

    run(scenario, api_key=("k",))


def test_tenants_on_the_page() -> None:
    engine = ToyEngine()
    said(engine.tenants, **{"": 1.5, "ann": 2.5, "key 1/bob": 3.0})
    page = page_of(engine)
    name = "fastserve:tenant_service_seconds_total"
    assert (page.value(name, tenant=""), page.value(name, tenant="ann"), page.value(name, tenant=OTHERS)) == (
        1.5,
        2.5,
        0,
    )
    assert page.value(name, tenant="key 1/bob") is None
    assert page.value(name, tenant=engine.tenants.label("key 1/bob")) == 3.0


def test_every_status_of_every_engine_counts() -> None:
    async def scenario() -> None:
        client = EngineClient(["nothing"], None, engines=2)
        for engine in client.engines:
            engine.engine_up(Ready([1], {}, 61, 256), lambda message: None)
            for _ in range(2):
                engine.engine_said(status(tenants=[TenantStatus("ann", 1.0)]))
        client.engines[0].engine_down(crashed=False)
        assert client.tenants.seconds() == {"ann": 4.0, OTHERS: 0.0}

    asyncio.run(scenario())
