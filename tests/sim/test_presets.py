"""Roofline costs and presets, against figures published by others and sums written out one by one."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.config import SchedulerConfig
from fastserve.presets import DEVICES, MODELS, deployment
from fastserve.roofline import Roofline
from fastserve.types import InvalidRequest

OPT_13B = deployment("opt-13b", "a100-40g").cost


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),
    [  # GPT-3, table 2.1; the others count what their checkpoints hold
        ("gpt3-2.7b", 2.65),
        ("gpt3-6.7b", 6.7),
        ("gpt3-13b", 13.0),
        ("gpt3-175b", 174.6),
        ("opt-13b", 12.853),
        ("opt-30b", 29.97),
        ("opt-66b", 65.7),
        ("opt-175b", 175.0),
        ("llama-3-8b", 8.030),
        ("llama-3-70b", 70.55),
        ("smollm2-135m", 0.1345),
    ],
)
def test_models_have_the_parameters_that_were_published(name: str, billions: float) -> None:
    assert MODELS[name].parameters / 1e9 == pytest.approx(billions, rel=0.012)  # 5120 wide is not 5140


def test_kv_cache_is_as_large_as_published() -> None:
    """The paper: 2.3 GB for 512 tokens of OPT-175B; vLLM's: 800 KB a token of OPT-13B."""
    assert MODELS["opt-175b"].kv_bytes(2) * 512 / 2**30 == pytest.approx(2.3, rel=0.03)
    assert MODELS["opt-13b"].kv_bytes(2) == 800 * 1024
    assert MODELS["llama-3-8b"].kv_bytes(2) == 128 * 1024  # grouped: a quarter of the heads


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_decode_reads_the_weights_once() -> None:
    """25.2 GB of matrices and 0.5 GB of head at 0.8 × 1,555 GB/s, 40 layers × 20 µs, 1 ms; 0.66 µs of KV a position."""
    weights = (40 * 12 * 5120**2 + 50272 * 5120) * 2 / (0.8 * 1555e9)
    kv = 4 * 40 * 5120 / (0.8 * 1555e9) + 4 * 40 * 5120 / (0.4 * 312e12)
    assert OPT_13B.decode_seconds(1000) == pytest.approx(weights + 0.8e-3 + 1e-3 + 1000 * kv, rel=1e-12)
    assert 0.018 < OPT_13B.decode_seconds(500) < 0.024  # the paper's FCFS floor is 0.024 s a token, prefills included


def test_a_long_prefill_is_bound_by_compute() -> None:
    products = (2 * 40 * 12 * 5120**2 * 2000 + 2 * 50272 * 5120) / (0.6 * 312e12)
    pairs = sum(range(1, 2001)) * 4 * 40 * 5120 / (0.4 * 312e12)
    reads = 2000 * 4 * 40 * 5120 / (0.8 * 1555e9)
    assert OPT_13B.prefill_seconds(0, 2000) == pytest.approx(products + pairs + reads + 1.8e-3, rel=1e-12)


def test_a_batch_of_decodes_costs_little_more_than_one() -> None:
    contexts, ones = np.full(16, 1, np.int32), np.ones(16, np.int32)
    assert OPT_13B.plan_seconds(contexts, ones) < 1.01 * OPT_13B.decode_seconds(2)


def test_tensor_parallelism_divides_work_and_adds_reductions() -> None:
    one, eight = (deployment("opt-66b", "h100", t).cost for t in (2, 8))
    free = replace(DEVICES["h100"], node_latency=0.0, node_link=math.inf, layer_overhead=0.0, iteration_overhead=0.0)
    pure = [Roofline(model=MODELS["opt-66b"], device=free, tensor_parallel=t) for t in (2, 8)]
    assert pure[0].decode_seconds(100) == pytest.approx(4 * pure[1].decode_seconds(100))
    assert pure[0].prefill_seconds(0, 900) == pytest.approx(4 * pure[1].prefill_seconds(0, 900))
    overhead = 1e-3 + 64 * 20e-6
    reduced = 2 * 64 * (15e-6 + 2 * 7 / 8 * 9216 * 2 / (0.8 * 450e9))
    assert eight.decode_seconds(100) == pytest.approx(pure[1].decode_seconds(100) + overhead + reduced)
    assert one.decode_seconds(100) > eight.decode_seconds(100)


def test_a_pipeline_adds_hops_to_the_time_through_it() -> None:
    flat, deep = deployment("opt-175b", "a100-80g", 8, 1), deployment("opt-175b", "a100-80g", 8, 4)
    hops = 3 * (20e-6 + 100 * 12288 * 2 / (0.8 * 25e9))
    assert deep.cost.prefill_seconds(0, 100) == pytest.approx(flat.cost.prefill_seconds(0, 100) + hops)


ROWS = st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 5000)), min_size=1, max_size=30)
COSTS = st.sampled_from(
    [
        deployment("opt-13b", "a100-40g").cost,
        deployment("gpt3-175b", "a100-40g", 8, 2).cost,
        deployment("llama-3-70b", "h100", 4).cost,
        deployment("smollm2-135m", "cpu").cost,
    ]
)


@given(cost=COSTS, rows=ROWS)
def test_an_iteration_is_the_sum_of_its_rows_but_for_what_they_share(
    cost: Roofline, rows: list[tuple[int, int]]
) -> None:
    starts, tokens = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    together = cost.plan_seconds(starts, tokens)
    alone = [cost.prefill_seconds(start, count) for start, count in rows]
    assert max(alone) * (1 - 1e-12) <= together <= sum(alone) * (1 + 1e-12)
    assert cost.plan_seconds(starts[:1], tokens[:1]) == pytest.approx(alone[0], rel=1e-12)
    assert cost.plan_seconds(starts[:0], tokens[:0]) == 0.0


@given(cost=COSTS, cuts=st.lists(st.integers(1, 3000), min_size=1, max_size=20))
def test_the_charges_of_chunks_add_up_to_the_prefill(cost: Roofline, cuts: list[int]) -> None:
    edges = [0, *np.cumsum(cuts).tolist()]
    charges = [cost.prefill_charge(start, end) for start, end in itertools.pairwise(edges)]
    assert min(charges) > 0
    assert sum(charges) == pytest.approx(cost.prefill_seconds(0, edges[-1]), rel=1e-9)


@given(cost=COSTS, contexts=st.lists(st.integers(1, 100_000), max_size=20))
def test_decodes_cost_the_same_one_by_one(cost: Roofline, contexts: list[int]) -> None:
    each = cost.decode_each(np.array(contexts, np.int32)).tolist()
    assert each == pytest.approx([cost.decode_seconds(context) for context in contexts], rel=1e-12)
    assert [cost.prefill_seconds(context - 1, 1) for context in contexts] == pytest.approx(each, rel=1e-12)


def test_no_tokens_take_no_time() -> None:
    assert OPT_13B.prefill_seconds(7, 0) == 0.0 == OPT_13B.prefill_charge(5, 5)


def test_the_cpu_preset_is_near_what_was_measured() -> None:
    """The profile it was taken from: 8.93 ms + 0.125 a row + 0.562 a token. A roofline overlaps what that adds up."""
    cost = deployment("smollm2-135m", "cpu").cost
    assert cost.decode_seconds(50) == pytest.approx(0.00893 + 0.00069, rel=0.05)
    assert cost.prefill_seconds(0, 256) == pytest.approx(0.00893 + 0.00013 + 256 * 0.000562, rel=0.06)
    contexts, ones = np.full(16, 50, np.int32), np.ones(16, np.int32)
    assert 0.6 < cost.plan_seconds(contexts, ones) / (0.00893 + 16 * 0.000687) < 1


# --- memory and links -------------------------------------------------------------------------------------------------


def test_kv_cache_gets_what_the_weights_leave() -> None:
    on_one = deployment("opt-13b", "a100-40g")
    # 36 GiB less 25.7 GB, by 13.1 MB a block of 16 tokens
    assert on_one.num_blocks == int((36 * 2**30 - on_one.weight_bytes) / (16 * 800 * 1024)) == 988
    assert (on_one.block_bytes, on_one.device_block_bytes) == (16 * 800 * 1024,) * 2
    assert on_one.host_blocks(2**30) == 81
    assert deployment("opt-13b", "a100-40g", block_size=32).num_blocks == 494


@pytest.mark.parametrize("block_size", [1, 16])
def test_no_preset_holds_more_blocks_than_are_kept_track_of(block_size: int) -> None:
    tiny = deployment("smollm2-135m", "a100-80g", 3, 30, block_size)  # 256 bytes a token
    assert tiny.num_blocks == SchedulerConfig(num_blocks=tiny.num_blocks).num_blocks == 2**24


def test_every_device_holds_and_moves_its_part_of_a_block() -> None:
    one, many = deployment("opt-175b", "a100-80g", 8, 1), deployment("opt-175b", "a100-40g", 8, 2)
    assert (many.devices, many.block_bytes) == (16, 16 * 4 * 96 * 12288)
    assert many.device_block_bytes == many.block_bytes / 16
    assert many.link.upload_block == many.link.offload_block == pytest.approx(many.block_bytes / 16 / (0.8 * 31.5e9))
    assert one.link.upload_block == pytest.approx(2 * many.link.upload_block)
    # Over one link, the paper moves 512 tokens in 36 ms, at the 64 GB/s of both directions of PCIe 4 together.
    assert 16 * 32 * many.link.upload_block * (0.8 * 31.5 / 64) == pytest.approx(0.036, rel=0.06)


def test_opt_175b_on_two_nodes_of_eight() -> None:
    """A stage a node. A device holds an eighth of 48 layers, and of the head: the later stage decides."""
    it = deployment("opt-175b", "a100-40g", 8, 2)
    weights, block = (48 * 12 * 12288**2 + 50272 * 12288) * 2 / 8, 16 * 48 * 4 * 12288 / 8
    assert (it.device_block_bytes, it.num_blocks) == (block, (0.9 * 40 * 2**30 - weights) // block)
    # Through both stages: everything is read once, by the eight devices of one node after those of the other.
    read = (96 * 12 * 12288**2 + 50272 * 12288) * 2 / (8 * 0.8 * 1555e9)
    launches = 1e-3 + 96 * 20e-6
    reduces = 2 * 96 * (15e-6 + 2 * 7 / 8 * 12288 * 2 / (0.8 * 300e9))
    hop = 20e-6 + 12288 * 2 / (0.8 * 25e9)
    kv = 4 * 96 * 12288 / (8 * 0.8 * 1555e9) + 4 * 96 * 12288 / (8 * 0.4 * 312e12)
    assert it.cost.decode_seconds(500) == pytest.approx(read + launches + reduces + hop + 500 * kv, rel=1e-12)
    assert it.cost.decode_seconds(500) < 0.060  # what the paper says a step of theirs takes


def test_the_fullest_stage_decides() -> None:
    """96 layers on 5 stages: 20 on the first."""
    uneven = deployment("gpt3-175b", "a100-80g", 8, 5)
    assert uneven.device_block_bytes == 16 * 4 * 20 * 12288 // 8


def test_grouped_heads_are_shared_out() -> None:
    """Eight KV heads on eight devices: one each."""
    alone = deployment("llama-3-70b", "h100", 8)
    assert alone.device_block_bytes == 16 * 4 * 80 * 128 == alone.block_bytes / 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpt-5", "h100"), "model: must be one of gpt3-2.7b, "),
        (("opt-13b", "tpu"), "device: must be one of a100-40g, a100-80g, h100, cpu; got 'tpu'"),
        (("opt-66b", "a100-40g"), r"model: opt-66b needs 122.4 GiB .* on each of 1 a100-40g, and of 40 GiB"),
        (("opt-13b", "h100", 3), "tensor_parallel_size: must divide the 40 heads"),
        (("opt-13b", "h100", 16), "tensor_parallel_size: must be at most 8"),
        (("opt-13b", "h100", 0), "tensor_parallel_size: must be at least 1"),
        (("opt-13b", "h100", 1, 41), "pipeline_parallel_size: must be at most 40"),
        (("opt-13b", "h100", 1, 1, 0), "block_size: must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments: tuple[str, str, int, int, int], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        deployment(*arguments)
    with pytest.raises(InvalidRequest, match="memory_share: must be above 0"):
        deployment("opt-13b", "h100", memory_share=1.5)
