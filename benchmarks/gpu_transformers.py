"""Decoding on a GPU: FastServe's engine beside `transformers`, eager, captured in a CUDA graph and compiled.

    python benchmarks/gpu_transformers.py [--preset llama-8b] [--batch 1,32] [--json decode.json]

One process, one model's shape in bfloat16, random weights, prompts of --prompt tokens, then --steps tokens each;
medians of --repeats, in tokens a second of the whole batch. FastServe's figure is that of the whole engine;
`transformers` has sdpa attention, a cache that grows when eager and a static one else, and nothing but the forward pass
and an argmax in its loop. The compiled one takes minutes to compile: --rivals eager,graph leaves it out. A rival that
cannot run here is reported with its reason, and has no figure.

For FastServe at the batches of --idle, also the share of a decode iteration in which the device runs no kernel, by its
own clock. Without a GPU it says so and exits with 0; --device cpu is for a look at the script itself.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from gpu_models import SHAPES, RandomLlama

RIVALS = ("eager", "graph", "compiled")
WARM_UP = 8  # steps before the first that counts
CHUNK = 2048
BLOCK_SIZE = 16

Figures = dict[str, float | str | None]


class FastServe:
    """The engine over a runtime of its own; every call decodes a batch from its prompts on."""

    def __init__(self, options: argparse.Namespace, most: int) -> None:
        from fastserve.config import RuntimeConfig, SchedulerConfig
        from fastserve.cost import CostModel
        from fastserve.native import NativeRuntime

        source = RandomLlama(options.preset)
        length = options.prompt + options.steps + WARM_UP + 1
        blocks = most * -(-length // BLOCK_SIZE)
        self._vocab = source.spec.vocab_size
        self._options = options
        tokens = max(CHUNK, most)
        self._config = SchedulerConfig(
            policy="fcfs",
            max_num_seqs=most,
            max_num_batched_tokens=tokens,
            max_model_len=length,
            block_size=BLOCK_SIZE,
            num_blocks=blocks,
            max_in_flight=2,
        )
        self._cost = CostModel.constant(0.01)  # which first come, first served does not look at
        self._runtime = NativeRuntime(
            source,
            RuntimeConfig(
                device=options.device,
                dtype="bfloat16",
                block_size=BLOCK_SIZE,
                num_blocks=blocks,
                max_num_batched_tokens=tokens,
            ),
        )

    def decode(self, batch: int, device: str | None = None) -> tuple[float, float | None]:
        """Tokens a second, and if `device` is given, the percentage of an iteration in which it ran no kernel."""
        from fastserve import _C, SamplingParams
        from fastserve.engine import Engine, IterationRecord

        stamps: list[float] = []

        def note(record: IterationRecord) -> None:
            if record.decode_tokens == batch:
                stamps.append(time.perf_counter())

        config = replace(self._config, max_num_seqs=batch)
        engine = Engine(config, self._runtime, self._cost, on_iteration=note)
        if device is not None:
            _C.time_batches(device, 4096)
        steps = self._options.steps + WARM_UP
        for i, prompt in enumerate(prompts(batch, self._options.prompt, self._vocab)):
            params = SamplingParams(max_tokens=steps + 1, temperature=0, ignore_eos=True)
            engine.add_job(str(i), prompt, params, seed=0, vocab_size=self._vocab)
        while engine.has_work:
            engine.step(1.0)
        idle = None
        if device is not None:
            spans = _C.take_batch_times(device)[-self._options.steps :]
            between = sum(after[0] - before[1] for before, after in pairwise(spans))
            idle = 100 * between / (spans[-1][0] - spans[0][0])
        counted = stamps[WARM_UP:]
        return batch * (len(counted) - 1) / (counted[-1] - counted[0]), idle


class Transformers:
    """A LlamaForCausalLM of the same shape."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        self.version = transformers.__version__
        self._options = options
        self._static: Any = transformers.StaticCache
        self._dynamic: Any = transformers.DynamicCache
        config = transformers.LlamaConfig(
            **SHAPES[options.preset].config, attn_implementation="sdpa", bos_token_id=1, eos_token_id=2
        )
        torch = self._torch
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(options.rivals_device):
                self._model = transformers.LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
        # Later versions of the library call it otherwise.
        known = inspect.signature(transformers.models.llama.modeling_llama.LlamaModel.forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"
        self._takes_positions = "cache_position" in known

    def decode(self, rival: str, batch: int) -> float:
        """Tokens a second."""
        with self._torch.inference_mode():
            step = {"eager": self._eager, "graph": self._graph, "compiled": self._compiled}[rival](batch)
            for _ in range(WARM_UP):
                step()
            self._wait()
            begin = time.perf_counter()
            for _ in range(self._options.steps):
                step()
            self._wait()
            seconds = time.perf_counter() - begin
        tokens: int = batch * self._options.steps
        return tokens / seconds

    def _wait(self) -> None:
        if self._options.rivals_device != "cpu":
            self._torch.cuda.synchronize()

    def _prefilled(self, batch: int, cache: Any) -> tuple[Any, Any]:
        """The prompts' next tokens [batch, 1], and their position [1]."""
        torch, options = self._torch, self._options
        ids = torch.tensor(
            prompts(batch, options.prompt, SHAPES[options.preset].vocab_size), device=options.rivals_device
        )
        positions = torch.arange(options.prompt, device=options.rivals_device)
        logits = self._forward(self._model, ids, positions, cache)
        return logits[:, -1].argmax(-1, keepdim=True), positions[-1:] + 1

    def _forward(self, model: Any, ids: Any, positions: Any, cache: Any) -> Any:
        more = {"cache_position": positions} if self._takes_positions else {}
        named = {self._cache_name: cache, "position_ids": positions[None], **more}
        return model(input_ids=ids, use_cache=True, logits_to_keep=1, **named).logits

    def _eager(self, batch: int) -> Callable[[], None]:
        cache = self._dynamic()
        ids, position = self._prefilled(batch, cache)

        def step() -> None:
            ids.copy_(self._forward(self._model, ids, position, cache)[:, -1].argmax(-1, keepdim=True))
            position.add_(1)

        return step

    def _static_step(self, batch: int, model: Any) -> Callable[[], None]:
        options = self._options
        room = options.prompt + options.steps + 2 * WARM_UP + 8
        cache = self._static(config=self._model.config, max_cache_len=room)
        ids, position = self._prefilled(batch, cache)

        def step() -> None:
            ids.copy_(self._forward(model, ids, position, cache)[:, -1].argmax(-1, keepdim=True))
            position.add_(1)

        return step

    def _graph(self, batch: int) -> Callable[[], None]:
        torch = self._torch
        step = self._static_step(batch, self._model)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay: Callable[[], None] = graph.replay
        return replay

    def _compiled(self, batch: int) -> Callable[[], None]:
        torch = self._torch
        mode = "default" if self._options.rivals_device == "cpu" else "reduce-overhead"
        if not hasattr(self, "_optimized"):
            self._optimized = torch.compile(self._model, mode=mode, dynamic=False)
        return self._static_step(batch, self._optimized)

    def gemm_rate(self, size: int) -> float:
        """Operations a second of a square product, as torch computes it."""
        torch = self._torch
        a, b = (torch.randn(size, size, device=self._options.rivals_device, dtype=torch.bfloat16) for _ in range(2))
        count = 10
        for _ in range(3):
            torch.mm(a, b)
        self._wait()
        begin = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b)
        self._wait()
        return 2 * count * size**3 / (time.perf_counter() - begin)


def prompts(batch: int, length: int, vocab_size: int) -> list[list[int]]:
    return [[(7919 * i + 104729 * j + 13) % vocab_size for j in range(length)] for i in range(batch)]


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"benchmark": "gpu_transformers", "preset": options.preset, "tokens_per_second": {}}
    rates: dict[int, Figures] = {batch: {} for batch in options.batch}

    def save() -> None:
        result["tokens_per_second"] = {str(batch): rates[batch] for batch in rates}
        if options.json is not None:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    engine: FastServe | None = FastServe(options, max(options.batch + options.idle))
    assert engine is not None
    for batch in options.batch:
        runs = [engine.decode(batch)[0] for _ in range(options.repeats + 1)][1:]
        rates[batch]["fastserve"] = median(runs)
        print(f"batch {batch:3}  FastServe     {median(runs):10.1f} tokens/s", flush=True)
    result["idle_percent"] = {}
    for batch in options.idle if options.device != "cpu" else []:
        shares = [engine.decode(batch, options.device)[1] or 0.0 for _ in range(options.repeats + 1)][1:]
        result["idle_percent"][str(batch)] = median(shares)
        print(f"batch {batch:3}  no kernel runs for {median(shares):.2f} % of an iteration", flush=True)
    save()
    engine = None
    gc.collect()
    rivals = Transformers(options)
    result["transformers"] = rivals.version
    if options.rivals_device != "cpu":
        result["torch_gemm_gflop_s"] = median(rivals.gemm_rate(options.gemm) for _ in range(options.repeats)) / 1e9
    for rival in options.rivals:
        for batch in options.batch:
            try:
                runs = [rivals.decode(rival, batch) for _ in range(options.repeats)]
            except Exception as error:  # of two libraries in versions we have not seen: told, and the others go on
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                rates[batch][rival], rates[batch][f"{rival}_error"] = None, reason
                print(f"batch {batch:3}  {rival:13} {reason}", flush=True)
            else:
                rate = median(runs)
                rates[batch][rival] = rate
                ours = rates[batch].get("fastserve")
                ratio = f", FastServe {ours / rate:.2f} ×" if isinstance(ours, float) else ""
                print(f"batch {batch:3}  {rival:13} {rate:10.1f} tokens/s{ratio}", flush=True)
            save()
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""

    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="llama-8b", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--rivals-device", help="(default: as --device)")
    parser.add_argument("--batch", type=integers, default=[1, 32], help="(default: 1,32)")
    parser.add_argument("--idle", type=integers, default=[64], help="(default: 64)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("--steps", type=int, default=128, help="tokens that count (default: 128)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: 3)")
    parser.add_argument("--gemm", type=int, default=8192, help="size of torch's matrix product (default: 8192)")
    parser.add_argument("--rivals", type=lambda text: text.split(","), default=list(RIVALS), help="(default: all)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args(arguments)
    if unknown := [rival for rival in options.rivals if rival not in RIVALS]:
        parser.error(f"--rivals takes {', '.join(RIVALS)}, got {unknown[0]!r}")
    options.rivals_device = options.rivals_device or options.device
    if options.rivals_device != "cpu":
        try:
            there = importlib.import_module("torch").cuda.is_available()
        except ImportError:
            there = False
        if not there:
            print("skipped: torch sees no CUDA device")
            return 0
    measure_all(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
