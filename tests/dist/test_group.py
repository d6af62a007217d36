"""The runtimes of several ranks as one executor: what a failure on one of them is to all, and what moves meanwhile."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from layouts import Make, each_of, over, shard_of
from shared_models import PROMPT, SMALL, SMALL_CONFIG, WIDE, WIDE_BYTES, WIDE_CONFIG, wide_plan
from synthetic import SyntheticModel, plan

from fastserve import _C
from fastserve.config import RuntimeConfig
from fastserve.distributed import Group, GroupError
from fastserve.links import Links
from fastserve.loaders.spec import ModelError
from fastserve.native import NativeRuntime
from fastserve.types import BatchPlan

LAYOUTS = [(2, 1), (1, 2), (2, 2), (1, 3)]


def by_itself(group: Group, links: Links, source: Any, config: RuntimeConfig) -> NativeRuntime:
    """This rank's runtime, which has its neighbours but runs what its own caller submits."""
    alone = _C.local_communicator()
    return NativeRuntime(source, config, shard_of(source, group), replace(links, plans=alone, answers=alone, sampler=0))


def failing_with(wrong: BatchPlan, config_of: Any, tensor: int, pipeline: int, machines: Any = None) -> list[str]:
    """What all ranks raise when they are given a plan that fails."""

    def body(group: Group, links: Links, make: Make) -> None:
        runtime = make(SMALL, config_of(group.rank))
        if group.rank != 0:
            return runtime.follow()
        runtime.submit(wrong)
        with pytest.raises(_C.GroupError) as first:
            runtime.poll()
        for again in (runtime.poll, lambda: runtime.submit(PROMPT), runtime.close):
            with pytest.raises(_C.GroupError) as caught:
                again()
            assert str(caught.value) == str(first.value)
        raise first.value

    errors = each_of(tensor, pipeline, body, machines, timeout=10.0)
    assert [type(error) for error in errors] == [GroupError] * (tensor * pipeline), errors
    return [str(error) for error in errors]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_plan_that_fails_on_one_rank_ends_the_group(layout: tuple[int, int]) -> None:
    """On each of them in turn: the others wait for it, in sums, for its activations or for its word."""
    for failing in range(layout[0] * layout[1]):

        def config_of(rank: int, failing: int = failing) -> RuntimeConfig:
            return replace(SMALL_CONFIG, num_blocks=8) if rank == failing else SMALL_CONFIG

        lines = failing_with(PROMPT, config_of, *layout)
        assert len(set(lines)) == 1, lines
        assert f"rank {failing} on " in lines[0] and "block 9 of slot 0 is outside the pool of 8" in lines[0]
        assert "\n" not in lines[0] and lines[0].count("rank ") == 1


def test_a_plan_that_fails_on_one_rank_ends_the_group_on_all_hosts() -> None:
    def config_of(rank: int) -> RuntimeConfig:
        return replace(SMALL_CONFIG, num_blocks=8) if rank == 3 else SMALL_CONFIG

    lines = failing_with(PROMPT, config_of, 2, 2, machines=[0, 0, 1, 1])
    assert all("rank 3 on " in line and "block 9 of slot 0 is outside the pool of 8" in line for line in lines)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_plan_that_fails_on_all_ranks_ends_the_group(layout: tuple[int, int]) -> None:
    lines = failing_with(plan(1, [], [], closed=[3]), lambda rank: SMALL_CONFIG, *layout)
    assert all("rank " in line and "plan 1 closes slot 3, which is not open" in line for line in lines)


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=str)
def test_a_copy_that_only_another_rank_refuses_ends_the_group(layout: tuple[int, int]) -> None:
    copying = replace(PROMPT, copies=np.array([(0, 0, 0, 3)], np.int32))  # a block that the rows leave alone

    def config_of(rank: int) -> RuntimeConfig:
        return replace(SMALL_CONFIG, num_host_blocks=2 if rank == 1 else 4)

    lines = failing_with(copying, config_of, *layout)
    assert all("rank 1 on " in line and "host block 3 of copy 0 is outside the pool of 2" in line for line in lines)


@pytest.mark.parametrize("layout", [(1, 1), *LAYOUTS], ids=str)
def test_what_submit_refuses_has_happened_on_no_rank(layout: tuple[int, int]) -> None:
    """The next plans run as if it had not been there."""

    def lead(make: Make) -> list[int]:
        runtime = make(SMALL, SMALL_CONFIG)
        illegal = replace(PROMPT, copies=np.array([(0, 0, 0, 1)], np.int32))
        with pytest.raises(_C.Error, match="host block 1 of copy 0 is outside the pool of 0") as refused:
            runtime.submit(illegal)
        assert not isinstance(refused.value, _C.GroupError)
        if layout[1] > 1:
            with pytest.raises(_C.Error, match="slot 4 has not sampled a token"):
                runtime.submit(plan(1, [(4, 0, 1, 1)], [-1], opened=[(4, 1)], table=[(4, 0, 0)]))
        assert runtime.poll(0.0) is None
        runtime.submit(PROMPT)
        first = runtime.poll()
        runtime.submit(plan(2, [(0, 3, 1, 1)], [-1]))
        second = runtime.poll()
        assert first is not None and second is not None and (first.plan_id, second.plan_id) == (1, 2)
        return [*first.tokens.tolist(), *second.tokens.tolist()]

    alone = NativeRuntime(SMALL, SMALL_CONFIG)
    alone.submit(PROMPT)
    alone.submit(plan(2, [(0, 3, 1, 1)], [-1]))
    expected = [token for _ in range(2) if (result := alone.poll()) for token in result.tokens.tolist()]
    assert over(*layout, lambda: (SMALL, SMALL_CONFIG), lead) == expected


@pytest.mark.parametrize("layout", [(1, 2), (1, 3)], ids=str)
def test_poll_does_not_wait_for_the_others_beyond_its_time(layout: tuple[int, int]) -> None:
    """The first stage has long done its part when the others begin."""
    begin = threading.Event()

    def body(group: Group, links: Links, make: Make) -> Any:
        runtime = make(SMALL, SMALL_CONFIG)
        if group.rank != 0:
            begin.wait(5.0)
            return runtime.follow()
        runtime.submit(PROMPT)
        early = [runtime.poll(0.01) for _ in range(20)]
        begin.set()
        result = runtime.poll()
        runtime.close()
        assert result is not None
        return early, result.plan_id

    assert each_of(*layout, body)[0] == ([None] * 20, 1)


def says_of_silent(layout: tuple[int, int], silent: int, timeout: float, doing: Callable[[Group, Links], None]) -> str:
    """What rank 0 says of a rank that has loaded, and then does this and nothing more."""
    over = threading.Event()

    def body(group: Group, links: Links, make: Make) -> Any:
        runtime = make(SMALL, SMALL_CONFIG)
        if group.rank == silent:
            doing(group, links)
            return over.wait()
        if group.rank != 0:
            return runtime.follow()
        try:
            runtime.submit(PROMPT)
            while runtime.poll(0.05) is None:  # as an engine does, which looks at its messages between two waits
                pass
            runtime.submit(plan(2, [(0, 3, 1, 1)], [5]))
        finally:
            over.set()

    error = each_of(*layout, body, timeout=timeout)[0]
    assert isinstance(error, GroupError)
    return str(error)


@pytest.mark.parametrize(("layout", "silent"), [((1, 2), 1), ((1, 3), 2)], ids=str)
def test_a_rank_of_a_later_stage_that_hangs_is_named(layout: tuple[int, int], silent: int) -> None:
    """Though no wait for it is longer than a poll."""
    said = says_of_silent(layout, silent, 0.5, lambda group, links: None)
    late = rf"for rank {silent} on .* \(process {os.getpid()}\)"
    assert re.search(rf"^rank 0 on .* has waited 0\.[56]\d* seconds {late} to execute plan 1$", said), said


@pytest.mark.parametrize(("layout", "silent"), [((1, 3), 1), ((2, 2), 3)], ids=str)
def test_who_waits_for_a_rank_that_hangs_names_it(layout: tuple[int, int], silent: int) -> None:
    """Before rank 0 does, which hears of neither and cannot tell for which of the two."""
    said = says_of_silent(layout, silent, 2.0, lambda group, links: None)
    assert re.search(rf"^rank 2 on .* has waited 2\.\d+ seconds for rank {silent} on ", said), said


def test_a_rank_that_hangs_before_it_says_what_it_sampled_is_named() -> None:
    def acknowledge(group: Group, links: Links) -> None:
        group.world.broadcast_plan()
        links.answers.gather_acknowledgements(PROMPT.plan_id)

    said = says_of_silent((1, 2), 1, 0.5, acknowledge)
    assert re.search(r"^rank 0 on .* has waited 0\.\d+ seconds for rank 1 on ", said)


def test_a_rank_that_does_not_take_the_next_plan_is_named() -> None:
    over = threading.Event()

    def body(group: Group, links: Links, make: Make) -> Any:
        runtime = make(SMALL, SMALL_CONFIG)
        if group.rank == 1:
            return over.wait()
        try:
            runtime.submit(PROMPT)
            runtime.submit(plan(2, [(0, 3, 1, 1)], [5]))
            return runtime.submit(plan(3, [(0, 4, 1, 1)], [5]))
        finally:
            over.set()

    error = each_of(1, 2, body, timeout=0.5)[0]
    assert isinstance(error, GroupError)
    assert re.search(r"^rank 0 on .* has waited 0\.\d+ seconds for rank 1 on ", str(error))


def test_the_next_stage_gets_its_input_while_this_one_computes() -> None:
    """Rank 0 is in the middle of its second plan, for which rank 1 is late, when rank 2 is to get the first one's."""
    arrived = threading.Event()

    def body(group: Group, links: Links, make: Make) -> Any:
        if group.pipeline_rank == 1:
            residuals = [bytearray(WIDE_BYTES) for _ in range(2)]
            assert links.receives is not None
            links.receives.receive(residuals[0], 0).wait()
            if group.rank == 2:
                arrived.set()
            links.receives.receive(residuals[1], 0).wait()
            group.world.barrier()
            return residuals
        runtime = by_itself(group, links, WIDE, WIDE_CONFIG)
        runtime.submit(wide_plan(1))
        if group.rank == 1:
            arrived.wait(20.0)
        runtime.submit(wide_plan(2))
        results = [runtime.poll() for _ in range(2)]
        group.world.barrier()  # until all that it sends has come
        return [result.plan_id for result in results if result is not None]

    results = each_of(2, 2, body, timeout=10.0)
    assert results[:2] == [[1, 2], [1, 2]]
    assert results[2] == results[3], "ranks of a stage have the same residual"
    assert results[2][0] != results[2][1]


def test_what_ends_the_sending_is_told_at_the_next_poll() -> None:
    """Nothing is to be done when it happens: the plan has ended, and only its residual is still on its way."""
    polled = threading.Event()

    def body(group: Group, links: Links, make: Make) -> Any:
        if group.rank == 1:
            assert links.receives is not None
            polled.wait(20.0)
            links.receives.abort("rank 1 has no memory")
            return None
        runtime = by_itself(group, links, WIDE, WIDE_CONFIG)
        runtime.submit(wide_plan(1))
        result = runtime.poll()
        assert result is not None and result.plan_id == 1
        polled.set()
        errors = []
        for each in (runtime.poll, runtime.poll, lambda: runtime.submit(wide_plan(2))):
            with pytest.raises(_C.GroupError) as caught:
                each()
            errors.append(str(caught.value))
        return errors

    assert each_of(1, 2, body, timeout=10.0)[0] == ["rank 1 has no memory"] * 3


def test_a_runtime_that_ends_before_its_plans_tells_its_neighbours() -> None:
    """And does not wait for them."""
    ended = threading.Event()

    def body(group: Group, links: Links, make: Make) -> Any:
        runtime = by_itself(group, links, SMALL, SMALL_CONFIG)
        if group.rank == 1:
            ended.wait(20.0)
        runtime.submit(PROMPT)
        if group.rank == 1:
            return runtime.poll()
        del runtime
        return ended.set()

    first, second = each_of(2, 1, body, timeout=10.0)
    assert first is None and isinstance(second, _C.GroupError)
    assert "rank 0 on " in str(second) and "ends before the plans it was given" in str(second)


def test_a_neighbour_that_is_gone_is_no_invalid_option() -> None:
    def body(group: Group, links: Links, make: Make) -> Any:
        if group.rank == 1:
            group.tensor.abort("rank 1 has no memory")
            return None
        return make(SMALL, SMALL_CONFIG)

    error, _ = each_of(2, 1, body)
    assert isinstance(error, _C.GroupError) and str(error) == "rank 1 has no memory"


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=str)
def test_all_ranks_are_told_which_one_could_not_load_its_part(layout: tuple[int, int]) -> None:
    class Lacking(SyntheticModel):
        def tensors(self) -> Any:
            return (tensor for tensor in super().tensors() if tensor.name != "final_norm.weight")

    def body(group: Group, links: Links, make: Make) -> Any:
        runtime = make(Lacking(SMALL.spec) if group.rank == 1 else SMALL, SMALL_CONFIG)
        runtime.submit(PROMPT)
        return runtime.poll()

    told, lacking = each_of(*layout, body, timeout=10.0)
    assert isinstance(lacking, ModelError)
    assert isinstance(told, _C.GroupError)
    assert "rank 1 on " in str(told) and "final_norm.weight" in str(told)
