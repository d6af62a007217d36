"""model/sampler.h in float64 NumPy, and how far a draw is from another result."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# Samplers whose probabilities are within 1e-6 of exact ones agree on a draw that is farther than this from where the
# token, or the set that is kept, becomes another.
DOUBT = 1e-6


@dataclass
class Params:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int = -1
    min_tokens: int = 0
    seed: int = 0
    bias: list[tuple[int, float]] = field(default_factory=list)
    stop_tokens: list[int] = field(default_factory=list)

    @property
    def needs_history(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass
class Case:
    logits: np.ndarray
    params: Params
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    output_index: int | None = None  # None: len(output)

    @property
    def index(self) -> int:
        return len(self.output) if self.output_index is None else self.output_index


def adjusted(case: Case) -> np.ndarray:
    """Logits with biases, the mask of min_tokens and penalties, in float32 as the sampler's order has it."""
    logits, params = case.logits.astype(np.float32).copy(), case.params
    vocab = len(logits)
    for token, bias in params.bias:
        if token < vocab:
            logits[token] += np.float32(bias)
    if case.index < params.min_tokens:
        for token in params.stop_tokens:
            if token < vocab:
                logits[token] = -np.inf
    if params.needs_history:
        repetition, presence, frequency = (
            np.float32(p) for p in (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        )
        for token in set(case.prompt) | set(case.output):
            x, times = logits[token], case.output.count(token)
            if repetition != 1:
                x = x / repetition if x > 0 else x * repetition
            x = np.float32(x - frequency * np.float32(times))
            logits[token] = x - presence if times else x
    return logits


def probabilities(case: Case, shift: float = 0.0) -> np.ndarray:
    """What a token is drawn by, zero where it is not kept. shift: of top_p."""
    logits, params = adjusted(case).astype(np.float64), case.params
    top = logits.max()
    temperature = float(np.float32(params.temperature))
    scale = float(np.float32(min(1 / temperature, float(np.finfo(np.float32).max))))
    lowest = max(-60.0, np.log(float(np.float32(params.min_p)))) if params.min_p > 0 else -60.0
    cut = top + temperature * min(0.0, lowest)
    if 0 < params.top_k < len(logits):
        cut = max(cut, np.sort(logits)[-params.top_k])
    kept = logits >= cut
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.where(kept, np.exp((logits - top) * scale), 0.0)
    if params.top_p < 1:
        order = np.lexsort((np.arange(len(logits)), -logits))
        order = order[kept[order]]
        mass = weights[order].cumsum() / weights.sum()
        weights[order[1 + int((mass < float(np.float32(params.top_p)) + shift).sum()) :]] = 0
    return weights / weights.sum()


def draw(case: Case, uniform: float) -> tuple[int, float]:
    """The token, and how little would have made it another."""
    if case.params.temperature == 0:
        return int(adjusted(case).argmax()), np.inf
    shares = probabilities(case)
    kept = np.flatnonzero(shares)
    ends = shares[kept].cumsum()[:-1]  # beyond the last there is no other token
    token = int(kept[(ends <= uniform).sum()])
    doubt = float(np.abs(ends - uniform).min()) if len(ends) else np.inf
    for shift in (-DOUBT, DOUBT):  # tokens that are kept or not by a rounding
        other = probabilities(case, shift)
        changed = (shares > 0) != (other > 0)
        doubt -= max(shares[changed].sum(), other[changed].sum())
        if changed[token]:
            doubt = 0.0
    return token, doubt


def logprobs(case: Case) -> np.ndarray:
    logits = case.logits.astype(np.float64)
    top = logits.max()
    return logits - (top + np.log(np.exp(logits - top).sum()))


def top_tokens(case: Case) -> list[int]:
    """The most likely first, ties by id."""
    order = np.lexsort((np.arange(len(case.logits)), -case.logits.astype(np.float64)))
    return [int(t) for t in order[: max(case.params.logprobs, 0)]]
