"""The products of build/bench/gemm beside torch's, bfloat16, in turn: medians of GFLOP/s, and of the rounds' ratios.

python benchmarks/gemm_torch.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

BINARY = Path(__file__).parents[1] / "build" / "bench" / "gemm"
SHAPES = {("llama-1b", "down"): (2048, 8192), ("llama-1b", "up"): (16384, 2048), ("smollm2", "up"): (3072, 576)}
ROWS = (512, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="(default: 2)")
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads take numbers from 1 on")
    if not BINARY.is_file():
        parser.error("build/bench/gemm is not there: make build-bench")
    torch.set_num_threads(options.threads)
    rates: dict[tuple[int, int, int], list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for (preset, matrix), (outputs, inputs) in SHAPES.items():
            for rows in ROWS:
                operations = 2e-9 * rows * outputs * inputs
                ours = operations / _ours(preset, matrix, rows, options.threads)
                theirs = operations / _theirs(outputs, inputs, rows)
                rates.setdefault((outputs, inputs, rows), []).append((ours, theirs))
    print("| outputs × inputs | rows | FastServe | torch | ratio |\n|---|---:|---:|---:|---:|")
    for (outputs, inputs, rows), pairs in rates.items():
        ours, theirs = (median(pair[i] for pair in pairs) for i in (0, 1))
        ratio = median(a / b for a, b in pairs)
        print(f"| {outputs:,} × {inputs:,} | {rows:,} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |")


def _ours(preset: str, matrix: str, rows: int, threads: int) -> float:
    """Seconds of a product; `--cold 1` leaves the weights in the cache, as repeating does torch's."""
    with tempfile.NamedTemporaryFile() as file:
        shape = ["--preset", preset, "--matrix", matrix, "--weights", "bfloat16", "--rows", str(rows)]
        command = [BINARY, *shape, "--threads", str(threads), "--repeats", "3", "--cold", "1", "--json", file.name]
        subprocess.run(command, check=True, capture_output=True)
        seconds: float = json.loads(Path(file.name).read_text())["results"][0]["seconds"]
    return seconds


def _theirs(outputs: int, inputs: int, rows: int) -> float:
    """Median seconds of at least three products in about a third of a second."""
    operand, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    torch.nn.functional.linear(operand, weight)
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.3:
        begin = time.perf_counter()
        torch.nn.functional.linear(operand, weight)
        times.append(time.perf_counter() - begin)
    return median(times)


if __name__ == "__main__":
    main()
