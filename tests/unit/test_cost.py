from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from fastserve.cost import CostModel, _non_negative_least_squares, profile_path
from fastserve.types import InvalidRequest

TRUE = CostModel(per_iteration=0.012, per_row=1e-4, per_token=6e-4, per_read=2e-6, per_pair=3e-8)


def shapes(count: int, seed: int = 0) -> list[list[tuple[int, int]]]:
    rng = random.Random(seed)
    return [
        [(rng.randrange(2000), rng.choice([1, 1, 16, 200])) for _ in range(rng.choice([1, 2, 8, 32]))]
        for _ in range(count)
    ]


def test_an_iteration_reads_the_weights_once() -> None:
    cost = CostModel(per_iteration=10, per_row=1, per_token=2, per_read=0.5, per_pair=0.25)
    # 3 tokens at position 4: reads 7 positions; pairs 5 + 6 + 7 = 18
    assert cost.prefill_seconds(4, 3) == 10 + 1 + 6 + 3.5 + 4.5
    assert cost.decode_seconds(7) == 10 + 1 + 2 + 3.5 + 1.75 == cost.prefill_seconds(6, 1)
    assert cost.iteration_seconds([(4, 3), (6, 1)]) == cost.prefill_seconds(4, 3) + cost.decode_seconds(7) - 10
    assert cost.iteration_seconds([]) == cost.prefill_seconds(9, 0) == 0


def test_a_constant_model_ignores_the_batch() -> None:
    cost = CostModel.constant(0.5)
    assert cost.prefill_seconds(0, 1000) == cost.decode_seconds(9) == cost.iteration_seconds([(0, 5), (3, 1)]) == 0.5


def test_fit_finds_the_model_behind_the_samples() -> None:
    fitted = CostModel.fit([(rows, TRUE.iteration_seconds(rows)) for rows in shapes(60)], model="m")
    for name in ("per_iteration", "per_row", "per_token", "per_read", "per_pair"):
        assert getattr(fitted, name) == pytest.approx(getattr(TRUE, name), rel=1e-6)
    assert fitted.model == "m"


def test_fit_predicts_from_noisy_samples() -> None:
    rng = random.Random(1)
    fitted = CostModel.fit([(rows, TRUE.iteration_seconds(rows) * rng.uniform(0.95, 1.05)) for rows in shapes(80)])
    for rows in shapes(40, seed=2):
        assert fitted.iteration_seconds(rows) == pytest.approx(TRUE.iteration_seconds(rows), rel=0.05)


def test_fit_never_goes_negative() -> None:
    """Longer prefills measured as faster than short ones: plain least squares would give tokens a negative price."""
    fitted = CostModel.fit([([(0, 8)], 0.3), ([(0, 64)], 0.2), ([(0, 256)], 0.1)])
    assert min(fitted.per_iteration, fitted.per_token, fitted.per_pair) >= 0
    assert fitted.decode_seconds(1) > 0


def test_short_contexts_say_nothing_of_long_ones() -> None:
    """As measured on a busy machine. Blamed on attention, 15 stray ms of 500 pairs are a minute at 2,048 tokens."""
    seconds = [([(0, 1)], 0.0405), ([(1, 1)], 0.0333), ([(0, 1)] * 8, 0.0518), ([(0, 32)], 0.1065), ([(32, 1)], 0.0369)]
    assert 2 < CostModel.fit(seconds).prefill_seconds(0, 2048) < 6


def test_least_squares_satisfy_the_optimality_conditions() -> None:
    """Karush, Kuhn and Tucker: at the optimum the gradient is 0 where x > 0, and not negative where x = 0."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        matrix, target = rng.normal(size=(12, 4)), rng.normal(size=12)
        x = _non_negative_least_squares(matrix, target)
        gradient = matrix.T @ (matrix @ x - target)
        assert (x >= 0).all()
        assert np.abs(gradient[x > 0]).max(initial=0) < 1e-9
        assert gradient[x == 0].min(initial=0) > -1e-9


@pytest.mark.parametrize("samples", [[], [([], 0.1)], [([(0, 1)], 0.0)], [([(0, 1)], float("nan"))]])
def test_fit_refuses_samples_that_say_nothing(samples: list[tuple[list[tuple[int, int]], float]]) -> None:
    with pytest.raises(InvalidRequest, match="samples"):
        CostModel.fit(samples)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), "1", True])
def test_coefficients_are_checked(bad: object) -> None:
    with pytest.raises(InvalidRequest, match="per_token must be a finite number of at least 0"):
        CostModel(per_iteration=1.0, per_token=bad)  # type: ignore[arg-type]


def test_time_must_pass() -> None:
    with pytest.raises(InvalidRequest, match="more than 0 seconds"):
        CostModel.constant(0.0)


def test_a_saved_model_comes_back_equal(tmp_path: Path) -> None:
    cost = CostModel(per_iteration=0.1, per_pair=1e-9, model="smollm2", device="cpu", version="0.1")
    cost.save(tmp_path / "deep" / "profile.json")
    assert CostModel.load(tmp_path / "deep" / "profile.json") == cost
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["profile.json"]
    assert cost.belongs_to(model="smollm2", device="cpu", version="0.1")
    assert not cost.belongs_to(model="smollm2", device="cpu", version="0.2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "fastserve-cost-0"}, "format must be 'fastserve-cost-1'"),
        ({"per_token": -1}, "per_token must be a finite number"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"device": 3}, "must hold a string under 'device'"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({**json.loads(TRUE.to_json()), **change}))
    with pytest.raises(InvalidRequest, match=message):
        CostModel.load(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_what_is_no_model_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=r"profile\.json"):
        CostModel.load(path)
    with pytest.raises(InvalidRequest, match=r"cannot read .*missing\.json"):
        CostModel.load(tmp_path / "missing.json")


def test_profiles_of_different_models_do_not_collide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTSERVE_CACHE", str(tmp_path))
    paths = {profile_path(model, "cpu AVX2") for model in ("a/b", "b", "b.gguf", "a-b")}
    assert len(paths) == 4
    assert all(path.parent == tmp_path / "profiles" and path.suffix == ".json" for path in paths)


def test_arrays_cost_what_their_elements_cost() -> None:
    cost = CostModel(per_iteration=2.0, per_row=0.5, per_token=0.25, per_read=0.125, per_pair=0.0625)
    contexts = np.array([1, 2, 300], np.int32)
    assert cost.decode_each(contexts).tolist() == pytest.approx([cost.decode_seconds(c) for c in (1, 2, 300)])
    starts, tokens = np.array([0, 7, 100], np.int32), np.array([5, 1, 64], np.int32)
    rows = list(zip(starts.tolist(), tokens.tolist(), strict=True))
    assert cost.plan_seconds(starts, tokens) == pytest.approx(cost.iteration_seconds(rows))
    assert cost.plan_seconds(starts[:0], tokens[:0]) == 0.0
