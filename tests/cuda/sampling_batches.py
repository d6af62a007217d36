"""Batches of cases, sampled on the device, and a case by the CPU's sampler."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from sampling_reference import Case

from fastserve import _C

NOT_WRITTEN = -7  # what results hold before


def sample(kernels: Any, cases: list[Case], order: list[int] | None = None, draws: bool = True) -> Any:
    """Samples a batch; order: which row of the logits a case has."""
    vocab, count = len(cases[0].logits), len(cases)
    order = list(range(count)) if order is None else order
    logits = np.full((max(order) + 1, -(-vocab // 64) * 64), np.nan, np.float32)  # the padding must not matter
    rows, biases, stops, tables = [], [], [], []
    for slot, (case, at) in enumerate(zip(cases, order, strict=True)):
        logits[at, :vocab] = case.logits
        row, params = kernels.SampleRow(), case.params
        row.logits, row.slot, row.output_index, row.seed = at, slot, case.index, params.seed
        row.set_temperature(params.temperature, params.min_p)
        row.top_k, row.top_p, row.logprobs = params.top_k, params.top_p, params.logprobs
        row.bias, row.biases = len(biases), len(params.bias)
        biases += params.bias
        if case.index < params.min_tokens:
            row.stop, row.stops = len(stops), len(params.stop_tokens)
            stops += params.stop_tokens
        row.repetition_penalty = params.repetition_penalty
        row.presence_penalty = params.presence_penalty
        row.frequency_penalty = params.frequency_penalty
        if params.needs_history:
            row.table = len(tables)
            tables.append(
                kernels.count_tokens(
                    vocab=vocab,
                    tokens=np.array(case.prompt + case.output, np.int32),
                    prompt=len(case.prompt),
                    outputs=len(case.output),
                )
            )
        rows.append(row)
    counts = np.array(tables, np.uint32) if tables else np.zeros((0, 64), np.uint32)
    last = np.full(count, NOT_WRITTEN, np.int32)
    return kernels.sample(
        logits=logits,
        vocab=vocab,
        rows=rows,
        biases=biases,
        stop_tokens=stops,
        last_sampled=last,
        counts=counts,
        draws=draws,
    )


def on_cpu(case: Case) -> tuple[int, float, list[tuple[int, float]]]:
    params = _C.SamplingParams()
    for name, value in dataclasses.asdict(case.params).items():
        setattr(params, name, value)
    return _C.sample(case.logits, params, case.prompt, case.output)


def logits_of(seed: int, vocab: int, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(vocab) * spread).astype(np.float32)
