"""One model over many ranks: the same tokens as on one, and nearly the same logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Make, over
from synthetic import Driver, QuantizedModel, SyntheticModel, gpt_spec, llama_spec, neox_spec

from fastserve.config import RuntimeConfig, SchedulerConfig
from fastserve.cost import CostModel, Link
from fastserve.engine import Engine
from fastserve.loaders.spec import ModelSpec
from fastserve.native import NativeRuntime
from fastserve.types import SamplingParams

LAYOUTS = [(2, 1), (1, 2), (2, 2), (4, 1), (1, 3)]
# SmolLM2's heads in small: 9 queries in 3 groups, which neither 2 nor 4 ranks divide, and 3 stages of 4 layers.
SMOL = llama_spec(num_heads=9, num_kv_heads=3, head_dim=10, hidden_size=90, intermediate_size=128, num_layers=4)
SPECS = {
    "smollm2": SMOL,
    "gpt2": gpt_spec(num_layers=3),
    "opt": gpt_spec(family="opt", num_layers=3, position_offset=2, activation="relu"),
    "qwen3": llama_spec(family="qwen3", num_layers=3, qk_norm=True, tied_embeddings=True),
    "neox": neox_spec(num_layers=3),
}
COST = CostModel(per_iteration=0.001, per_row=0.0001, per_token=0.0001)


def tolerance(spec: ModelSpec, logits: np.ndarray) -> float:
    """A sum of K float32 terms in another order differs by at most K · 2^-23 of the sum of their sizes. All sums
    between a token and its logits together, as if each were as large as the largest logit."""
    per_layer = 2 * spec.hidden_size + spec.num_heads * spec.head_dim + spec.intermediate_size
    return float((spec.num_layers * per_layer + spec.hidden_size) * 2.0**-23 * np.abs(logits).max())


def driver_config(sequences: list[list[int]], dtype: str, block_size: int = 16) -> RuntimeConfig:
    """As Driver's."""
    return RuntimeConfig(
        dtype=dtype,  # type: ignore[arg-type]
        block_size=block_size,
        num_blocks=sum(-(-len(tokens) // block_size) for tokens in sequences) + 3,
        max_num_batched_tokens=sum(len(tokens) for tokens in sequences),
        threads=1,
    )


def logits_over(source: Any, sequences: list[list[int]], layout: tuple[int, int], dtype: str = "float32") -> list[Any]:
    """Of all positions of each sequence, computed in a few chunks together."""

    def lead(make: Make) -> list[Any]:
        driver = Driver(source, sequences, dtype=dtype, threads=1, runtime=make)
        driver.step({slot: len(tokens) // 2 for slot, tokens in enumerate(sequences)})
        driver.step({slot: len(tokens) - len(tokens) // 2 for slot, tokens in enumerate(sequences)})
        return [driver.all_logits(slot) for slot in range(len(sequences))]

    return over(*layout, lambda: (source, driver_config(sequences, dtype)), lead)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", SPECS)
def test_logits_are_those_of_one_process(family: str, layout: tuple[int, int]) -> None:
    spec = SPECS[family]
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, spec.vocab_size, length).tolist() for length in (300, 7, 40)]
    source = SyntheticModel(spec)
    for alone, shared in zip(
        logits_over(source, sequences, (1, 1)), logits_over(source, sequences, layout), strict=True
    ):
        assert np.abs(alone - shared).max() <= tolerance(spec, alone)
        assert not np.array_equal(alone, shared) or layout[0] == 1, "the sums are made in another order"
        if layout[0] == 1:
            assert np.array_equal(alone, shared), "stages change no sum"


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantized_weights_are_cut_between_their_groups(kind: str) -> None:
    spec = llama_spec(num_heads=8, num_kv_heads=4, head_dim=16, hidden_size=64, intermediate_size=192)
    sequences = [np.random.default_rng(2).integers(0, spec.vocab_size, 50).tolist()]
    source = QuantizedModel(spec, kind)
    (alone,), (shared,) = (logits_over(source, sequences, layout, "bfloat16") for layout in ((1, 1), (2, 1)))
    assert np.abs(alone - shared).max() <= 0.05 * np.abs(alone).max()  # activations are rounded by group of 32
    assert np.corrcoef(alone.ravel(), shared.ravel())[0, 1] > 0.999


def engine_tokens(
    make: Make, source: Any, config: SchedulerConfig, running: RuntimeConfig, jobs: list[dict[str, Any]]
) -> list[list[int]]:
    """Outputs of jobs, some of which arrive while others run."""
    link = Link(offload_block=1e-5, upload_block=1e-5)
    engine = Engine(config, make(source, running), COST, link=link)
    added, steps = [], 0
    while engine.has_work or len(added) < len(jobs):
        while len(added) < len(jobs) and jobs[len(added)]["after"] <= steps:
            job = jobs[len(added)]
            added.append(
                engine.add_job(
                    str(len(added)), job["prompt"], job["params"], seed=len(added), vocab_size=source.spec.vocab_size
                )
            )
        engine.step(10.0)
        engine.check_integrity()
        steps += 1
    return [job.output for job in added]


@pytest.mark.parametrize("layout", [(1, 1), *LAYOUTS], ids=str)
@settings(max_examples=10)
@given(data=st.data())
def test_preemption_and_swapping_stay_invisible(layout: tuple[int, int], data: st.DataObject) -> None:
    """Jobs that share a tiny pool, and are preempted and moved, get the tokens they get alone in one process."""
    family = data.draw(st.sampled_from(sorted(SPECS)))
    source, seed = SyntheticModel(SPECS[family]), data.draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    jobs: list[dict[str, Any]] = [
        {
            "prompt": rng.integers(0, source.spec.vocab_size, int(rng.integers(1, 60))).tolist(),
            "params": SamplingParams(
                max_tokens=int(rng.integers(1, 25)),
                temperature=float(rng.choice([0.0, 1.0])),
                frequency_penalty=float(rng.choice([0.0, 0.5])),
            ),
            "after": int(rng.integers(0, 20)),
        }
        for _ in range(8)
    ]
    jobs.sort(key=lambda job: job["after"])

    def configs(layout: tuple[int, int], blocks: int, host: int, rows: int) -> tuple[SchedulerConfig, RuntimeConfig]:
        scheduling = SchedulerConfig(
            max_num_seqs=rows,
            max_num_batched_tokens=32,
            block_size=4,
            num_blocks=blocks,
            num_host_blocks=host,
            max_model_len=100,
            max_in_flight=max(2, layout[1]),
            pipeline_parallel_size=layout[1],
            repayment=1.0,  # 0 allows two jobs to take turns for ever
        )
        running = RuntimeConfig(
            dtype="float32", block_size=4, num_blocks=blocks, num_host_blocks=host, max_num_batched_tokens=32, threads=1
        )
        return scheduling, running

    alone = []
    scheduling, running = configs((1, 1), 64, 0, 1)
    for number, job in enumerate(jobs):
        engine = Engine(scheduling, NativeRuntime(source, running), COST)
        done = engine.add_job("0", job["prompt"], job["params"], seed=number, vocab_size=source.spec.vocab_size)
        while engine.has_work:
            engine.step()
        alone.append(done.output)
    scheduling, running = configs(layout, 26, 30, 3)
    shared = over(
        *layout, lambda: (source, running), lambda make: engine_tokens(make, source, scheduling, running, jobs)
    )
    assert shared == alone
