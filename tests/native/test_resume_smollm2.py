"""A sampled job of SmolLM2 whose engine is lost goes on in a fresh one to the byte."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from fastserve.config import RuntimeConfig, SchedulerConfig
from fastserve.cost import CostModel
from fastserve.engine import Engine
from fastserve.loaders import open_model
from fastserve.native import NativeRuntime
from fastserve.types import FinishReason, Job, SamplingParams

PROMPT = [(31 * i * i + 7 * i) % 40_000 + 300 for i in range(250)]  # the output crosses a segment of attention
PARAMS = SamplingParams(
    temperature=0.8,
    top_p=0.95,
    max_tokens=40,
    min_tokens=25,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={2: 16.0},  # end-of-sequence: the first token, were it not for min_tokens
    logprobs=3,
)
SEED = 2**63 + 5


def start(prompts: dict[str, list[int]], output: list[int], **options: Any) -> tuple[Engine, list[Job]]:
    """A fresh engine on a fresh runtime, with a job for each prompt; the first has put out `output`."""
    source = open_model("smollm2")
    scheduling = SchedulerConfig(num_blocks=64, max_in_flight=2, **options)
    runtime = NativeRuntime(
        source, RuntimeConfig(num_blocks=64, max_num_batched_tokens=scheduling.max_num_batched_tokens)
    )
    engine = Engine(scheduling, runtime, CostModel(per_iteration=0.01, per_token=0.001))
    spec = source.spec
    jobs = [
        engine.add_job(
            name,
            prompt,
            PARAMS,
            seed=SEED + i,
            vocab_size=spec.vocab_size,
            eos_token_ids=spec.eos_token_ids,
            output=[] if i else output,
        )
        for i, (name, prompt) in enumerate(prompts.items())
    ]
    return engine, jobs


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.check_integrity()


@cache
def undisturbed() -> Job:
    engine, (job,) = start({"job": PROMPT}, [])
    run(engine)
    return job


@pytest.mark.parametrize("cut", [1, 5, 6, 24, 25, 26])
def test_tokens_and_logprobs_are_those_of_the_undisturbed_run(cut: int) -> None:
    whole = undisturbed()
    assert 26 < len(whole.output) < 40  # how many depends on the instruction set
    assert whole.finish_reason is FinishReason.STOP
    # Beside others, in chunks: the prefill is cut at other places than the run was.
    engine, (job, *_) = start(
        {"job": PROMPT, "other": PROMPT[::-1], "short": PROMPT[:9]}, whole.output[:cut], max_num_batched_tokens=37 + cut
    )
    run(engine)
    assert job.output == whole.output
    assert job.logprobs == whole.logprobs[cut:]  # float32 values, compared as they are
    assert job.finish_reason == whole.finish_reason
