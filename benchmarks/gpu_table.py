"""The last word of scripts/gpu_check.sh: what was measured, beside what issue 7 asks for.

    python benchmarks/gpu_table.py --parts FOLDER --out FOLDER [--emulated]

Reads the JSON of the C++ benchmarks in --parts and gathers it in bench.json of --out, where transformers.json,
compiled.json (the same of a rival that takes long) and jct.json are. A figure that is not there is open, and says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = ("decode", "prefill", "swap", "gemm", "attention")


@dataclass(frozen=True)
class Point:
    """Something that must be shown. `limit` is a bound from below unless `at_most`."""

    number: int  # of the issue's; 0: not asked for there
    what: str
    read: Callable[[dict[str, Any]], float | None]
    limit: float
    unit: str = "%"
    at_most: bool = False

    def row(self, results: dict[str, Any], emulated: bool) -> tuple[str, str, str, str, str]:
        try:
            value = self.read(results)
        except (
            KeyError,
            IndexError,
            StopIteration,
            TypeError,
            ValueError,
            ZeroDivisionError,
        ):  # that step has not come so far
            value = None
        sign = "≤" if self.at_most else "≥"
        bound = f"{sign} {self.limit:g} {self.unit}".rstrip()
        if value is None:
            return str(self.number or ""), self.what, "–", bound, "open"
        met = value <= self.limit if self.at_most else value >= self.limit
        verdict = "emulated" if emulated else "ok" if met else "short"
        return str(self.number or ""), self.what, f"{value:.4g} {self.unit}".rstrip(), bound, verdict


def _row(results: dict[str, Any], benchmark: str, **wanted: Any) -> dict[str, Any]:
    found: dict[str, Any] = next(
        row
        for row in results[benchmark]["results"]
        if row.get("weights", "bfloat16") == "bfloat16" and all(row[key] == value for key, value in wanted.items())
    )
    return found


def _decode(rows: int, key: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda results: _row(results, "decode", rows=rows)[key]


def _prefill(tokens: int) -> Callable[[dict[str, Any]], float | None]:
    """Of the faster of the two libraries' products: what the benchmark measured beside it, and torch's."""

    def read(results: dict[str, Any]) -> float | None:
        row = _row(results, "prefill", tokens=tokens)
        beside: float = results["prefill"]["limit_bfloat16_gflop_s"]
        torch = results.get("transformers", {}).get("torch_gemm_gflop_s") or 0.0
        share: float = row["compute_percent"]
        return min(share, 100 * row["gflop_s"] / torch) if torch > beside else share

    return read


MATRICES = ("qkv", "out", "up", "down")  # the head has few rows


def _way(way: str) -> Callable[[dict[str, Any]], float | None]:
    """Of the time that the library's products of 2,048 rows by all matrices take, the share of that by another way."""

    def read(results: dict[str, Any]) -> float | None:
        rows = [_row(results, "gemm", matrix=matrix, rows=2048) for matrix in MATRICES]
        ours, theirs = (
            sum(float(row["n"] * row["k"] / row[f"{key}_gflop_s"]) for row in rows) for key in (way, "library")
        )
        return 100 * theirs / ours

    return read


def _ratio(batch: int, rivals: Sequence[str]) -> Callable[[dict[str, Any]], float | None]:
    """Over the best of the rivals, each beside what FastServe did in its run."""

    def read(results: dict[str, Any]) -> float | None:
        ratios: list[float] = []
        for run in ("transformers", "compiled"):
            rates = results.get(run, {}).get("tokens_per_second", {}).get(str(batch), {})
            ratios += [rates["fastserve"] / rates[rival] for rival in rivals if rates.get(rival)]
        return min(ratios)

    return read


def _swap(direction: str) -> Callable[[dict[str, Any]], float | None]:
    """Of large copies."""
    return lambda results: max(
        row["memcpy_percent"]
        for row in results["swap"]["results"]
        if row["direction"] == direction and row["blocks"] == "together"
    )


def _succeeded(step: str, name: str) -> Callable[[dict[str, Any]], float | None]:
    """1 where it did, 0 where it failed; nothing where it could not be started or ran out of time."""

    def read(results: dict[str, Any]) -> float | None:
        status = results[step][name]
        return None if status in ("124", "127", "out-of-time") else float(status == "0")

    return read


def _clean(tool: str) -> Callable[[dict[str, Any]], float | None]:
    """1 where compute-sanitizer has run all of its tests and found nothing, 0 where it has found something.

    Nothing where it came to no summary, since it refused the device or had no time, or where a test failed by itself.
    """

    def read(results: dict[str, Any]) -> float | None:
        found, status = results["sanitizer"][tool]
        if found.isdecimal() and int(found) > 0:
            return 0.0
        return 1.0 if found == "0" and status == "0" else None

    return read


def _all_right(results: dict[str, Any]) -> float | None:
    jct = results["jct"]
    wrong = [run["different"] + run["unfinished"] for run in jct["runs"].values()]
    wrong += [found["different"] for found in jct["sustained"].values()]
    return float(sum(wrong)) if len(jct["runs"]) == 4 else None


def _proactive(results: dict[str, Any]) -> float | None:
    """Of rates that both were seen to miss the limit above: else the trace was too short to tell."""
    found = results["jct"]["sustained"]
    if any(found[mode]["missed_at"] is None for mode in ("proactive", "reactive")):
        return None
    ratio: float = found["proactive"]["rate"] / found["reactive"]["rate"]
    return ratio


def _mean_jct(policy: str) -> Callable[[dict[str, Any]], float | None]:
    def read(results: dict[str, Any]) -> float | None:
        runs = results["jct"]["runs"]
        ratio: float = runs["fcfs, proactive"]["mean_jct"] / runs[f"{policy}, proactive"]["mean_jct"]
        return ratio

    return read


POINTS = (
    Point(1, "tests pass on the device (1: all)", _succeeded("steps", "tests"), 1, ""),
    Point(1, "memcheck finds nothing (1: so)", _clean("memcheck"), 1, ""),
    Point(1, "racecheck finds nothing (1: so)", _clean("racecheck"), 1, ""),
    Point(2, "decode, batch 1, of copy bandwidth", _decode(1, "read_percent"), 85),
    Point(2, "decode, batch 64, of copy bandwidth", _decode(64, "read_percent"), 75),
    Point(2, "prefill of 2,048 tokens, of the GEMM rate", _prefill(2048), 65),
    Point(0, "products of 2,048 rows: mma.sync, of cuBLASLt", _way("mma"), 43),
    Point(0, "products of 2,048 rows: wgmma, of cuBLASLt", _way("wgmma"), 65),
    Point(2, "batch 1 over transformers eager", _ratio(1, ["eager"]), 2, "×"),
    Point(2, "batch 32 over transformers eager", _ratio(32, ["eager"]), 2, "×"),
    Point(2, "batch 1 over transformers captured or compiled", _ratio(1, ["graph", "compiled"]), 1.1, "×"),
    Point(2, "batch 32 over transformers captured or compiled", _ratio(32, ["graph", "compiled"]), 1.1, "×"),
    Point(3, "KV out, of pinned bandwidth", _swap("offload"), 85),
    Point(3, "KV in, of pinned bandwidth", _swap("upload"), 85),
    Point(3, "a decode iteration slower beside both", lambda r: r["swap"]["decode_slower_percent"], 6, "%", True),
    Point(4, "GPU idle, runtime, batch 64", _decode(64, "idle_percent"), 3, "%", True),
    Point(4, "GPU idle, engine, batch 64", lambda r: r["transformers"]["idle_percent"]["64"], 3, "%", True),
    Point(5, "jobs lost or with other tokens, a quarter of the KV", _all_right, 0, "", True),
    Point(5, "proactive over reactive at the paper's SLO", _proactive, 1.6, "×"),
    Point(0, "mean JCT, fcfs over skip-join-mlfq", _mean_jct("skip-join-mlfq"), 1, "×"),
    Point(0, "mean JCT, fcfs over gittins", _mean_jct("gittins"), 1, "×"),
)


def ways(results: dict[str, Any]) -> list[str]:
    """Lines on every way to compute products of many rows, as far as they were measured."""
    gemm = results.get("gemm", {})
    lines = [f"products by warpgroups (wgmma): {gemm['wgmma']}"] if "wgmma" in gemm else []
    for row in gemm.get("results", []):
        rates = [f"{name} {_tflops(row.get(f'{name}_gflop_s'))}" for name in ("mma", "wgmma", "library")]
        if row.get("taken"):
            lines.append(f"{row['matrix']}, {row['rows']} rows: {', '.join(rates)} TFLOP/s; taken: {row['taken']}")
    return lines


def _tflops(gflops: float | None) -> str:
    return "–" if gflops is None else f"{gflops / 1e3:.0f}"


def read_results(parts: Path, out: Path) -> dict[str, Any]:
    """Everything that is there, by benchmark; `steps` are exit statuses, `sanitizer` what was found and one."""
    results: dict[str, Any] = {}
    for name in BENCHMARKS:
        if text := _text(parts / f"{name}.json"):
            results[name] = json.loads(text)
    (out / "bench.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name in ("transformers", "compiled", "jct"):
        if text := _text(out / f"{name}.json"):
            results[name] = json.loads(text)
    results["steps"] = dict(line.split()[:2] for line in _text(parts / "steps").splitlines())
    lines = [line.split() for line in _text(parts / "sanitizer").splitlines()]
    results["sanitizer"] = {tool: (found, status) for tool, found, status in lines}
    return results


def _text(path: Path) -> str:
    """Nothing of a file that is not there; benchmarks open theirs before they have anything to write."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--parts", type=Path, required=True, help="the folder of the benchmarks' JSON")
    parser.add_argument("--out", type=Path, required=True, help="the folder of results")
    parser.add_argument("--emulated", action="store_true", help="the figures are none of a GPU")
    options = parser.parse_args(arguments)
    results = read_results(options.parts, options.out)
    rows = [("", "what", "figure", "limit", ""), *(point.row(results, options.emulated) for point in POINTS)]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    if options.emulated:
        print("EMULATED: these figures are of an emulated device at toy sizes and mean nothing")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for line in ways(results):
        print(line)
    late = [f"{name} ({status})" for name, status in results["steps"].items() if status != "0"]
    if late:
        print(f"steps that did not end well: {', '.join(late)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
