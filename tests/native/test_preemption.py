"""Preemption is invisible, on the real runtime: whatever the scheduler does, a job's tokens are those of running it
alone, to the byte."""

from __future__ import annotations

import gc
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from machines import HAS_CUDA, NO_CUDA, examples
from synthetic import VOCAB, SyntheticModel, gpt_spec, llama_spec

from fastserve.config import RuntimeConfig, SchedulerConfig
from fastserve.cost import CostModel
from fastserve.engine import Engine
from fastserve.native import NativeRuntime
from fastserve.policies import ONLINE_POLICIES
from fastserve.types import Job, SamplingParams

MODELS = {
    "llama": SyntheticModel(llama_spec(max_position=340)),
    "gpt2": SyntheticModel(gpt_spec(max_position=340)),
}
DTYPES = {  # of computation and of the KV cache
    "cpu": [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8")],
    "cuda": [("float32", "auto"), ("bfloat16", "auto"), ("float16", "auto")],
}
MAX_LEN = 330  # past the first segment of attention
EOS = 3


class FrozenBias(dict[int, float]):
    """Hashable, so that runs alone are computed once."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


BIAS = FrozenBias({EOS: 3.0})
SAMPLING = st.one_of(
    st.just(dict(temperature=0.0)),
    st.fixed_dictionaries(dict(temperature=st.sampled_from([0.7, 1.3]), top_p=st.sampled_from([1.0, 0.9]))),
    st.just(dict(temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.4, top_k=20)),
    st.just(dict(temperature=1.0, min_tokens=4, logit_bias=BIAS, logprobs=3)),
)
PROMPTS = st.one_of(st.integers(1, 40), st.integers(200, 290))
JOBS = st.lists(st.tuples(PROMPTS, st.integers(1, 24), SAMPLING, st.integers(0, 30)), min_size=2, max_size=8)


def _engine(model: str, device: str, dtype: tuple[str, str], blocks: int, **options: Any) -> Engine:
    config = SchedulerConfig(num_blocks=blocks, max_model_len=MAX_LEN, **options)
    runtime = NativeRuntime(
        MODELS[model],
        RuntimeConfig(
            dtype=dtype[0],  # type: ignore[arg-type]
            kv_cache_dtype=dtype[1],  # type: ignore[arg-type]
            device=device,
            num_blocks=blocks,
            block_size=config.block_size,
            max_num_batched_tokens=config.max_num_batched_tokens,
        ),
    )
    # A prefill costs up to thirty decodes: jobs land on several levels.
    return Engine(config, runtime, CostModel(per_iteration=0.01, per_token=0.001))


def _prompt(index: int, length: int) -> list[int]:
    return [(index * 31 + i * i * 7 + i) % VOCAB for i in range(length)]


def _add(engine: Engine, index: int, length: int, output: int, sampling: dict[str, Any]) -> Job:
    params = SamplingParams(max_tokens=max(output, sampling.get("min_tokens", 0)), **sampling)
    return engine.add_job(
        f"job-{index}", _prompt(index, length), params, seed=index * 7919, vocab_size=VOCAB, eos_token_ids=[EOS]
    )


@cache
def _alone(
    model: str, device: str, dtype: tuple[str, str], index: int, length: int, output: int, sampling: tuple[Any, ...]
) -> tuple[Any, ...]:
    engine = _engine(model, device, dtype, blocks=128, max_num_seqs=1, block_size=16, policy="fcfs")
    job = _add(engine, index, length, output, dict(sampling))
    while engine.has_work:
        engine.step()
    return job.output, [(item.logprob, item.top) for item in job.logprobs], job.finish_reason


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), jobs=JOBS)
def test_tokens_are_those_of_running_alone(data: st.DataObject, jobs: list[Any]) -> None:
    _check("cpu", data, jobs)


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason=NO_CUDA)
@settings(max_examples=examples(6), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), jobs=JOBS)
def test_tokens_are_those_of_running_alone_on_cuda(data: st.DataObject, jobs: list[Any]) -> None:
    _check("cuda", data, jobs)
    gc.collect()  # engines, whose parts know each other, and their device memory


def _check(device: str, data: st.DataObject, jobs: list[Any]) -> None:
    model, dtype = data.draw(st.sampled_from(sorted(MODELS))), data.draw(st.sampled_from(DTYPES[device]))
    block_size = data.draw(st.sampled_from([4, 16, 20]))
    needed = max(-(-(length + max(output, 4)) // block_size) for length, output, *_ in jobs)
    max_num_seqs = data.draw(st.integers(1, 6))
    engine = _engine(
        model,
        device,
        dtype,
        # The largest job fits, and then little beside it, or everything.
        blocks=needed + data.draw(st.one_of(st.integers(0, 12), st.just(300))),
        block_size=block_size,
        policy=data.draw(st.sampled_from(sorted(ONLINE_POLICIES))),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + data.draw(st.integers(0, 60)),
        max_in_flight=data.draw(st.integers(1, 2)),
        num_levels=data.draw(st.integers(2, 6)),
        starvation_limit=data.draw(st.sampled_from([None, 0.001, 0.05])),
    )
    waiting = sorted(enumerate(jobs), key=lambda item: item[1][3])
    running, steps = [], 0
    while waiting or engine.has_work:
        while waiting and (waiting[0][1][3] <= steps or not engine.has_work):
            index, (length, output, sampling, _) = waiting.pop(0)
            running.append((index, length, output, sampling, _add(engine, index, length, output, sampling)))
        engine.step()
        engine.check_integrity()
        steps += 1
    assert engine.scheduler.blocks.free_blocks == engine.config.num_blocks
    event(f"preempted: {any(job.metrics.preemptions for *_, job in running)}")
    event(f"recomputed: {any(job.metrics.recomputed_tokens for *_, job in running)}")
    for index, length, output, sampling, job in running:
        logprobs = [(item.logprob, item.top) for item in job.logprobs]
        alone = _alone(model, device, dtype, index, length, output, tuple(sampling.items()))
        assert (job.output, logprobs, job.finish_reason) == alone
