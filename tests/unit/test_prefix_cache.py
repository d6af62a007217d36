"""Jobs that share the KV of what they have in common: no word changes, whatever happens to them meanwhile.

Prompts are built of few pieces, so that they begin alike; the toy's tokens are a hash of what it reads from its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import VOCAB, Toy, expected_output, piece

from fastserve.config import SWAP_MODES
from fastserve.cost import CostModel, Link
from fastserve.engine import Engine
from fastserve.types import Job, SamplingParams

COSTS = (
    CostModel.constant(1.0),
    CostModel(per_iteration=1.0, per_row=0.05, per_token=0.2, per_read=0.001, per_pair=0.001),
)


@dataclass(frozen=True)
class Call:
    """A job that comes before an iteration; `follows`: its prompt is that job's prompt and output, and more."""

    at: int
    pieces: tuple[int, ...]
    tail: int
    output: int
    follows: int | None = None
    abort: int | None = None
    tenant: str = ""
    program: str | None = None


@st.composite
def calls(draw: st.DrawFn) -> list[Call]:
    count = draw(st.integers(1, 10))
    return [
        Call(
            at=draw(st.integers(0, 30)),
            pieces=tuple(draw(st.lists(st.integers(0, 2), min_size=0, max_size=3))),
            tail=draw(st.integers(1, 6)),
            output=draw(st.integers(1, 12)),
            follows=draw(st.one_of(st.none(), st.integers(0, number - 1))) if number else None,
            abort=draw(st.one_of(st.none(), st.none(), st.none(), st.integers(0, 60))),
            tenant=draw(st.sampled_from(["", "", "a"])),
            program=draw(st.sampled_from([None, "p", "q"])),
        )
        for number in range(count)
    ]


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    rows, stages = draw(st.integers(1, 5)), draw(st.sampled_from([1, 1, 2]))
    return {
        "policy": draw(st.sampled_from(["fcfs", "mlfq", "skip-join-mlfq", "gittins"])),
        "max_num_seqs": rows,
        "max_num_batched_tokens": rows + draw(st.integers(0, 40)),
        "block_size": draw(st.sampled_from([2, 4, 8])),
        "max_model_len": 1000,
        "max_in_flight": draw(st.integers(1, 3 if stages == 1 else stages)),
        "pipeline_parallel_size": stages,
        "num_levels": draw(st.integers(1, 6)),
        "num_host_blocks": draw(st.sampled_from([0, 3, 12, 200])),
        "swap_mode": draw(st.sampled_from(SWAP_MODES)),
        "admission": draw(st.sampled_from(["paged", "paged", "paged", "reserve"])),
        "repayment": draw(st.sampled_from([1.0, 16.0])),
        "starvation_limit": draw(st.sampled_from([None, 8.0])),
        "stall_limit": draw(st.sampled_from([None, 1.5])),
        "enable_prefix_caching": draw(st.sampled_from([True, True, True, False])),
    }


class World:
    """Calls on the toy, the books checked after everything that happens."""

    def __init__(
        self, calls: list[Call], options: dict[str, Any], spare: int, cost: CostModel, slowness: int, keys: int = 0
    ) -> None:
        """`keys`: different ones that blocks can have; 0: as many as they like."""
        size = options["block_size"]
        longest = max(self._longest(calls, number, 2 * size) for number in range(len(calls)))
        self.toy = Toy(cost, **options, num_blocks=-(-(longest + 2) // size) + spare)
        self.toy.executor.slowness = slowness
        link = Link(offload_block=0.125, upload_block=0.125)
        config, executor = self.toy.config, self.toy.executor
        self.toy.engine = Engine(config, executor, cost, link=link, clock=self.toy.clock)
        if keys:
            prefixes = self.toy.engine.scheduler.residency.prefixes
            prefixes._digest = lambda data: bytes([sum(data) % keys])
        self.calls = calls
        self.jobs: dict[int, Job] = {}

    def _longest(self, calls: list[Call], number: int, piece_size: int) -> int:
        call = calls[number]
        before = self._longest(calls, call.follows, piece_size) if call.follows is not None else 0
        return before + len(call.pieces) * piece_size + call.tail + call.output

    def run(self, steps: int = 3000) -> None:
        engine, waiting = self.toy.engine, dict(enumerate(self.calls))
        for step in range(steps):
            for number, call in list(waiting.items()):
                before = self.jobs.get(call.follows) if call.follows is not None else None
                if step >= call.at and (call.follows is None or (before is not None and before.finished)):
                    del waiting[number]
                    self.add(number, call, before)
            for number, job in self.jobs.items():
                if (abort := self.calls[number].abort) is not None and step >= abort and not job.finished:
                    engine.abort(job.job_id)
                    engine.check_integrity()
            if engine.has_work:
                engine.step()
                engine.check_integrity()
            elif not waiting:
                return
        raise AssertionError(f"not done after {steps} steps")

    def add(self, number: int, call: Call, before: Job | None) -> None:
        size = 2 * self.toy.config.block_size
        start = [*before.prompt, *before.output] if before is not None else []
        prompt = start + [token for each in call.pieces for token in piece(each, size)] + piece(number, call.tail)
        self.jobs[number] = self.toy.engine.add_job(
            str(number),
            prompt,
            SamplingParams(max_tokens=call.output, ignore_eos=True),
            seed=7,
            vocab_size=VOCAB,
            tenant=call.tenant,
            program=call.program,
        )
        self.toy.engine.check_integrity()


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    calls(),
    configs(),
    st.sampled_from([0, 1, 4, 12, 200]),
    st.sampled_from(COSTS),
    st.integers(1, 3),
    st.sampled_from([0, 0, 0, 1, 3]),
)
def test_no_word_changes_and_nothing_is_lost(
    calls: list[Call], options: dict[str, Any], spare: int, cost: CostModel, slowness: int, keys: int
) -> None:
    """Whatever hits, collides, is shared, moves, is thrown away or aborted."""
    world = World(calls, options, spare, cost, slowness, keys)
    counters = world.toy.engine.scheduler.residency.cache_counters
    world.run()
    assert 0 <= counters.hits <= counters.queries
    for job in world.jobs.values():
        expected = expected_output(list(job.prompt), job.params, job.seed, world.toy.config.max_model_len)
        assert job.output == expected[: len(job.output)]
        assert job.finish_reason.value == "abort" or len(job.output) == len(expected)  # type: ignore[union-attr]
    world.toy.check_nothing_is_held()
    residency = world.toy.engine.scheduler.residency
    assert len(residency.prefixes) == 0
