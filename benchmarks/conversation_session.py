"""Runs of one client against servers in turn, all but the one that is measured being stopped; and the table of them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from peers.processes import PeerError
from peers.servers import Running, Server
from rich.console import Console

from fastserve.bench.serve.prompts import Asking
from fastserve.bench.serve.record import JobRecord
from fastserve.bench.serve.replay import Replay, Replayed, Standing
from fastserve.bench.serve.results import summarize
from fastserve.bench.serve.target import connect
from fastserve.bench.tables import new_table, number
from fastserve.workloads import SimJob

_WARMUP = 2**32 - 1  # where a run's salt has its number

Summary = dict[str, Any]


class Session:
    """The servers that run, and everything that was measured on them."""

    def __init__(self, servers: Sequence[Server], endpoint: str, logs: Path) -> None:
        """Starts them, and warms each up. `logs`: the folder of what they print."""
        self._endpoint = endpoint
        self.running: list[Running] = []
        self.runs: list[Summary] = []
        try:
            for server in servers:
                tell(f"starting {server.name}")
                log = logs / f"{server.engine}-{server.name.replace(' ', '-')}.log"
                self.running.append(Running(server, log))
        except BaseException:
            self.close()
            raise
        for each in self.running:
            warm = [SimJob(0.0, 200, 16)] * 4
            self._replay(each, warm, Asking(endpoint), (_WARMUP,), None)

    def run(
        self,
        running: Running,
        name: str,
        jobs: Sequence[SimJob],
        salt: tuple[int, ...],
        asking: Asking | None = None,
        enough: Callable[[Sequence[JobRecord]], bool] | None = None,
    ) -> Replayed:
        """Send the jobs and remember what came of them; until `enough`, where that is given."""
        asking = asking or Asking(self._endpoint)
        replayed = self._replay(running, jobs, asking, salt, enough)
        summary = summarize(replayed)
        self.runs.append({"server": running.server.name, "run": name, "salt": salt, "summary": summary})
        latency = summary["latency"]
        if latency["jct"] is None:
            raise PeerError(f"{running.server.name} answered nothing: {summary['errors']}")
        text = f"{running.server.name}, {name}: JCT mean {latency['jct']['mean']:.3f}, P95 {latency['jct']['p95']:.3f}"
        text += f"; TTFT {latency['ttft']['mean']:.3f}"
        if summary["later"]["ttft"] is not None:
            text += f", of later calls {summary['later']['ttft']['mean']:.3f}"
        if summary["programs"] is not None:
            text += f"; programs {summary['programs']['mean']:.2f}"
        if summary["cached_share"] is not None:
            text += f"; cached {100 * summary['cached_share']:.0f} %"
        tell(f"{text}; {summary['achieved']['jobs_per_second']:.2f} jobs/s, failed {summary['failed']}")
        if replayed.interrupted and enough is None:
            raise KeyboardInterrupt
        return replayed

    def close(self) -> None:
        for each in self.running:
            each.close()

    def _replay(
        self,
        running: Running,
        jobs: Sequence[SimJob],
        asking: Asking,
        salt: tuple[int, ...],
        enough: Callable[[Sequence[JobRecord]], bool] | None,
    ) -> Replayed:
        async def run() -> Replayed:
            target = await connect(running.server.name, running.url, None, None)
            replay = Replay(target, jobs, asking, salt)

            def look(_: Standing) -> None:
                if enough is not None and enough(replay.records):
                    replay.stop()

            replay.tell = look
            return await replay.run()

        with running.awake():
            return asyncio.run(run())


def print_table(runs: Sequence[Summary], ratios: Sequence[Summary]) -> None:
    """Medians over rounds of every server's runs, and of the ratios."""
    table = new_table()
    for heading in ("", "JCT (s)", "P95", "TTFT (s)", "later calls", "program (s)", "cached", "jobs/s", "failed"):
        table.add_column(heading, justify="right" if heading else "left")
    for server, name in dict.fromkeys((run["server"], run["run"]) for run in runs):
        own = [run["summary"] for run in runs if (run["server"], run["run"]) == (server, name)]
        paths = (
            ("latency", "jct", "mean"), ("latency", "jct", "p95"), ("latency", "ttft", "mean"),
            ("later", "ttft", "mean"), ("programs", "mean"), ("cached_share",), ("achieved", "jobs_per_second"),
        )  # fmt: skip
        cells = [_median(own, path) for path in paths]
        failed = str(sum(summary["failed"] for summary in own))
        table.add_row(f"{server}, {name}", *("–" if cell is None else number(cell) for cell in cells), failed)
    console = Console(highlight=False, width=140)
    console.print(table)
    for key in ratios[0] if ratios else ():
        values = [each[key] for each in ratios]
        console.print(f"{key}: {median(values):.3f} ({min(values):.3f} – {max(values):.3f})")


def _median(summaries: Sequence[Summary], path: tuple[str, ...]) -> float | None:
    found = []
    for value in summaries:
        inner: Any = value
        for name in path:
            inner = inner[name] if inner is not None else None
        if inner is not None:
            found.append(float(inner))
    return median(found) if found else None


def tell(line: str) -> None:
    """On standard error, where it does not mix with the table."""
    print(line, file=sys.stderr, flush=True)
