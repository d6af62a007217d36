"""How far logits may lie from a float32 reference: derived from the unit of rounding and the reference's sensitivity.

Every value that enters a matrix product is rounded, with a relative error spread evenly over ±u, hence of variance
u²/3 in each of the two factors; a float32 chain of K additions adds K·u₃₂²/3. All of it acts on the products w·x, so it
moves the logits as independent relative noise of that variance on the weights would. How much that is depends on the
model (norms, how peaked attention is), so the reference is asked: its logits under weight noise of a known small size,
in float64, give the deviation per unit of noise for each token. Deviations are close to normal, and the largest of N is
about √(2 ln N) standard deviations. The result is doubled, for what the account leaves out: K and V are rounded once
more as they are stored, and normal is only nearly true.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

# Activations beside quantized weights: a level is 1/127 of a group's largest value, which is at most √group times its
# root mean square; a rounding error is spread evenly over one level. As a share of that mean square:
ACTIVATIONS = 32 / 12 / 127**2
# Weights in int8 have levels of 1/127 of their row's largest, taken to be 4.5 standard deviations at most; so have a
# token's K and V.
INT8_WEIGHTS = 4.5**2 / 12 / 127**2
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-12}
_NOISE = 2.0**-12


def logits_tolerance(
    model: Any, tokens: list[int], dtypes: list[str], longest_sum: int, *, samples: int = 4
) -> dict[str, np.ndarray]:
    """[tokens, 1] bounds for each dtype; "blocks" and "int8" are bfloat16 with quantized weights, "int8 kv" with a KV
    cache of int8. model: a transformers model; longest_sum: the largest K of its products; samples: how often noise is
    drawn."""
    exact = copy.deepcopy(model).double()
    ids, generator = torch.tensor([tokens]), torch.Generator().manual_seed(0)
    deviations = []
    with torch.no_grad():
        reference = exact(ids).logits[0]
        original = {name: parameter.clone() for name, parameter in exact.named_parameters()}
        for _ in range(samples):
            for name, parameter in exact.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(original[name] * (1 + _NOISE * noise))
            deviations.append((exact(ids).logits[0] - reference).numpy() / _NOISE)
    per_noise = np.sqrt(np.mean(np.square(deviations), axis=(0, 2)))[:, None]
    largest = np.sqrt(2 * np.log(reference.numel()))
    bounds = {}
    for dtype in dtypes:
        unit = UNIT.get(dtype, UNIT["bfloat16"])
        variance = 2 / 3 * unit**2 + longest_sum / 3 * UNIT["float32"] ** 2
        if dtype in ("blocks", "int8"):
            variance += ACTIVATIONS + INT8_WEIGHTS * (dtype == "int8")
        if dtype == "int8 kv":
            variance += INT8_WEIGHTS
        bounds[dtype] = 2 * largest * per_noise * np.sqrt(variance)
    return bounds
