"""A user's script, for mpiexec: script.py MODEL TENSOR PIPELINE [another model for rank 1]."""

from __future__ import annotations

import sys

from fastserve import LLM, SamplingParams
from fastserve.distributed import launched

here = launched()
model = sys.argv[4] if len(sys.argv) > 4 and here is not None and here.rank == 1 else sys.argv[1]
llm = LLM(
    model,
    dtype="float32",
    kv_cache_memory="1M",
    swap_space="1M",
    threads=1,
    tensor_parallel_size=int(sys.argv[2]),
    pipeline_parallel_size=int(sys.argv[3]),
)
params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
outputs = llm.generate(["abc", "the quick brown fox", [5, 6, 7, 8]], params)
print([output.outputs[0].token_ids for output in outputs])
