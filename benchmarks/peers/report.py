"""The table of a comparison, made of what was recorded."""

from __future__ import annotations

from statistics import median
from typing import Any

NAMES = {
    "fastserve": "FastServe",
    "vllm": "vLLM",
    "transformers": "transformers",
    "ctranslate2": "CTranslate2",
    "llama-bench": "llama.cpp",
    "llama-server": "llama-server",
}
OURS = "fastserve"
_BUSY = 0.5  # of the cores


def markdown(result: dict[str, Any]) -> str:
    """The result as one Markdown table with a caption."""
    columns = [measure["name"] for measure in result["measures"]]
    lines = [
        f"{result['model']}, {result['threads']} threads: tokens/s, medians of {result['rounds']} rounds in turn; in "
        "brackets FastServe's over the engine's with the same weights, the median of the rounds' ratios.",
        "",
        "| engine | weights | " + " | ".join(columns) + " |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for engine in result["engines"]:
        ours = _ours(result, engine["weights"])
        cells = [_cell(engine["samples"][name], None if ours is None else ours["samples"][name]) for name in columns]
        version = "" if engine["version"] == "unknown" else f" {engine['version']}"
        lines.append(f"| {NAMES[engine['engine']]}{version} | {engine['weights']} | " + " | ".join(cells) + " |")
    load, cores = result["load_average"][0], result["cores"]
    if result["failed"] or load > _BUSY * cores:
        lines.append("")
    if load > _BUSY * cores:
        lines.append(f"Other work kept the machine busy (load {load:.1f} on {cores} cores): figures waver.")
    for failed in result["failed"]:
        lines.append(f"Left out: {NAMES[failed['engine']]} {failed['weights']}: {failed['reason']}")
    return "\n".join(lines) + "\n"


def summary(samples: list[float | None]) -> float | None:
    known = [sample for sample in samples if sample is not None]
    return median(known) if known else None


def ratio(ours: list[float | None], theirs: list[float | None]) -> float | None:
    """The median over rounds of one engine's speed by another's: what slows a round slows both."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return median(pairs) if pairs else None


def _ours(result: dict[str, Any], weights: str) -> dict[str, Any] | None:
    for engine in result["engines"]:
        if engine["engine"] == OURS and engine["weights"] == weights:
            found: dict[str, Any] = engine
            return found
    return None


def _cell(samples: list[float | None], ours: list[float | None] | None) -> str:
    speed = summary(samples)
    if speed is None:
        return "–"
    text = f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}"
    times = None if ours is None or ours is samples else ratio(ours, samples)
    return text if times is None else f"{text} ({times:.2f}×)"
