"""What a real run is judged by: time stalled for KV, copies by direction, and shapes of iterations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import toy_llm
from toy import Toy
from toy_llm import BLOCK_BYTES, ToyWorld

from fastserve import SamplingParams
from fastserve.bench.watch import (
    OtherLoad,
    Watch,
    WatchedIteration,
    by_shape,
    modelled_ratio,
    stalled_seconds,
    summarize_swapping,
)
from fastserve.cost import CostModel
from fastserve.engine import IterationRecord
from fastserve.types import OFFLOAD, UPLOAD


@dataclass(frozen=True)
class Record:
    submitted: float
    completed: float
    job_ids: tuple[str, ...] = ()
    waiting: int = 0


def test_the_device_stalls_in_iterations_without_rows_while_jobs_are_alive() -> None:
    records = [
        Record(0.0, 1.0, ("a",), 1),
        Record(0.5, 1.75, (), 2),  # from the end of the one before: 0.75
        Record(2.0, 2.5, (), 2),  # what lies between is Python's
        Record(2.5, 3.0, ("a",), 0),
        Record(3.0, 4.0, (), 0),  # nobody waits: the last slots are closed
    ]
    assert stalled_seconds(records) == 1.25  # type: ignore[arg-type]


def test_a_watched_run_tells_what_was_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    world: ToyWorld = toy_llm.enter(monkeypatch)
    records: list[IterationRecord] = []
    memory = {"kv_cache_memory": 8 * BLOCK_BYTES, "swap_space": "1M"}
    with world.llm(policy="mlfq", swap_mode="reactive", on_iteration=records.append, max_num_seqs=3, **memory) as llm:
        runtime, engine = world.runtimes[-1], llm._engine
        assert engine is not None
        before = dict(runtime.copied)  # measuring the link
        watch = engine._executor = Watch(engine._executor)
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        llm.generate([[k] * (20 + 5 * k) for k in range(6)], params)
    summary = summarize_swapping(records, watch)
    assert summary.offloaded_blocks == runtime.copied[OFFLOAD] - before[OFFLOAD] > 0
    assert summary.uploaded_blocks == runtime.copied[UPLOAD] - before[UPLOAD] > 0
    assert summary.copy_seconds == 0.125 * (summary.offloaded_blocks + summary.uploaded_blocks)  # the toy's
    assert summary.median_upload_seconds == 0.125 * summary.median_upload_blocks
    assert summary.hidden == 1 - summary.stalled_seconds / summary.copy_seconds
    assert len(watch.iterations) == sum(bool(record.job_ids) for record in records)
    assert sum(int(each.tokens.sum()) for each in watch.iterations) == sum(
        record.prefill_tokens + record.decode_tokens for record in records
    )
    assert modelled_ratio(watch.iterations, toy_llm.COST) == pytest.approx(1.0)


def test_without_copies_nothing_is_hidden() -> None:
    toy = Toy(num_blocks=64)
    watch = toy.engine._executor = Watch(toy.engine._executor)
    toy.add("a", 5)
    toy.run()
    summary = summarize_swapping(toy.records, watch)
    assert (summary.uploads, summary.offloads, summary.copy_seconds, summary.hidden) == (0, 0, 0, None)
    assert summary.median_iteration_seconds == 1.0
    assert modelled_ratio([], toy.cost) is None


def test_iterations_are_grouped_by_shape() -> None:
    def iteration(*rows: tuple[int, int]) -> WatchedIteration:
        starts, tokens = (np.array(column, np.int32) for column in zip(*rows, strict=True))
        return WatchedIteration(starts, tokens, 2.0)

    one, five = iteration((10, 1)), iteration(*[(300, 1)] * 5)
    chunk, mixed = iteration((0, 64)), iteration((0, 64), (10, 1))
    assert by_shape([one, five, chunk, mixed]) == {
        "decode, 1 rows, short contexts": [one],
        "decode, 5–8 rows, long contexts": [five],
        "with prefill, more than 64 tokens": [mixed],
        "with prefill, up to 64 tokens": [chunk],
    }
    assert modelled_ratio([one, five], CostModel.constant(1.0)) == 0.5


def test_the_load_of_others_is_within_the_machine() -> None:
    load = OtherLoad()
    total = sum(k * k for k in range(300_000))
    cores = load.cores()
    assert total > 0 and cores is not None and 0 <= cores <= 1024
