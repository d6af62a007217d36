"""SamplingParams and the engine's options: what is taken, what it becomes, and what is refused by name."""

from __future__ import annotations

import pickle
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from fastserve.config import RuntimeConfig, SchedulerConfig, parse_size
from fastserve.types import InvalidRequest, SamplingParams


def test_numpy_values_become_plain_ones() -> None:
    given = SamplingParams(
        n=np.int8(2), max_tokens=np.int32(9), min_tokens=np.uint8(1), temperature=np.float32(0.5), top_k=np.int64(3),
        top_p=np.float64(0.5), min_p=np.float16(0.25), repetition_penalty=np.int64(2), presence_penalty=1,
        frequency_penalty=np.float32(-1), logit_bias={np.int64(5): np.float32(-1)}, logprobs=np.int16(2),
        seed=np.uint64(2**64 - 1), stop=np.array(["a", "b"]), stop_token_ids=np.array([1, 2]),
        ignore_eos=np.True_, include_stop_str_in_output=np.False_, skip_special_tokens=np.bool_(True),
    )  # fmt: skip
    plain = SamplingParams(
        n=2, max_tokens=9, min_tokens=1, temperature=0.5, top_k=3, top_p=0.5, min_p=0.25, repetition_penalty=2.0,
        presence_penalty=1.0, frequency_penalty=-1.0, logit_bias={5: -1.0}, logprobs=2, seed=2**64 - 1,
        stop=("a", "b"), stop_token_ids=(1, 2), ignore_eos=True,
    )  # fmt: skip
    assert given == plain and hash(given) == hash(plain) and repr(given) == repr(plain)
    for field in fields(given):
        assert type(getattr(given, field.name)) in (int, float, bool, dict, tuple), field.name
    for values in (given.stop, given.stop_token_ids, given.logit_bias, given.logit_bias.values()):
        assert {type(value) for value in values} <= {int, float, str}


def test_none_is_none_of_them() -> None:
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None) == SamplingParams()  # type: ignore[arg-type]
    assert SamplingParams().logit_bias == {} and SamplingParams(stop="").stop == ()


def test_the_callers_collections_are_copied() -> None:
    bias, stops, ids = {1: 2.0}, ["a"], [4]
    params = SamplingParams(logit_bias=bias, stop=stops, stop_token_ids=ids)
    bias[7] = 1.0
    stops.append("b")
    ids.append(5)
    assert params == SamplingParams(logit_bias={1: 2.0}, stop="a", stop_token_ids=[4])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("stop", value) for value in (5, b"abc", [None], [""], {"a": 1}, np.array("ab"))],
        *[("stop_token_ids", value) for value in (5, "12", b"12", [1.0], [True], [-1], {1: 2}, np.array([[1]]))],
        *[("logit_bias", value) for value in ([(1, 2)], 5, "a", {"5": 1.0}, {5: "1"}, {5: None}, {5: 101.0})],
        *[("ignore_eos", value) for value in ("no", None, 0)],
        ("skip_special_tokens", None),
        ("include_stop_str_in_output", 1),
        *[("temperature", value) for value in ("1", None, True, 1j, np.complex64(1), float("nan"), np.array([1.0]))],
        *[("max_tokens", value) for value in (True, 3.0, "3", np.float64(3), 0, 2**31)],
        *[("seed", value) for value in (1.0, -1, 2**64)],
    ],
)
def test_a_value_of_another_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**{name: value})
    assert error.value.field == name and str(error.value).startswith(f"{name}: must ")


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(InvalidRequest("stop", "must be text", 3)))
    assert (error.field, error.request, str(error)) == ("stop", 3, "stop: must be text")


@pytest.mark.parametrize("config", [SchedulerConfig, RuntimeConfig])
@pytest.mark.parametrize("value", ["4", 2.0, True, None, -1, 2**40])
def test_whole_numbers_are_checked(config: Any, value: Any) -> None:
    numbers = [field.name for field in fields(config) if type(field.default) is int]
    assert len(numbers) >= 4
    for name in numbers:
        with pytest.raises(InvalidRequest, match=f"^{name}: must be"):
            config(**{name: value})
        same = config(**{name: np.int32(config.__dataclass_fields__[name].default)})
        assert same == config() and type(getattr(same, name)) is int


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": None}, "policy: must be the name of a policy, got None"),
        ({"policy": ["fcfs"]}, "policy: must be the name of a policy"),
        ({"starvation_limit": "x"}, "starvation_limit: must be above 0 seconds, or none, got 'x'"),
        ({"starvation_limit": True}, "starvation_limit"),
        ({"starvation_limit": float("inf")}, "starvation_limit"),
        ({"starvation_limit": float("nan")}, "starvation_limit"),
        ({"block_size": 65537}, "block_size: must be at most 65536, got 65537"),
        ({"max_in_flight": 65}, "max_in_flight: must be at most 64"),
    ],
)
def test_scheduling_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        SchedulerConfig(**options)


@pytest.mark.parametrize("config", [SchedulerConfig, RuntimeConfig])
@pytest.mark.parametrize("option", ["num_blocks", "num_host_blocks"])
def test_a_typo_does_not_take_the_machines_memory(config: Any, option: str) -> None:
    assert getattr(config(**{option: 2**24}), option) == 2**24
    for blocks in (2**24 + 1, 2**31 - 1):
        with pytest.raises(InvalidRequest, match=f"^{option}: must be at most 16777216, got {blocks}"):
            config(**{option: blocks})


def test_a_starvation_limit_is_a_float_or_none() -> None:
    assert type(SchedulerConfig(starvation_limit=np.float32(2)).starvation_limit) is float
    assert SchedulerConfig(starvation_limit=None).starvation_limit is None


@pytest.mark.parametrize("dtype", [None, 16, ["float32"], "float64"])
def test_a_dtype_is_one_of_three(dtype: Any) -> None:
    with pytest.raises(InvalidRequest, match="dtype: must be one of float32, bfloat16, float16"):
        RuntimeConfig(dtype=dtype)


def test_the_kv_cache_is_of_the_type_of_computation_unless_told() -> None:
    assert [RuntimeConfig(dtype=dtype).kv_dtype for dtype in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    assert RuntimeConfig(dtype="float32", kv_cache_dtype="int8").kv_dtype == "int8"
    for wrong in (None, 8, ["int8"], "fp8"):
        with pytest.raises(InvalidRequest, match="kv_cache_dtype: must be one of auto, float32, bfloat16, .*int8; got"):
            RuntimeConfig(kv_cache_dtype=wrong)  # type: ignore[arg-type]


def test_sizes() -> None:
    assert [parse_size("x", text) for text in ("1.5GiB", "512M", " 7 ", np.int64(9))] == [3 * 2**29, 2**29, 7, 9]
    for wrong in (1e9, True, None, b"1G", [], "1e9", "9" * 5000 + "T", "-1", 0):
        with pytest.raises(InvalidRequest, match=r"^x: must be"):
            parse_size("x", wrong)  # type: ignore[arg-type]
    assert parse_size("x", "0K", zero=True) == parse_size("x", 0, zero=True) == 0
    with pytest.raises(InvalidRequest, match="x: must be at least 0, got -1"):
        parse_size("x", -1, zero=True)
