"""The prefix cache on real arithmetic: what is found is, to the bit, what would have been computed."""

from __future__ import annotations

from typing import Any

import pytest
from synthetic import VOCAB, SyntheticModel, llama_spec

from fastserve.config import RuntimeConfig, SchedulerConfig
from fastserve.cost import CostModel
from fastserve.engine import Engine
from fastserve.native import NativeRuntime
from fastserve.types import Job, SamplingParams

SPEC = llama_spec(num_layers=2)
BLOCK, BLOCKS, HOST_BLOCKS = 4, 26, 64


def run(kv_cache_dtype: str, **options: Any) -> tuple[list[Job], int]:
    """Turns of conversations that begin alike, with logprobs; and how many blocks were copied or thrown away.

    Memory has room for half of them. Which of the two becomes of a block goes by how long copies take.
    """
    dtype = "float32" if kv_cache_dtype == "float32" else "bfloat16"
    limits: dict[str, Any] = {"block_size": BLOCK, "num_blocks": BLOCKS, "max_num_batched_tokens": 24}
    limits["num_host_blocks"] = HOST_BLOCKS
    runtime = NativeRuntime(
        SyntheticModel(SPEC), RuntimeConfig(dtype=dtype, kv_cache_dtype=kv_cache_dtype, threads=1, **limits)
    )
    config = SchedulerConfig(policy="mlfq", max_num_seqs=4, max_model_len=120, max_in_flight=2, **limits, **options)
    engine = Engine(config, runtime, CostModel.constant(0.01))
    jobs: list[Job] = []
    texts = [[(7 * i + 3) % VOCAB for i in range(18)] + [user, user] for user in range(4)]
    for turn in range(3):
        calls = [
            engine.add_job(
                f"{turn}/{user}",
                text,
                SamplingParams(max_tokens=9, ignore_eos=True, temperature=0.8, logprobs=1),
                seed=user,
                vocab_size=VOCAB,
            )
            for user, text in enumerate(texts)
        ]
        while engine.has_work:
            engine.step()
            engine.check_integrity()
        jobs += calls
        texts = [[*job.prompt, *job.output, turn, 5] for job in calls]
    residency = engine.scheduler.residency
    return jobs, sum(residency.copied) + residency.cache_counters.evicted


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16", "int8"])
def test_tokens_and_logprobs_are_those_without_the_cache(kv_cache_dtype: str) -> None:
    with_cache, moved = run(kv_cache_dtype)
    without, _ = run(kv_cache_dtype, enable_prefix_caching=False)
    assert sum(job.metrics.cached_tokens for job in with_cache) > 0 == without[0].metrics.cached_tokens
    assert moved > 0, "memory was not too small"
    assert [job.output for job in with_cache] == [job.output for job in without]
    assert [job.logprobs for job in with_cache] == [job.logprobs for job in without]
