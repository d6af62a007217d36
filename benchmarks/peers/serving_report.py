"""The tables of serve_peers.py, made of what it recorded."""

from __future__ import annotations

from statistics import median
from typing import Any, Final

# Path in a run's summary, label, factor to the label's unit.
_COLUMNS: Final = (
    (("achieved", "jobs_per_second"), "jobs/s", 1.0),
    (("achieved", "output_tokens_per_second"), "tokens/s", 1.0),
    (("latency", "jct", "mean"), "JCT mean", 1.0),
    (("latency", "jct", "p95"), "P95", 1.0),
    (("latency", "jct", "p99"), "P99", 1.0),
    (("short", "jct", "mean"), "≤ 64 tokens", 1.0),
    (("latency", "ttft", "mean"), "TTFT mean", 1.0),
    (("latency", "ttft", "p95"), "P95", 1.0),
    (("latency", "normalized_latency", "mean"), "ms/token", 1e3),
)
_HIGHER: Final = ("jobs/s", "tokens/s")


def markdown(result: dict[str, Any]) -> str:
    """A table for each load, a line a server."""
    base = _base(result)
    rounds = "one run each" if result["rounds"] == 1 else f"medians of {result['rounds']} rounds in turn"
    text = [
        f"{result['model']}, {result['trace']}, {result['slots']} slots, {result['threads']} threads, {rounds}; "
        f"seconds. In brackets how many times better than {base}"
        + (", the best peer at that load" if result["peers"] else "")
        + f". The capacity is {result['capacity'] or 0:.3f} jobs a second."
    ]
    fractions = list(dict.fromkeys(run["fraction"] for run in result["runs"]))
    for fraction in fractions:
        title = "All jobs at once" if fraction is None else f"{100 * fraction:g} % of the capacity"
        runs = [run for run in result["runs"] if run["fraction"] == fraction]
        text += ["", f"**{title}**", "", *_table(runs, result["peers"], base)]
    return "\n".join(text) + "\n"


def _table(runs: list[dict[str, Any]], peers: list[str], base: str) -> list[str]:
    lines = ["| | " + " | ".join(label for _, label, _ in _COLUMNS) + " |", "|---|" + "---:|" * len(_COLUMNS)]
    servers = list(dict.fromkeys(run["server"] for run in runs))
    values = {
        server: [_median([run for run in runs if run["server"] == server], path) for path, _, _ in _COLUMNS]
        for server in servers
    }
    rivals = [server for server in servers if server in peers or server == base]
    for server in servers:
        cells = []
        for place, (value, (_, label, scale)) in enumerate(zip(values[server], _COLUMNS, strict=True)):
            rival = [each for name in rivals if (each := values[name][place]) is not None]
            cell = "–" if value is None else _three_digits(scale * value)
            if value and rival and server not in rivals:
                higher = label in _HIGHER
                better = value / max(rival) if higher else min(rival) / value
                cell += f" ({better:.2f})"
            cells.append(cell)
        failed = sum(run["summary"]["failed"] for run in runs if run["server"] == server)
        name = server if not failed else f"{server}, {failed} failed"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _base(result: dict[str, Any]) -> str:
    return " or ".join(result["peers"]) if result["peers"] else str(result["servers"][0]["name"])


def _median(runs: list[dict[str, Any]], path: tuple[str, ...]) -> float | None:
    found = []
    for run in runs:
        value: Any = run["summary"]
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            found.append(float(value))
    return median(found) if found else None
