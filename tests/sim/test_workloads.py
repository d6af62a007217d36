"""Synthetic workloads: moments against formulas, seeds, pairing, and the names of options."""

from __future__ import annotations

import math
from functools import cache
from itertools import islice, pairwise
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.types import InvalidRequest
from fastserve.workloads import SimJob, Synthetic, parse_arrivals, parse_workload
from fastserve.workloads.arrivals import Arrivals
from fastserve.workloads.lengths import Distribution, Empirical, Independent, alpaca, log_normal, sharegpt, zipf
from fastserve.workloads.specs import ARRIVALS, WORKLOADS

SPECS = [
    "sharegpt",
    "alpaca",
    "zipf:2",
    "zipf:0.99,256",
    "constant:8,6",
    "bimodal:5,400,0.1,20",
    "lognormal:50,0.8,90,1.2",
]
PROCESSES = ["poisson", "gamma:4", "gamma:0", "burst:7"]


@cache
def workload(lengths: str = "zipf:1.5", arrivals: str = "poisson") -> Synthetic:
    return Synthetic(parse_workload(lengths), parse_arrivals(arrivals))


def jobs(lengths: str, arrivals: str, seed: int, count: int, rate: float = 1.0) -> list[SimJob]:
    return list(workload(lengths, arrivals).jobs(seed, count, rate))


def lengths_of(given: list[SimJob]) -> list[tuple[int, int]]:
    return [(job.prompt_tokens, job.output_tokens) for job in given]


# --- lengths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("theta", "longest"), [(0.0, 10), (0.99, 1024), (2.0, 1024), (3.5, 7)])
def test_zipf_is_zipf(theta: float, longest: int) -> None:
    distribution = zipf(theta, longest)
    weights = [k**-theta for k in range(1, longest + 1)]
    assert distribution.longest == longest
    assert distribution.probabilities.tolist() == pytest.approx([weight / math.fsum(weights) for weight in weights])
    assert distribution.mean == pytest.approx(math.fsum(k * w for k, w in enumerate(weights, 1)) / math.fsum(weights))


def test_log_normal_is_a_rounded_and_cut_one() -> None:
    mean, sigma, longest = 90.0, 1.1, 700
    distribution = log_normal(mean, sigma, longest)
    assert distribution.mean == pytest.approx(mean, rel=1e-9)
    # The ratio of two probabilities does not know of the cut; one of them tells mu, the rest must follow.
    best = min(
        (abs(error), mu)
        for mu in np.linspace(3.0, 6.0, 3001).tolist()
        for error in [_ratio_error(distribution, mu, sigma)]
    )
    assert best[0] < 1e-3
    normal = NormalDist(best[1], sigma)
    within = normal.cdf(math.log(longest + 0.5)) - normal.cdf(math.log(0.5))
    for tokens in (1, 5, 60, 300, 700):
        expected = (normal.cdf(math.log(tokens + 0.5)) - normal.cdf(math.log(tokens - 0.5))) / within
        assert distribution.probabilities[tokens - 1] == pytest.approx(expected, rel=5e-3)


def _ratio_error(distribution: Distribution, mu: float, sigma: float) -> float:
    normal = NormalDist(mu, sigma)
    shares = [normal.cdf(math.log(k + 0.5)) - normal.cdf(math.log(k - 0.5)) for k in (20, 200)]
    return shares[0] / shares[1] / float(distribution.probabilities[19] / distribution.probabilities[199]) - 1


@pytest.mark.parametrize(("fit", "prompt", "output"), [(sharegpt, (161, 90), (338, 273)), (alpaca, (19, 17), (58, 35))])
def test_the_fits_have_the_means_and_medians_they_state(
    fit: type[Independent], prompt: tuple[int, int], output: tuple[int, int]
) -> None:
    lengths = fit()
    assert (lengths.prompt.mean, lengths.output.mean) == pytest.approx((prompt[0], output[0]))
    assert (lengths.prompt.median, lengths.output.median) == (prompt[1], output[1])
    assert str(prompt[1]) in (fit.__doc__ or "") and str(output[1]) in (fit.__doc__ or "")
    assert lengths.longest == 2048


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=40), st.floats(0.0, 1.0, exclude_max=True))
def test_quantile_is_the_inverse_of_the_cumulative_sum(weights: list[float], uniform: float) -> None:
    distribution = Distribution(np.array(weights))
    found = int(distribution.quantile(np.array([uniform]))[0])
    assert 1 <= found <= len(weights)
    below = math.fsum(weights[: found - 1]) / math.fsum(weights)
    upto = math.fsum(weights[:found]) / math.fsum(weights)
    assert below - 1e-9 <= uniform <= upto + 1e-9


@pytest.mark.parametrize("spec", SPECS)
def test_samples_have_the_moments_of_their_distribution(spec: str) -> None:
    lengths = parse_workload(spec)
    sample = np.array(lengths_of(jobs(spec, "poisson", 3, 40_000)))
    assert sample.min() >= 1 and sample.sum(axis=1).max() <= lengths.longest
    if isinstance(lengths, Independent):
        for column, distribution in zip(sample.T, (lengths.prompt, lengths.output), strict=True):
            tokens = np.arange(1, distribution.longest + 1)
            deviation = math.sqrt(float(distribution.probabilities @ (tokens - distribution.mean) ** 2))
            assert abs(column.mean() - distribution.mean) < 4 * deviation / math.sqrt(len(column))
        assert abs(np.corrcoef(sample.T)[0, 1]) < 4 / math.sqrt(len(sample)), "prompt and output are independent"


def test_constant_and_bimodal() -> None:
    assert set(lengths_of(jobs("constant:8,6", "poisson", 0, 3000))) == {(8, 6)}
    drawn = lengths_of(jobs("bimodal:5,400,0.1,20", "poisson", 0, 20_000))
    assert set(drawn) == {(20, 5), (20, 400)}
    assert abs(drawn.count((20, 400)) - 2000) < 4 * math.sqrt(20_000 * 0.1 * 0.9)
    assert set(lengths_of(jobs("bimodal:5,400,0,20", "poisson", 0, 3000))) == {(20, 5)}
    assert set(lengths_of(jobs("bimodal:5,400,1,20", "poisson", 0, 3000))) == {(20, 400)}


def test_observed_pairs_stay_together() -> None:
    pairs = np.array([(100, 1), (5, 50), (7, 9)])
    source = Synthetic(Empirical("seen", pairs[:, 0], pairs[:, 1]), parse_arrivals("poisson"))
    drawn = lengths_of(list(source.jobs(0, 6000, 1.0)))
    assert set(drawn) == set(map(tuple, pairs.tolist())) and source.longest == 101
    for pair in set(drawn):
        assert abs(drawn.count(pair) - 2000) < 4 * math.sqrt(6000 * 2 / 9)
    with pytest.raises(InvalidRequest, match="seen holds no job"):
        Empirical("seen", pairs[:0, 0], pairs[:0, 1])


# --- arrivals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arrivals", "cv"), [("poisson", 1.0), ("gamma:1", 1.0), ("gamma:0.5", 0.5), ("gamma:3", 3.0)])
def test_gaps_have_the_rate_and_the_variation_asked_for(arrivals: str, cv: float) -> None:
    count, rate = 100_000, 2.5
    times = [job.arrival for job in jobs("constant:1,1", arrivals, 1, count, rate)]
    gaps = np.diff(times)
    assert times[0] == 0.0 and gaps.min() >= 0.0
    assert gaps.mean() * rate == pytest.approx(1.0, abs=4 * cv / math.sqrt(count))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_bursts_and_even_arrivals() -> None:
    times = [job.arrival for job in jobs("constant:1,1", "burst:3", 0, 8, 6.0)]
    assert times == [0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0]
    assert [job.arrival for job in jobs("constant:1,1", "gamma:0", 0, 4, 4.0)] == [0.0, 0.25, 0.5, 0.75]
    far = jobs("constant:1,1", "burst:1000", 0, 3001, 1.0)  # bursts across the chunks jobs are drawn in
    assert [far[at].arrival for at in (999, 1000, 1999, 2000, 3000)] == [0.0, 1000.0, 1000.0, 2000.0, 3000.0]


@given(st.sampled_from(PROCESSES), st.integers(0, 2**64 - 1), st.integers(1, 2500))
def test_arrivals_never_go_back(arrivals: str, seed: int, count: int) -> None:
    made = jobs("constant:1,1", arrivals, seed, count, 3.0)
    assert len(made) == count
    assert all(a.arrival <= b.arrival for a, b in pairwise(made))


# --- seeds and pairing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", SPECS)
@pytest.mark.parametrize("arrivals", PROCESSES)
def test_equal_seeds_are_equal_workloads(lengths: str, arrivals: str) -> None:
    assert jobs(lengths, arrivals, 5, 1500) == jobs(lengths, arrivals, 5, 1500)
    if not lengths.startswith("constant"):
        assert lengths_of(jobs(lengths, arrivals, 5, 50)) != lengths_of(jobs(lengths, arrivals, 6, 50))


@given(st.sampled_from(SPECS), st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_a_rate_scales_gaps_and_leaves_lengths(lengths: str, seed: int, rate: float) -> None:
    unit, scaled = jobs(lengths, "gamma:2", seed, 40, 1.0), jobs(lengths, "gamma:2", seed, 40, rate)
    assert lengths_of(unit) == lengths_of(scaled)
    assert [job.arrival for job in scaled] == [job.arrival / rate for job in unit]
    assert lengths_of(jobs(lengths, "burst:4", seed, 40, rate)) == lengths_of(unit)


def test_a_longer_workload_begins_with_the_shorter_one() -> None:
    assert jobs("zipf:1.2", "gamma:2", 0, 2500)[:1030] == jobs("zipf:1.2", "gamma:2", 0, 1030)


def test_jobs_are_drawn_as_they_are_taken() -> None:
    endless = workload().jobs(0, 10**12, 1.0)
    assert len(list(islice(endless, 5))) == 5


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_a_workloads_name_is_how_it_is_asked_for(spec: str) -> None:
    assert parse_workload(spec).name == spec
    assert parse_workload(f" {spec.upper()} ").name == spec


@pytest.mark.parametrize("spec", PROCESSES)
def test_a_processes_name_is_how_it_is_asked_for(spec: str) -> None:
    process: Arrivals = parse_arrivals(spec)
    assert process.name == spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zipff:2", "must be one of sharegpt, alpaca, zipf:THETA.*lognormal:.*got 'zipff:2'"),
        ("", "must be one of"),
        ("zipf", r"must be written zipf:THETA\[,LONGEST\], got 'zipf'"),
        ("zipf:x", "with numbers, got 'zipf:x'"),
        ("zipf:2,10,3", "must be written zipf"),
        ("zipf:nan", "θ of zipf must be a number between 0 and 20"),
        ("zipf:2,0", "longest of zipf must be an integer between 1"),
        ("sharegpt:1", "must be written sharegpt"),
        ("constant:8", "must be written constant:PROMPT,OUTPUT"),
        ("constant:0,5", "prompt of constant must be an integer between 1"),
        ("constant:5,0", "output of constant"),
        ("constant:1.5,2", "with numbers"),
        ("bimodal:1,2,1.5,3", "share of long jobs of bimodal must be a number between 0 and 1"),
        ("lognormal:50,0,90,1", "σ of lognormal"),
        ("lognormal:1100,1,90,1", "mean of a lognormal cut at 1024 tokens must be a number between 1 and"),
        ("lognormal:0.5,1,90,1", "mean of a lognormal"),
    ],
)
def test_a_bad_workload_is_explained(spec: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse_workload(spec)
    assert caught.value.field == "workload"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("uniform", "must be one of poisson, gamma:CV, burst:SIZE; got 'uniform'"),
        ("gamma", "must be written gamma:CV"),
        ("gamma:-1", "coefficient of variation of gamma must be a number between 0 and 100"),
        ("burst:0", "size of a burst must be an integer between 1"),
        ("burst:2.5", "with numbers"),
    ],
)
def test_bad_arrivals_are_explained(spec: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse_arrivals(spec)
    assert caught.value.field == "arrivals"


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_is_above_zero(rate: float) -> None:
    with pytest.raises(InvalidRequest, match="rate: jobs a second must be a number"):
        jobs("alpaca", "poisson", 0, 1, rate)


def test_a_seed_is_not_negative() -> None:
    with pytest.raises(InvalidRequest, match="seed: a seed must be an integer between 0"):
        jobs("alpaca", "poisson", -1, 1)


def test_every_name_has_its_help() -> None:
    for entries in (WORKLOADS, ARRIVALS):
        for name, entry in entries.items():
            assert entry.usage.startswith(name) and entry.help
