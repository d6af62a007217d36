"""The benchmarks of conversations: the loads they make, what they compare, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import conversation_session
import conversations
import prefix_cache
import pytest
from peers.servers import Server
from sse_server import Request, Wire, honest
from sse_server import Server as Honest

from fastserve.cost import CostModel
from fastserve.policies.mlfq import MultiLevelFeedbackQueue
from fastserve.types import Job, SamplingParams

OURS = {"data": [{"id": "m", "owned_by": "fastserve"}]}


# --- in virtual time --------------------------------------------------------------------------------------------------


def test_the_flood_is_fifty_times_one_user_and_changes_none_of_the_others() -> None:
    calm, stormy = (prefix_cache.Flooded(4, times, "constant:8,2") for times in (0.0, 50.0))
    others = list(calm.jobs(3, 200, 2.0))
    mixed = list(stormy.jobs(3, 200, 2.0))
    assert [job for job in mixed if job.user != prefix_cache.FLOOD] == others
    assert {job.user for job in others} == {f"user-{number}" for number in range(4)}
    flooding = [job for job in mixed if job.user == prefix_cache.FLOOD]
    assert len(flooding) == pytest.approx(50 * 50, rel=0.2), "50 jobs of each of the others"
    assert [job.arrival for job in mixed] == sorted(job.arrival for job in mixed)
    assert mixed[-1].arrival <= others[-1].arrival


def test_a_queue_of_full_prefills_goes_by_the_whole_prompt() -> None:
    own = {"quantum": 1.0, "num_levels": 7, "starvation_limit": None, "skip_join": True}
    charges, joins = (prefix_cache.FullPrefillQueue(_PerToken(), charges, **own) for charges in (True, False))
    ours = MultiLevelFeedbackQueue(**own)
    job = Job("a", range(30), SamplingParams(), 0, 0.0, 5, frozenset())
    job.next_seconds, job.cached, job.served = 2.0, 28, 28
    for queue in (charges, joins, ours):
        queue.add(job, 0.0)
        queue.refresh(job, 0.0)
    assert (charges.level(job), joins.level(job), ours.level(job), job.next_seconds, job.cached) == (5, 5, 1, 2.0, 28)
    job.served, job.next_seconds = 30, 1.0
    for queue in (charges, joins):
        queue.on_service(job, 2.0, 0.0)
    assert (charges.horizon(job), joins.horizon(job)) == (pytest.approx(32 - 30), pytest.approx(32 - 2))


class _PerToken(CostModel):
    """A second a token."""

    def __init__(self) -> None:
        pass

    def prefill_charge(self, start: int, end: int) -> float:
        return float(end - start)


def test_a_run_in_virtual_time_tells_every_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--jobs", "24", "--seeds", "2", "--policy", "skip-join-mlfq", "--times", "3", "--json"]
    assert prefix_cache.main([*words, str(tmp_path / "told.json")]) == 0
    told = json.loads((tmp_path / "told.json").read_text())
    for seed in told["trace"]:
        assert 0 < seed["found_of_bound"] <= 1 and seed["better_than_no_cache"] > 1
        assert seed["runs"]["no cache"]["hit_rate"] == 0
    assert [seed["better_than_calls: skip-join-mlfq"] > 0 for seed in told["agents"]] == [True, True]
    for seed in told["flood"]:
        runs = seed["runs"]
        assert "flood" in runs["skip-join-mlfq, flooded"]["users"]
        assert "flood" not in runs["skip-join-mlfq, calm"]["users"]
        assert seed["p95_ratio, worst of them: skip-join-mlfq"] >= seed["p95_ratio, mean of the others: skip-join-mlfq"]
    assert "found_of_bound" in capsys.readouterr().out


# --- on servers -------------------------------------------------------------------------------------------------------


class Standing:
    """In the place of a server that was started."""

    def __init__(self, server: Server, honest: Honest) -> None:
        self.server, self.url = server, honest.url

    def awake(self) -> Any:
        return nullcontext()

    def close(self) -> None:
        """It is the test's."""


@contextmanager
def standing(monkeypatch: pytest.MonkeyPatch, *scripts: Any) -> Iterator[list[Honest]]:
    """Servers of these scripts stand where the benchmark would start some."""
    honests = [Honest(script, models=OURS) for script in scripts]
    waiting = list(honests)
    monkeypatch.setattr(conversations, "directory_of", lambda *_: Path("model"))
    monkeypatch.setattr(conversation_session, "Running", lambda server, log: Standing(server, waiting.pop(0)))
    for each in honests:
        each.__enter__()
    try:
        yield honests
    finally:
        for each in honests:
            each.__exit__()


async def other_words(request: Request, wire: Wire) -> None:
    """Honest, but for the last word of long prompts."""
    long = len(str(request.body.get("prompt"))) > 150
    await honest(
        request if not long else Request(request.path, request.headers, {**request.body, "max_tokens": 7}), wire
    )


def run(scenario: str, tmp_path: Path, *words: str) -> dict[str, Any]:
    path = tmp_path / "told.json"
    assert conversations.main([scenario, "--rounds", "1", "--work", str(tmp_path), "--json", str(path), *words]) == 0
    told: dict[str, Any] = json.loads(path.read_text())
    return told


def test_answers_are_compared_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--workload", "chat:3,2,0,6,9,16", "--jobs", "6", "--rate", "1000")
    with standing(monkeypatch, honest, honest) as (ours, bare):
        (told,) = run("cache", tmp_path, *small)["ratios"]
        assert [each.body.get("prompt") for each in ours.requests[:4]] == [
            each.body.get("prompt") for each in bare.requests[:4]
        ]
    assert (told["answers that differ"], told["answers"]) == (0, 6)
    with standing(monkeypatch, honest, other_words):
        (told,) = run("cache", tmp_path, *small)["ratios"]
    assert told["answers that differ"] > 0


def test_one_server_is_told_of_programs_and_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--workload", "agents:3,0,6,4,16,8", "--jobs", "9", "--rate", "1000")
    with standing(monkeypatch, honest, honest) as worlds:
        told = run("agents", tmp_path, *small)
        named, unnamed = (["program_id" in request.body for request in each.requests[4:]] for each in worlds)
    assert (named, unnamed) == ([True] * 9, [False] * 9)
    assert [each["run"] for each in told["runs"]] == ["programs", "calls"]
    assert told["ratios"][0]["mean completion, better"] > 0


def test_a_flood_ends_when_the_others_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def deaf(request: Request, wire: Wire) -> None:
        if request.body.get("user") == prefix_cache.FLOOD:
            await wire.gone()
        else:
            await honest(request, wire)

    with standing(monkeypatch, deaf):
        told = run("flood", tmp_path, "--workload", "constant:5,3", "--jobs", "8", "--rate", "200", "--times", "9")
    calm, loud = (each["summary"] for each in told["runs"])
    assert (calm["completed"], loud["completed"], loud["failed"]) == (8, 8, 0)
    assert loud["unfinished"] == loud["jobs"] - 8 > 0


def test_servers_have_their_caches_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "directory_of", lambda *_: Path("model"))
    monkeypatch.setattr(conversations, "gguf_of", lambda *_: Path("model.gguf"))
    words = ["--work", str(tmp_path), "--vllm-python", "python3", "--llama-server", "python3"]
    ours, vllm, llama = conversations.servers(conversations.parse(["peers", *words]))
    assert "--no-enable-prefix-caching" not in ours.command(1)
    assert "--enable-prefix-caching" in vllm.command(1)
    assert not {"--cache-ram", "--slot-prompt-similarity"} & set(llama.command(1))
    assert "--cache-ram" in Server(*("x", "llama-server", "q8_0", "p", "m", 1, 1, 1)).command(1)
    on, off = conversations.servers(conversations.parse(["cache", *words[:2]]))
    assert "--no-enable-prefix-caching" in off.command(1) and "--no-enable-prefix-caching" not in on.command(1)


def test_nobody_thinks_where_a_capacity_is_measured() -> None:
    from fastserve.workloads import calls_of, parse_load

    jobs = list(islice(parse_load("agents:4,5", "poisson").jobs(0, 40, 1.0), 10))
    bare = conversations._thoughtless(jobs)
    assert all(call.think_time == 0 for job in bare for call in calls_of(job))
    assert [[call.content for call in calls_of(job)] for job in bare] == [
        [call.content for call in calls_of(job)] for job in jobs
    ]


@pytest.mark.parametrize(
    ("main", "arguments", "says"),
    [
        (conversations, ("peers",), "name a peer"),
        (conversations, ("cache", "--weights", "bfloat16,q8_0"), "--weights: several go with peers"),
        (conversations, ("peers", "--vllm-python", "no-such-python"), "--vllm-python: there is no program"),
        (conversations, ("cache", "--json", "/no/such/folder/x.json"), "--json: there is no folder '/no/such/folder'"),
        (prefix_cache, ("chat",), "there is no scenario 'chat': trace, agents, flood"),
        (prefix_cache, ("--policy", "lifo"), "--policy: must be one of"),
    ],
)
def test_what_cannot_be_is_told_before_anything_starts(
    main: Any, arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
