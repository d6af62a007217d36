"""A model over several ranks that compute on CUDA devices. What they send each other crosses the host, or goes by NCCL:
the emulated devices' stand-in for it, which is in their plugin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from deaths import check_others_name, started
from machines import CUDA
from models import CASES, save

from fastserve import LLM, SamplingParams

PROMPTS = [[3, 5, 7, 9, 11] * 4, [1, 2, 3]]
THROUGH_HOST = "exchanges with others through the host's memory"
EMULATED = Path(os.environ.get("FASTSERVE_CUDA_PLUGIN", "/nowhere"))
WAYS = ["host", "nccl", "nccl graphs"]


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How ranks exchange from here on."""
    way: str = request.param
    if way.startswith("nccl") and not EMULATED.exists():
        pytest.skip("GPUs' own NCCL takes a GPU for each rank")
    monkeypatch.setenv("FASTSERVE_NCCL", "0" if way == "host" else str(EMULATED))
    monkeypatch.setenv("FASTSERVE_NCCL_GRAPHS", "1" if way == "nccl graphs" else "0")
    monkeypatch.setenv("FASTSERVE_DEBUG", "1")
    return way


def _tokens(path: Path, **options: Any) -> list[list[int]]:
    params = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=5, repetition_penalty=1.2, max_tokens=12, ignore_eos=True),
    ]
    with LLM(path, dtype="float32", skip_tokenizer=True, kv_cache_memory="1M", swap_space="1M", **options) as llm:
        return [list(result.outputs[0].token_ids) for result in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(
    ("way", "tensor", "pipeline"),
    [(way, *layout) for way in WAYS for layout in [(2, 1), (1, 2), (2, 2)] if way != "nccl graphs" or layout == (2, 1)],
    indirect=["way"],
)
def test_tokens_are_those_of_one_cpu(
    device: str, way: str, tensor: int, pipeline: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for library in ("msgspec", "zmq"):  # of the engine's process: a machine that is lent for its GPU may lack them
        pytest.importorskip(library)
    save(next(case for case in CASES if case.id == "llama-gqa-tied"), tmp_path)
    layout = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    assert _tokens(tmp_path, device=f"{device}:0", **layout) == _tokens(tmp_path)
    assert (THROUGH_HOST in capfd.readouterr().err) == (way == "host")


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("way", ["host", "nccl"], indirect=True)
@pytest.mark.parametrize(
    ("layout", "killed", "doing"),
    [
        ((2, 1), 1, ["waits for it", "comes"]),  # joins
        ((2, 1), 1, ["leads", "loads"]),  # the other's device waits for its share of a sum,
        ((1, 2), 1, ["leads", "loads"]),  # to be rid of what it sends,
        ((1, 2), 0, ["tells a plan", "follows"]),  # or for what it is to receive
    ],
    ids=str,
)
def test_all_others_name_a_killed_rank(
    device: str, way: str, layout: tuple[int, int], killed: int, doing: list[str]
) -> None:
    check_others_name(killed, layout, [f"{device} {each}" for each in doing])


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("way", ["nccl"], indirect=True)
@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize(
    ("environments", "reason"),
    [
        ({0: {"FASTSERVE_NCCL": "/nowhere/libnccl.so.2"}}, "there is no /nowhere/libnccl.so.2"),
        ({1: {"FASTSERVE_NCCL": "/nowhere/libnccl.so.2"}}, "there is no /nowhere/libnccl.so.2"),
        ({0: {"FASTSERVE_SIMT_DEVICE": "1"}, 1: {"FASTSERVE_SIMT_DEVICE": "1"}}, "ranks share a device"),
    ],
    ids=["first lacks it", "second lacks it", "one device"],
)
def test_none_uses_nccl_unless_all_can(
    device: str, way: str, layout: tuple[int, int], environments: dict[int, dict[str, str]], reason: str
) -> None:
    with started(layout, [f"{device} leads", f"{device} follows"], environments) as processes:
        told = [process.communicate(timeout=60)[1] for process in processes]
        assert processes[0].returncode == 0, told[0]
        assert all(THROUGH_HOST in each for each in told), told
        assert all(reason in told[rank] for rank in environments), told
