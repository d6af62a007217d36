"""What loading a model may take: the weights as they are held, the KV pool, and 250 MB for everything else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LOAD_AND_RUN = """
import json, resource, sys
from fastserve import LLM, SamplingParams

llm = LLM("smollm2", dtype=sys.argv[1], kv_cache_memory="64M")
llm.generate(list(range(300)), SamplingParams(max_tokens=4, temperature=0))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
foreign = sorted(name for name in ("torch", "transformers", "gguf", "accelerate") if name in sys.modules)
print(json.dumps({"peak": peak, "foreign": foreign, **llm.info}))
"""


@pytest.mark.parametrize(("dtype", "element"), [("bfloat16", 2), ("float32", 4)])
def test_peak_memory_of_loading_and_running(dtype: str, element: int) -> None:
    run = subprocess.run([sys.executable, "-c", LOAD_AND_RUN, dtype], capture_output=True, text=True, check=True)
    told = json.loads(run.stdout)
    weights = 134_515_008 * element
    assert told["kv_cache_bytes"] <= 64 * 2**20
    assert told["peak"] <= weights + told["kv_cache_bytes"] + 250e6
    assert told["foreign"] == [], "the serving path stays light"
