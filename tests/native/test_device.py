"""What a CUDA device does besides a model's arithmetic: it chooses tokens, runs ahead, has memory of its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machines import CUDA
from models import CASES, Case, save
from synthetic import VOCAB, PoisonedModel, SyntheticModel, llama_spec, plan

from fastserve import LLM, SamplingParams
from fastserve.config import RuntimeConfig, SchedulerConfig
from fastserve.cost import CostModel
from fastserve.engine import Engine
from fastserve.loaders.spec import ModelError
from fastserve.native import NativeRuntime
from fastserve.types import InvalidRequest, Job

SAMPLING: list[dict[str, Any]] = [
    dict(temperature=0.0, logprobs=3),
    dict(temperature=0.8, top_p=0.9, logprobs=0),
    dict(temperature=1.2, top_k=7),
    dict(temperature=1.0, min_p=0.05),
    dict(temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2, logprobs=20),
    dict(temperature=1.0, min_tokens=6, logit_bias={3: 4.0, 9: -2.0}),
    dict(temperature=0.0, repetition_penalty=1.5),
]


def _jobs(device: str, in_flight: int, dtype: str = "float32", rows: int = 5) -> list[Job]:
    runtime = NativeRuntime(SyntheticModel(llama_spec()), RuntimeConfig(dtype=dtype, num_blocks=40, device=device))
    config = SchedulerConfig(num_blocks=40, max_model_len=96, max_num_seqs=rows, max_in_flight=in_flight)
    engine = Engine(config, runtime, CostModel(per_iteration=0.01, per_token=0.001))
    jobs = [
        engine.add_job(
            f"job-{i}",
            [(31 * i + 7 * j) % VOCAB for j in range(5 + 9 * i)],
            SamplingParams(max_tokens=16, **sampling),
            seed=7919 * i,
            vocab_size=VOCAB,
            eos_token_ids=[3],
        )
        for i, sampling in enumerate(SAMPLING)
    ]
    while engine.has_work:
        engine.step()
    return jobs


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_tokens_are_chosen_as_on_the_cpu(device: str, in_flight: int) -> None:
    """In float32, where logits differ in their last bits only. Two in flight: the second's tokens are the first's
    samples, which the host has not seen yet."""
    for here, there in zip(_jobs(device, in_flight), _jobs("cpu", 1), strict=True):
        assert (here.output, here.finish_reason) == (there.output, there.finish_reason)
        assert len(here.logprobs) == len(there.logprobs)
        for one, other in zip(here.logprobs, there.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-4)


@pytest.mark.parametrize("device", [CUDA])
def test_products_of_a_library_depend_on_no_neighbours_either(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the emulated device's stand-in for cuBLASLt, in prefills, decodes and graphs."""
    plugin = os.environ.get("FASTSERVE_CUDA_PLUGIN")
    library = ctypes.CDLL(plugin)
    if plugin is None or not hasattr(library, "fastserve_simt_cublaslt_products"):
        pytest.skip("on an emulated device only")
    monkeypatch.setenv("FASTSERVE_CUBLASLT", plugin)
    alone = [job.output for job in _jobs(device, 1, "bfloat16", rows=1)]
    queued = library.fastserve_simt_cublaslt_products()
    assert [job.output for job in _jobs(device, 2, "bfloat16")] == alone
    assert library.fastserve_simt_cublaslt_products() > queued > 0


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(("poison", "message"), [(np.nan, "not a number"), (np.inf, "number|infinite")])
def test_a_model_gone_wrong_fails_the_job_and_no_other(device: str, poison: float, message: str) -> None:
    runtime = NativeRuntime(
        PoisonedModel(llama_spec(), poison), RuntimeConfig(dtype="bfloat16", num_blocks=4, device=device)
    )
    batch = plan(0, [(0, 0, 2, 1), (1, 0, 2, 1)], [5, 0, 5, 6], opened=[(0, 2), (1, 2)], table=[(0, 0, 0), (1, 0, 1)])
    runtime.submit(batch)
    result = runtime.poll()
    assert result is not None and result.tokens[0] == -1 and 0 <= result.tokens[1] < VOCAB
    assert result.errors.keys() == {0}
    assert any(part in result.errors[0] for part in message.split("|"))


@pytest.mark.parametrize("device", [CUDA])
def test_an_iteration_that_is_replayed_may_have_longer_contexts(device: str) -> None:
    """Batches of one size share a graph if their longest contexts are about as long: whatever the others' are."""

    def runtime() -> NativeRuntime:
        config = RuntimeConfig(dtype="bfloat16", num_blocks=90, max_num_batched_tokens=320, device=device)
        return NativeRuntime(SyntheticModel(llama_spec(num_layers=1)), config)

    lengths = [300, 310, 305, 315, 5, 6, 7]
    tables = [[(i, j, 20 * i + j if i < 4 else 80 + i) for j in range(-(-320 // 16) if i < 4 else 1)] for i in range(7)]

    def filled() -> NativeRuntime:
        made = runtime()
        for i, length in enumerate(lengths):
            tokens = [(7 * i + 3 * j) % VOCAB for j in range(length)]
            made.submit(plan(i, [(i, 0, length, 0)], tokens, opened=[(i, length)], table=tables[i]))
            made.poll()
        return made

    def decode(made: NativeRuntime, slots: list[int], step: int = 0) -> list[int]:
        rows = [(i, lengths[i] + (step if i in short else 0), 1, 1) for i in slots]
        made.submit(plan(9, rows, [11 + i for i in slots]))
        result = made.poll()
        assert result is not None
        return list(result.tokens)

    short = [0, 4, 5, 6]  # together
    batched, alone = filled(), filled()
    for step in range(3):  # as it is, recorded, replayed
        decode(batched, short, step)
    assert decode(batched, [1, 2, 3, 5], step=3)[:3] == [decode(alone, [i])[0] for i in (1, 2, 3)]


@pytest.mark.parametrize("device", [CUDA])
def test_a_small_pool_swaps_and_changes_no_token(device: str, tmp_path: Path) -> None:
    """The whole way: pools in the device's own memory, pinned memory beside it, jobs that take turns."""
    save(next(case for case in CASES if case.id == "llama-gqa-tied"), tmp_path)
    prompts = [[(13 * i + j) % 97 for j in range(20 + 3 * i)] for i in range(6)]
    params = [SamplingParams(temperature=0.7, seed=i, max_tokens=24, ignore_eos=True) for i in range(6)]
    outputs = []
    for memory in ("1M", "24K"):
        options: dict[str, Any] = dict(device=device, skip_tokenizer=True, block_size=4, max_num_seqs=3)
        with LLM(tmp_path, kv_cache_memory=memory, swap_space="1M", policy="mlfq", **options) as llm:
            results = llm.generate(prompts, params)
            assert llm.info["kv_cache_bytes"] <= {"1M": 2**20, "24K": 24 * 1024}[memory]
        outputs.append([result.outputs[0].token_ids for result in results])
        preempted = sum(result.metrics.preemptions for result in results)
    assert outputs[0] == outputs[1]
    assert preempted > 0


@pytest.mark.alone
@pytest.mark.parametrize("device", [CUDA])
def test_the_pool_takes_what_the_device_has_left(device: str, tmp_path: Path) -> None:
    save(CASES[0], tmp_path)
    with LLM(tmp_path, device=device, skip_tokenizer=True, max_num_seqs=2, swap_space=0) as llm:
        assert llm.info["kv_cache_bytes"] > 100 * 2**20
    with pytest.raises(InvalidRequest, match=r"kv_cache_memory: must fit in the \d+M that the device has left"):
        LLM(tmp_path, device=device, skip_tokenizer=True, kv_cache_memory="900G")


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    ("option", "size", "message"),
    [
        ("swap_space", "900000G", r"swap_space: must fit in the memory available, \d+M"),
        ("swap_space", "1", "swap_space: must be 0 or hold at least one KV block"),
        ("kv_cache_memory", "some", "kv_cache_memory: must be a size"),
        ("kv_cache_memory", "1", "kv_cache_memory: must hold at least one KV block"),
    ],
)
def test_sizes_are_refused_before_weights_are_loaded(
    device: str, option: str, size: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(CASES[0], tmp_path)
    monkeypatch.setattr("fastserve.placement.NativeRuntime", None)
    with pytest.raises(InvalidRequest, match=message):
        LLM(tmp_path, device=device, skip_tokenizer=True, **{option: size})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device: must be cpu, cuda or one such as cuda:1, got 'gpu'"),
        ({"device": "cuda:x"}, "device: must be cpu, cuda or one such as cuda:1"),
        ({"dtype": "float16"}, "dtype: float16 is for CUDA devices"),
        ({"kv_cache_dtype": "float16"}, "dtype: float16 is for CUDA devices"),
        ({"device": "cuda", "kv_cache_dtype": "int8"}, "kv_cache_dtype: must be auto or the bfloat16 of dtype"),
        ({"device": "cuda", "dtype": "float16", "kv_cache_dtype": "bfloat16"}, "kv_cache_dtype: must be auto or the"),
    ],
)
def test_what_a_device_does_not_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        RuntimeConfig(**options)


@pytest.mark.parametrize("device", [CUDA])
def test_heads_too_wide_are_refused_before_weights_are_loaded(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = dict(hidden_size=8, num_attention_heads=1, num_key_value_heads=1, intermediate_size=56, num_hidden_layers=1)
    save(Case("llama", "wide-heads", dict(shape, head_dim=264, max_position_embeddings=96)), tmp_path)
    monkeypatch.setattr("fastserve.placement.NativeRuntime", None)
    with pytest.raises(ModelError, match=f"{tmp_path}: .* heads of up to 256 dimensions, the model's have 264"):
        LLM(tmp_path, device=device, skip_tokenizer=True)


@pytest.mark.parametrize("device", [CUDA])
def test_engines_of_a_host_take_a_device_each(device: str, tmp_path: Path) -> None:
    pytest.importorskip("msgspec")  # which a machine that is lent for its GPU may lack
    from fastserve.engine_options import EngineOptions
    from fastserve.worker import load

    save(CASES[0], tmp_path)
    options = EngineOptions(model=str(tmp_path), device=device, host_share=2, engine=1, max_num_seqs=2, swap_space=0)
    try:
        assembly = load(options)
    except InvalidRequest as error:
        assert "there is no CUDA device 1 among" in str(error)
    else:
        assert assembly.info["device"] == "cuda:1"
        assembly.placement.close()


@pytest.mark.parametrize("device", [CUDA])
def test_another_device_than_the_first(device: str) -> None:
    """Whichever thread of the process does something for it."""
    try:
        outputs = [job.output for job in _jobs(f"{device}:1", 2)]
    except InvalidRequest as error:
        assert "there is no CUDA device 1 among" in str(error)
        pytest.skip("this machine has one device")
    assert outputs == [job.output for job in _jobs("cpu", 1)]


_ANSWERS = """
import sys
from fastserve import LLM, SamplingParams
params = [SamplingParams(temperature=t, seed=3, max_tokens=6, ignore_eos=True) for t in (0, 0.9)]
options = dict(device="cuda", skip_tokenizer=True, kv_cache_memory="1M", swap_space=0)
with LLM(sys.argv[1], **options) as llm:
    results = llm.generate([[i % 97 for i in range(150)], [5, 6]], params)
print([result.outputs[0].token_ids for result in results])
"""


def _answers(model: Path, capability: str) -> str:
    """In bfloat16, by devices of that compute capability."""
    environment = {**os.environ, "FASTSERVE_SIMT_CAPABILITY": capability, "FASTSERVE_DEBUG": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _ANSWERS, str(model)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ("wgmma) in bfloat16: admitted" in done.stderr) == (capability == "9.0")
    assert ("last one's end: used" in done.stderr) == (capability == "9.0")
    return done.stdout


@pytest.mark.parametrize("device", [CUDA])
def test_older_devices_choose_the_same_tokens(device: str, plugin: ctypes.CDLL, tmp_path: Path) -> None:
    """Without warpgroups and early launches, in the shared memory they have: the widest heads take most of it."""
    shape = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=56)
    save(
        Case("llama", "wide-heads", dict(shape, head_dim=256, num_hidden_layers=1, max_position_embeddings=200)),
        tmp_path,
    )
    newest = _answers(tmp_path, "9.0")
    assert _answers(tmp_path, "8.0") == newest
    assert _answers(tmp_path, "8.6") == newest


@pytest.mark.parametrize("device", [CUDA])
def test_a_device_that_is_too_old_is_refused(device: str, plugin: ctypes.CDLL, tmp_path: Path) -> None:
    save(CASES[0], tmp_path)
    command = [sys.executable, "-m", "fastserve", "generate", "--model", str(tmp_path), "--device", device]
    environment = {**os.environ, "FASTSERVE_SIMT_CAPABILITY": "7.5"}
    done = subprocess.run([*command, "--prompt-token-ids", "1"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "--device: the CUDA backend needs compute capability 8.0 or later; " in done.stderr


@pytest.mark.parametrize("device", [CUDA])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(InvalidRequest, match="device: there is no CUDA device 77 among"):
        NativeRuntime(SyntheticModel(llama_spec()), RuntimeConfig(num_blocks=2, device=f"{device}:77"))


def test_a_build_without_cuda_says_so_in_one_line(tmp_path: Path) -> None:
    save(CASES[0], tmp_path)
    command = [sys.executable, "-m", "fastserve", "generate", "--model", str(tmp_path), "--device", "cuda"]
    command += ["--prompt", "a"]
    environment = {**os.environ, "FASTSERVE_CUDA_PLUGIN": str(tmp_path / "_cuda.so")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "--device: the CUDA backend cannot be used" in done.stderr
