"""The page at / in a real browser: what it shows of a load, and what it says when something is wrong."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from http_world import World, run
from toy_engine import ToyEngine, ToyJob

from fastserve.ipc import JobStatus, LevelStatus, Status, TenantStatus
from fastserve.server import board

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
BODY = {"prompt": "abc", "max_tokens": 12, "ignore_eos": True}


class BoardEngine(ToyEngine):
    """Says of its jobs what `picture` draws, given how often it was asked before."""

    def __init__(self, picture: Callable[[int, JobStatus], None]) -> None:
        super().__init__(held=True, max_num_seqs=4)
        self.looks = 0
        self._picture = picture
        self.counted = {"preemptions": 1234}

    @property
    def status(self) -> Status | None:
        if not self.ready:
            return None
        levels = [LevelStatus(quantum, 0, 0, 0.0) for quantum in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)]
        blocks = {"device_blocks": 100, "device_blocks_used": 40, "host_blocks": 50, "host_blocks_used": 10}
        blocks |= {"device_blocks_cached": 30, "host_blocks_cached": 5, "programs": 2}
        return msgspec.structs.replace(super().status or pytest.fail(), levels=levels, **blocks)

    async def list_jobs(self) -> Sequence[tuple[ToyJob, JobStatus]]:
        if not self.ready:
            return []
        listed = await super().list_jobs()
        for _, job in listed:
            self._picture(self.looks, job)
        self.looks += 1
        return listed


@dataclass
class Page(HTMLParser):
    """`chips`: level and class by the key of a job. `texts`: by an element's id."""

    levels: list[int] = field(default_factory=list)  # that have a line
    chips: dict[int, tuple[int, str]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    widths: dict[str, str] = field(default_factory=dict)  # of bars, by id
    hidden: set[str] = field(default_factory=set)  # elements with an id
    rows: list[list[str]] = field(default_factory=list)  # of tenants, by cells with something in them
    stale: bool = False
    _level: int = -1
    _id: str = ""
    _tenants: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id") and "hidden" in given:
            self.hidden.add(str(given["id"]))
        if given.get("id") and str(given.get("style") or "").startswith("width:"):
            self.widths[str(given["id"])] = str(given["style"]).removeprefix("width:").strip(" ;")
        self._tenants = tag != "section" and (self._tenants or given.get("id") == "tenants")
        if self._tenants and tag == "tr":
            self.rows.append([])
        self._id = given.get("id") or (self._id if tag in ("p", "small") else "")
        if given.get("data-level"):
            self._level = int(given["data-level"] or "")
            self.levels.append(self._level)
        self.stale = self.stale or (tag == "body" and given.get("class") == "stale")
        if given.get("data-key"):
            self.chips[int(given["data-key"] or "")] = (self._level, given["class"] or "")
            assert given["aria-label"] and given["tabindex"] in ("0", "-1")
        elif given.get("class") == "more":
            self._id = "more"

    def handle_endtag(self, tag: str) -> None:
        self._tenants = self._tenants and tag != "tbody"

    def handle_data(self, data: str) -> None:
        if self._tenants and data.strip():
            self.rows[-1].append(data)
        if self._id and data.strip():
            self.texts[self._id] = data
            self._id = ""


async def look(url: str, folder: Path, seconds: float = 3) -> Page:
    """The page after so many seconds of its own time, which does not pass while it waits for the server."""
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={folder}", f"--virtual-time-budget={int(seconds * 1000)}", "--dump-dom", url,
    ]  # fmt: skip
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    page = Page()
    page.feed(out.decode())
    page.errors = [line for line in err.decode().splitlines() if "CONSOLE" in line]
    return page


def show(
    jobs: int,
    picture: Callable[[int, JobStatus], None],
    check: Callable[[World, str], Awaitable[None]],
    **settings: Any,
) -> None:
    """Open jobs, and check what a browser sees of them."""

    async def scenario(world: World) -> None:
        headers = {"Authorization": "Bearer k"}
        engine = world.engine
        post = world.client.post
        asked = [asyncio.create_task(post("/v1/completions", json=BODY, headers=headers)) for _ in range(jobs)]
        if jobs:
            await engine.until(lambda engine: len(engine.open_jobs) == jobs)
        async with world.served() as url:
            await check(world, url)
        engine.ready, engine.failure = True, None
        engine.release()
        assert [(await each).status_code for each in asked] == [200] * jobs

    run(scenario, lambda: BoardEngine(picture), **settings)


def sink(looks: int, job: JobStatus) -> None:
    """Job 0 runs and sinks to level 2 after a while; the KV of job 1 is on the host; job 2 has none."""
    if job.key == 0:
        job.running, job.tier, job.level = True, "device", 0 if looks < 3 else 2
    elif job.key == 1:
        job.tier, job.level = "host", 1


def test_jobs_move_between_levels(tmp_path: Path) -> None:
    async def check(world: World, url: str) -> None:
        first = await look(url, tmp_path, 0.4)
        assert first.chips == {0: (0, "chip run"), 1: (1, "chip host"), 2: (0, "chip none")}
        later = await look(url, tmp_path)
        assert later.chips == {0: (2, "chip run"), 1: (1, "chip host"), 2: (0, "chip none")}
        assert later.texts["state"] == "ok" and later.texts["rows"] == "1 of 4 rows busy"
        assert later.texts["device"] == "40 of 100 blocks" and later.texts["preemptions"] == "1,234"
        assert (later.texts["open"], later.texts["waiting"]) == ("3", "2 wait")
        assert not first.errors + later.errors and "banner" not in later.texts and not later.stale

    show(3, sink, check)


def test_levels_have_lines_down_to_the_last_that_has_jobs(tmp_path: Path) -> None:
    async def check(world: World, url: str) -> None:
        page = await look(url, tmp_path)
        assert page.levels == [0, 1, 2, 3, 4, 5] and page.chips[0][0] == 5

    def deep(looks: int, job: JobStatus) -> None:
        job.level = 5

    show(1, deep, check)


def test_no_jobs_and_two_hundred(tmp_path: Path) -> None:
    async def none(world: World, url: str) -> None:
        page = await look(url, tmp_path)
        assert not page.chips and not page.errors and url in page.texts["curl"]

    async def many(world: World, url: str) -> None:
        page = await look(url, tmp_path)
        assert len(page.chips) == 160 and page.texts["more"] == "+40" and not page.errors

    show(0, sink, none)
    show(200, lambda looks, job: None, many)


def test_regret_where_the_server_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = board._server

    async def check(world: World, url: str) -> None:
        for told, shown in ((1.234, "1.23 ×"), (None, "–")):
            monkeypatch.setattr(board, "_server", lambda *asked, told=told: plain(*asked) | {"regret": told})
            page = await look(url, tmp_path)
            assert page.texts["regret"] == shown and not page.errors

    show(0, sink, check)


def test_the_cache_and_the_tenants(tmp_path: Path) -> None:
    async def check(world: World, url: str) -> None:
        page = await look(url, tmp_path)
        assert page.texts["cached"] == "35 blocks" and page.texts["hits"] == "–" and not page.errors
        assert page.widths["device-bar"] == "40%" and page.widths["device-cached"] == "30%"
        assert (page.widths["host-bar"], page.widths["host-cached"]) == ("20%", "10%")
        assert "tenants-card" in page.hidden
        world.engine.counted = {"prefix_queries": 300, "prefix_hits": 200}
        shares = {"<b>ann": 6.0, "": 3.0, **{f"t{number}": 0.125 for number in range(8)}}
        world.engine.tenants.said([TenantStatus(name, seconds) for name, seconds in shares.items()])
        page = await look(url, tmp_path)
        assert page.texts["hits"] == "67 %" and page.texts["programs"] == "2 programs alive" and not page.errors
        assert "tenants-card" not in page.hidden
        assert page.rows[:2] == [["<b>ann", "60 %", "0"], ["no user", "30 %", "3"]]
        assert page.rows[-1] == ["others", "5 %"] and len(page.rows) == 7

    show(3, sink, check)


def test_trouble_is_told(tmp_path: Path) -> None:
    def die(looks: int, job: JobStatus) -> None:
        engines[0].ready = looks < 3

    engines: list[Any] = []

    async def restarting(world: World, url: str) -> None:
        engines.append(world.engine)
        page = await look(url, tmp_path)
        assert page.texts["state"] == "restarting" and page.stale and len(page.chips) == 2  # the last that was seen
        assert page.texts["banner"] == "The engine is being restarted. 2 open jobs go on where they stopped."
        assert not page.errors
        world.engine.failure = "the model's file is gone"
        page = await look(url, tmp_path)
        assert page.texts["banner"] == "The engine does not start: the model's file is gone" and page.stale
        world.engine.failure = None
        world.service.drain()
        assert "Shutting down" in (await look(url, tmp_path)).texts["banner"]

    async def alone(world: World, url: str) -> None:
        saved = tmp_path / "page.html"
        saved.write_text((await world.client.get("/")).text)
        page = await look(saved.as_uri(), tmp_path)  # no server answers there
        assert page.texts["state"] == "no connection" and "Trying again" in page.texts["banner"]

    show(2, die, restarting)
    show(0, sink, alone)


def test_a_key_comes_with_the_address(tmp_path: Path) -> None:
    async def check(world: World, url: str) -> None:
        page = await look(url, tmp_path)
        assert page.texts["state"] == "locked" and "#key=" in page.texts["banner"] and not page.chips
        page = await look(f"{url}/#key=k", tmp_path)
        assert page.texts["state"] == "ok" and len(page.chips) == 3 and not page.errors

    show(3, sink, check, api_key=("k",))
