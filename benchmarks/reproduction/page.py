"""docs/results/README.md and its figures, made of the data alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from .common import Missing
from .lab import Data

_HEAD = """# Results

Everything here is made by one command, `python benchmarks/paper.py`: simulated runs of FastServe's real engine and
scheduler in virtual time, on modelled devices (`fastserve/presets.py` states what is assumed of them). The numbers
are kept in [`data/`](data), and this page and its figures are rendered from them (`--render` does only that). `--only
NAME` runs one experiment and keeps the others; finished runs are not repeated; `--fresh` forgets them first.
[real.md](real.md) and [cpu.md](cpu.md) have what was measured on a real machine instead: memory pressure, the
simulator's error, decisions; the CPU runtime beside other engines.

Numbers are means over seeds ± the half width of the 95 % confidence interval (Student's t); × is how many times
better, as the mean over seeds of the ratio on the same jobs. The paper's numbers are of real A100s and real lengths,
ours of modelled ones: ratios compare, seconds hardly do.

"""


def render(experiments: Mapping[str, ModuleType], folder: Path) -> Path:
    """Draw and write what there is data for; an experiment without data is named."""
    parts = [_HEAD]
    for name, module in experiments.items():
        parts.append(f"- [{module.TITLE}](#{_anchor(module.TITLE)}): `python benchmarks/paper.py --only {name}`\n")
    for name, module in experiments.items():
        data = Data.load(data_path(folder, name))
        parts.append(f"\n## {module.TITLE}\n\n")
        if not data.points:
            parts.append(f"Not run yet: `python benchmarks/paper.py --only {name}`.\n")
            continue
        if data.quick:
            parts.append("*A quick run, with few jobs: it shows that everything works, and little else.*\n\n")
        for part in (module.draw, module.section):
            try:
                parts.append((part(data, folder) if part is module.draw else part(data)) or "")
            except Missing as missing:
                more = f"`python benchmarks/paper.py --only {name}`"
                parts.append(f"*Not complete: there is no run of {missing}; {more} goes on.*\n\n")
    page = folder / "README.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("".join(parts), encoding="utf-8")
    return page


def data_path(folder: Path, name: str) -> Path:
    return folder / "data" / f"{name}.json"


def _anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")
