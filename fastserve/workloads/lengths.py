"""How long jobs are: distributions over whole numbers of tokens, and pairs of them for prompt and output.

A distribution is a table of probabilities over 1 … its longest, so that its moments are exact and a draw is one uniform
number looked up in the cumulative table. Prompt and output are drawn independently, except by Bimodal and Empirical.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..types import InvalidRequest
from .checks import check_count, check_real

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Uniform = tuple[Floats, Floats]  # two independent columns of uniform numbers below 1, for prompt and output


class Distribution:
    """Tokens from 1 to len(weights), each as likely as its weight."""

    def __init__(self, weights: Floats) -> None:
        self.probabilities: Floats = weights / weights.sum()

    @property
    def longest(self) -> int:
        return len(self.probabilities)

    @cached_property
    def mean(self) -> float:
        return float(self.probabilities @ np.arange(1, self.longest + 1))

    def quantile(self, uniform: Floats) -> Ints:
        """The shortest length whose cumulative probability exceeds each uniform number."""
        found = np.searchsorted(self._cumulative, uniform, side="right") + 1
        return np.minimum(found, self.longest)  # the last cumulative sum may fall short of 1 by rounding

    @cached_property
    def median(self) -> int:
        return int(self.quantile(np.array([0.5]))[0])

    @cached_property
    def _cumulative(self) -> Floats:
        return np.cumsum(self.probabilities)


def zipf(theta: float, longest: int) -> Distribution:
    """P(k) ∝ k^-θ over 1 … longest. The larger θ, the more of the work is in few long jobs."""
    check_real("workload", "θ of zipf", theta, 0.0, 20.0)
    check_count("workload", "the longest of zipf", longest)
    return Distribution(np.arange(1, longest + 1, dtype=np.float64) ** -theta)


def log_normal(mean: float, sigma: float, longest: int) -> Distribution:
    """A log-normal with standard deviation sigma of the logarithm, rounded to tokens, without what exceeds `longest`.

    `mean` is met after the cut: the median of the uncut log-normal is solved for.
    """
    check_count("workload", "the longest of lognormal", longest)
    check_real("workload", "σ of lognormal", sigma, 0.01, 10.0)
    edges = np.log(np.arange(longest + 1) + 0.5)

    def cut(mu: float) -> Distribution:
        below = np.array([0.5 * math.erfc((mu - edge) / (sigma * math.sqrt(2))) for edge in edges.tolist()])
        weights = np.diff(below)
        # So far from everything that nothing is left of the tail: all of it lies at the nearer end.
        return Distribution(weights if weights.sum() > 0 else np.eye(1, longest, 0 if mu < 0 else longest - 1)[0])

    low, high = -10.0 * sigma, math.log(longest) + 10.0 * sigma
    most = cut(high).mean
    check_real("workload", f"the mean of a lognormal cut at {longest} tokens", mean, 1.0, most)
    for _ in range(50):  # the mean rises with mu
        middle = (low + high) / 2
        low, high = (middle, high) if cut(middle).mean < mean else (low, middle)
    return cut(high)


class Lengths(Protocol):
    """Pairs of prompt and output tokens."""

    @property
    def name(self) -> str:
        """As `parse_workload` reads it."""

    @property
    def longest(self) -> int:
        """No prompt and output together have more tokens."""

    def draw(self, uniform: Uniform) -> tuple[Ints, Ints]:
        """Prompt and output tokens of one job for each row of uniform numbers."""


@dataclass(frozen=True)
class Independent:
    """Prompt and output, each from its own distribution."""

    name: str
    prompt: Distribution
    output: Distribution

    @property
    def longest(self) -> int:
        return self.prompt.longest + self.output.longest

    def draw(self, uniform: Uniform) -> tuple[Ints, Ints]:
        return self.prompt.quantile(uniform[0]), self.output.quantile(uniform[1])


@dataclass(frozen=True)
class Constant:
    """Every job the same."""

    prompt: int
    output: int

    def __post_init__(self) -> None:
        check_count("workload", "the prompt of constant", self.prompt)
        check_count("workload", "the output of constant", self.output)

    @property
    def name(self) -> str:
        return f"constant:{self.prompt},{self.output}"

    @property
    def longest(self) -> int:
        return self.prompt + self.output

    def draw(self, uniform: Uniform) -> tuple[Ints, Ints]:
        count = len(uniform[0])
        return np.full(count, self.prompt), np.full(count, self.output)


@dataclass(frozen=True)
class Bimodal:
    """Short and long jobs: an output is `long` with probability `share`, else `short`; every prompt is the same."""

    short: int
    long: int
    share: float
    prompt: int

    def __post_init__(self) -> None:
        check_count("workload", "the short output of bimodal", self.short)
        check_count("workload", "the long output of bimodal", self.long)
        check_real("workload", "the share of long jobs of bimodal", self.share, 0.0, 1.0)
        check_count("workload", "the prompt of bimodal", self.prompt)

    @property
    def name(self) -> str:
        return f"bimodal:{self.short},{self.long},{self.share:g},{self.prompt}"

    @property
    def longest(self) -> int:
        return self.prompt + max(self.short, self.long)

    def draw(self, uniform: Uniform) -> tuple[Ints, Ints]:
        outputs = np.where(uniform[1] < self.share, self.long, self.short)
        return np.full(len(outputs), self.prompt), outputs


@dataclass(frozen=True, eq=False)
class Empirical:
    """Pairs drawn with replacement from those observed. Raises InvalidRequest when there are none."""

    name: str
    prompts: Ints
    outputs: Ints

    def __post_init__(self) -> None:
        if not len(self.prompts):
            raise InvalidRequest("trace", f"{self.name} holds no job")

    @cached_property
    def longest(self) -> int:
        return int((self.prompts + self.outputs).max())

    def draw(self, uniform: Uniform) -> tuple[Ints, Ints]:
        chosen = (uniform[0] * len(self.prompts)).astype(np.int64)
        return self.prompts[chosen], self.outputs[chosen]


# Cut so that prompt and output fit in a context of 2048. The means are those that vLLM's paper (SOSP'23, figure 11)
# reports for the datasets; it gives no spread, so sigma is ours: people's prompts spread wider than a model's answers,
# and Alpaca's instructions hardly at all.
_HALF_CONTEXT = 1024


def sharegpt() -> Independent:
    """Conversations: prompts of 161 tokens on average (median 90), outputs of 338 (median 273)."""
    return Independent("sharegpt", log_normal(161, 1.3, _HALF_CONTEXT), log_normal(338, 1.0, _HALF_CONTEXT))


def alpaca() -> Independent:
    """Instructions: prompts of 19 tokens on average (median 17), outputs of 58 (median 35)."""
    return Independent("alpaca", log_normal(19, 0.5, _HALF_CONTEXT), log_normal(58, 1.0, _HALF_CONTEXT))


def zipf_pair(theta: float, longest: int = _HALF_CONTEXT) -> Independent:
    """Prompt and output each Zipf(θ) over 1 … longest: heavy tails, as in the first version of the paper."""
    distribution = zipf(theta, longest)
    name = f"zipf:{theta:g}" + (f",{longest}" if longest != _HALF_CONTEXT else "")
    return Independent(name, distribution, distribution)


def log_normal_pair(
    prompt_mean: float, prompt_sigma: float, output_mean: float, output_sigma: float, longest: int = _HALF_CONTEXT
) -> Independent:
    """Prompt and output each log-normal, cut at `longest`; the means are those after the cut."""
    numbers = f"{prompt_mean:g},{prompt_sigma:g},{output_mean:g},{output_sigma:g}"
    name = f"lognormal:{numbers}" + (f",{longest}" if longest != _HALF_CONTEXT else "")
    prompt, output = (
        log_normal(mean, sigma, longest) for mean, sigma in ((prompt_mean, prompt_sigma), (output_mean, output_sigma))
    )
    return Independent(name, prompt, output)
