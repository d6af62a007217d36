"""How long iterations take on this machine: a linear model, fitted to measurements, kept as JSON.

An iteration is modelled as a sum of work that is always positive:

    seconds = per_iteration + per_row · rows + per_token · tokens + per_read · reads + per_pair · pairs

over rows (start, tokens). `reads` counts the KV positions a row loads (start + tokens), `pairs` the query-key pairs its
attention computes. The constant is what reading the weights costs; it is why batching pays and why one long prefill
costs many decodes, the fact that skip-join MLFQ is built on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .types import InvalidRequest

Rows = Sequence[tuple[int, int]]  # (position of the first token, tokens) of each row of an iteration
Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


class Cost(Protocol):
    """Modelled seconds, as schedulers and simulators ask for them. CostModel is fitted to measurements.

    The charges of a prompt's chunks add up to its prefill in one iteration, and every duration is above 0.
    """

    def prefill_seconds(self, start: int, tokens: int) -> float:
        """Solo time of computing positions start … start + tokens - 1 in one iteration; 0 for no tokens."""

    def prefill_charge(self, start: int, end: int) -> float:
        """What positions start … end - 1 add to the solo time of a prefill of which start are charged."""

    def decode_seconds(self, context: int) -> float:
        """Solo time of one token that attends to `context` positions, its own included."""

    def decode_each(self, contexts: Ints) -> Floats:
        """decode_seconds of each context."""

    def plan_seconds(self, starts: Ints, tokens: Ints) -> float:
        """Time of one iteration of rows (starts[i], tokens[i]), which share the reading of the weights."""


def shared_seconds(cost: Cost, batch: int) -> float:
    """Of a token's solo time, what the others pay in a full batch: their part of what an iteration costs empty."""
    starts, tokens = np.zeros(2, np.int32), np.ones(2, np.int32)
    added = cost.plan_seconds(starts, tokens) - cost.plan_seconds(starts[:1], tokens[:1])
    return max(0.0, cost.decode_seconds(1) - added) * (1 - 1 / batch)


def quantum_of(cost: Cost, batch: int) -> float:
    """What is charged for a token in a full batch: the rest of its solo time."""
    return cost.decode_seconds(1) - shared_seconds(cost, batch)


def stage_cost(cost: Cost, stages: int) -> Cost:
    """What iterations take of one pipeline stage, where `cost` says how long they take through all `stages`.

    Every stage has an equal part of the layers, and a batch of its own: what a job takes from the others is its time in
    a stage, not its way through the pipeline, in which `stages` iterations end.
    """
    return cost if stages == 1 else _StageCost(cost, 1 / stages)


@dataclass(frozen=True)
class _StageCost:
    """Satisfies Cost: a share of another's."""

    whole: Cost
    share: float

    def prefill_seconds(self, start: int, tokens: int) -> float:
        return self.share * self.whole.prefill_seconds(start, tokens)

    def prefill_charge(self, start: int, end: int) -> float:
        return self.share * self.whole.prefill_charge(start, end)

    def decode_seconds(self, context: int) -> float:
        return self.share * self.whole.decode_seconds(context)

    def decode_each(self, contexts: Ints) -> Floats:
        return self.share * self.whole.decode_each(contexts)

    def plan_seconds(self, starts: Ints, tokens: Ints) -> float:
        return self.share * self.whole.plan_seconds(starts, tokens)


@dataclass(frozen=True, kw_only=True)
class Link:
    """How fast KV blocks move between device and host: seconds a block each way, and seconds a copy before its first.

    Raises InvalidRequest when one is negative or not finite.
    """

    offload_block: float
    upload_block: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        for name in ("offload_block", "upload_block", "latency"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidRequest("link", f"{name} must be a finite number of at least 0")

    def offload_seconds(self, blocks: int) -> float:
        return self.latency + self.offload_block * blocks

    def upload_seconds(self, blocks: int) -> float:
        return self.latency + self.upload_block * blocks


_FORMAT = "fastserve-cost-1"
_COEFFICIENTS = ("per_iteration", "per_row", "per_token", "per_read", "per_pair")

# Below this context attention costs too little to be told from the rest, and what noise makes of it would be
# extrapolated with the square of the context.
_TELLING_CONTEXT = 256


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Modelled seconds of prefills, decodes and iterations.

    Raises InvalidRequest when a coefficient is negative or not finite, or when a decode would take no time at all.
    """

    per_iteration: float
    per_row: float = 0.0
    per_token: float = 0.0
    per_read: float = 0.0
    per_pair: float = 0.0
    model: str = ""  # what was measured: the model's name, the device, FastServe's version
    device: str = ""
    version: str = ""

    def __post_init__(self) -> None:
        for name in _COEFFICIENTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise InvalidRequest("cost", f"{name} must be a finite number of at least 0, got {value!r}")
        if not self.decode_seconds(1) > 0:
            raise InvalidRequest("cost", "one decode must take more than 0 seconds")

    def prefill_seconds(self, start: int, tokens: int) -> float:
        """Solo time of computing positions start … start + tokens - 1 in one iteration; 0 for no tokens."""
        if tokens <= 0:
            return 0.0
        end = start + tokens
        pairs = tokens * start + tokens * (tokens + 1) / 2
        return self.per_iteration + self.per_row + self.per_token * tokens + self.per_read * end + self.per_pair * pairs

    def decode_seconds(self, context: int) -> float:
        """Solo time of one token that attends to `context` positions, its own included."""
        fixed = self.per_iteration + self.per_row + self.per_token
        return fixed + self.per_read * context + self.per_pair * context

    def decode_each(self, contexts: Ints) -> Floats:
        """decode_seconds of each context."""
        fixed = self.per_iteration + self.per_row + self.per_token
        return fixed + (self.per_read + self.per_pair) * contexts.astype(np.float64)

    def plan_seconds(self, starts: Ints, tokens: Ints) -> float:
        """Time of one iteration of rows (starts[i], tokens[i]), which share the reading of the weights; 0 for none."""
        if len(starts) == 0:
            return 0.0
        computed, reads, pairs = plan_totals(starts, tokens)
        seconds = self.per_iteration + self.per_row * len(starts)
        return seconds + self.per_token * computed + self.per_read * reads + self.per_pair * pairs

    def prefill_charge(self, start: int, end: int) -> float:
        """What a prompt's positions start … end - 1 add to the solo time of its prefill, start having been charged.

        The chunks of a prompt add up to its whole prefill in one iteration, however it is cut: only the first pays for
        the reading of the weights, since how many chunks there are is the doing of the job's neighbours.
        """
        return self.prefill_seconds(0, end) - self.prefill_seconds(0, start)

    def iteration_seconds(self, rows: Rows) -> float:
        """Time of one iteration over `rows`, which share the reading of the weights."""
        shared = self.per_iteration * (len(rows) - 1)
        return sum(self.prefill_seconds(start, tokens) for start, tokens in rows) - shared if rows else 0.0

    @classmethod
    def constant(cls, seconds: float) -> CostModel:
        """Every iteration takes `seconds`, whatever is in it."""
        return cls(per_iteration=seconds)

    @classmethod
    def fit(
        cls,
        samples: Iterable[tuple[Rows, float]],
        *,
        model: str = "",
        device: str = "",
        version: str = "",
    ) -> CostModel:
        """The non-negative model with the least squared *relative* error on (rows, measured seconds) samples.

        Relative, because a scheduler compares decodes with decodes as often as prefills with prefills. Without a
        context of 256 or more among the samples, attention (per_read and per_pair) is left out.
        Raises InvalidRequest without samples or when a measured time is not above 0.
        """
        measured = list(samples)
        if not measured:
            raise InvalidRequest("samples", "must hold at least one measured iteration")
        for rows, seconds in measured:
            if not rows or not 0 < seconds < math.inf:
                raise InvalidRequest("samples", f"an iteration of {len(rows)} rows cannot take {seconds!r} seconds")
        seconds_ = np.array([seconds for _, seconds in measured])
        longest = max(start + tokens for rows, _ in measured for start, tokens in rows)
        names = _COEFFICIENTS if longest >= _TELLING_CONTEXT else _COEFFICIENTS[:3]
        features = np.array([_features(rows)[: len(names)] for rows, _ in measured]) / seconds_[:, None]
        coefficients = _non_negative_least_squares(features, np.ones(len(measured)))
        named = dict(zip(names, map(float, coefficients), strict=True))
        return cls(**named, model=model, device=device, version=version)

    def belongs_to(self, *, model: str, device: str, version: str) -> bool:
        """Whether this was measured with exactly that model, device and version."""
        return (self.model, self.device, self.version) == (model, device, version)

    def to_json(self) -> str:
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "cost model") -> CostModel:
        """Inverse of to_json. Raises InvalidRequest, naming `source` and the key at fault."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise InvalidRequest("cost", f"{source} is not JSON: {error}") from None
        if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
            raise InvalidRequest("cost", f"{source} is not a cost model: its format must be {_FORMAT!r}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(data.keys() - known):
            raise InvalidRequest("cost", f"{source} has the unknown key {unknown[0]!r}; known are {sorted(known)}")
        if missing := sorted(known - data.keys()):
            raise InvalidRequest("cost", f"{source} lacks the key {missing[0]!r}")
        for name in known.difference(_COEFFICIENTS):
            if not isinstance(data[name], str):
                raise InvalidRequest("cost", f"{source} must hold a string under {name!r}, got {data[name]!r}")
        return cls(**data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to `path`, creating its folder; a reader never sees half a file."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        draft.write_text(self.to_json(), encoding="utf-8")
        draft.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostModel:
        """Read what save wrote. Raises InvalidRequest, naming the file, when it is missing or damaged."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest("cost", f"cannot read {os.fspath(path)}: {error}") from None
        return cls.from_json(text, os.fspath(path))


def plan_totals(starts: Ints, tokens: Ints) -> tuple[float, float, float]:
    """Of rows (starts[i], tokens[i]): tokens computed, positions read, and pairs of a query and a key it looks at."""
    # One product of three rows with themselves has every sum in it, exactly up to 2^53, for few calls of NumPy.
    factors = np.empty((3, len(starts)))
    factors[0], factors[1], factors[2] = starts, tokens, 1.0
    (_, started, before), (_, squares, computed), _ = (factors @ factors.T).tolist()
    return computed, before + computed, started + (squares + computed) / 2


def profile_path(model: str, device: str) -> Path:
    """Where the profile of a model on a device is kept: under $FASTSERVE_CACHE, else the user's cache folder."""
    root = os.environ.get("FASTSERVE_CACHE")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) if root else Path(cache) / "fastserve"
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", f"{Path(model).name}-{device}").strip("-")[:80]
    unique = hashlib.sha256(f"{model}\0{device}".encode()).hexdigest()[:8]
    return folder / "profiles" / f"{readable}-{unique}.json"


def _features(rows: Rows) -> tuple[float, ...]:
    """One number a coefficient, in the order of _COEFFICIENTS."""
    tokens = sum(count for _, count in rows)
    reads = sum(start + count for start, count in rows)
    pairs = sum(count * start + count * (count + 1) / 2 for start, count in rows)
    return 1.0, len(rows), tokens, reads, pairs


def _non_negative_least_squares(
    matrix: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """argmin ‖matrix·x − target‖ over x ≥ 0, x [n] for matrix [m, n], by trying every set of non-zero unknowns.

    Exact, because the optimum solves the unconstrained problem over its own non-zero unknowns; meant for small n (2ⁿ
    solves). Columns are scaled to unit length first, since iterations and query-key pairs lie many orders apart.
    """
    unknowns = matrix.shape[1]
    scale = np.linalg.norm(matrix, axis=0)
    scaled = matrix / scale
    best: npt.NDArray[np.float64] = np.zeros(unknowns)
    best_error = math.inf
    for size in range(1, unknowns + 1):
        for chosen in map(list, combinations(range(unknowns), size)):
            solution, *_ = np.linalg.lstsq(scaled[:, chosen], target, rcond=None)
            error = float(np.linalg.norm(scaled[:, chosen] @ solution - target))
            # Fewer unknowns win a tie: they extrapolate better.
            if (solution >= 0).all() and error < best_error * (1 - 1e-9):
                best, best_error = np.zeros(unknowns), error
                best[chosen] = solution
    best /= scale
    return best
