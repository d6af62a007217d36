"""LLM: prompts of every form, stop strings, n answers, errors before work, options."""

from __future__ import annotations

from typing import Any

import pytest
import toy_llm
from toy import EOS
from toy_llm import ALPHABET, CONTEXT, ToyWorld, as_text, expected, ids

from fastserve import EngineError, InvalidRequest, SamplingParams
from fastserve.seeds import derived_seed

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, seed=5)
CONVERSATION = [{"role": "user", "content": "hi"}]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    return toy_llm.enter(monkeypatch)


def test_prompts_of_every_form_come_back_in_order(world: ToyWorld) -> None:
    with world.llm() as llm:
        assert [o.prompt for o in llm.generate("abc", GREEDY)] == ["abc"]
        assert [o.prompt_token_ids for o in llm.generate([0, 1, 4], GREEDY)] == [[0, 1, 4]]
        outputs = llm.generate(["hello", [7, 8], "b"], GREEDY)
        assert llm.generate([], GREEDY) == []
    assert [o.prompt for o in outputs] == ["hello", None, "b"]
    assert [o.prompt_token_ids for o in outputs] == [ids("hello"), [7, 8], [1]]
    for output in outputs:
        (answer,) = output.outputs
        assert answer.token_ids == expected(output.prompt_token_ids, GREEDY, 5)
        assert answer.text == as_text(answer.token_ids)
        assert (answer.finish_reason, answer.stop_reason, output.finished) == ("length", None, True)


def test_default_parameters_are_vllms(world: ToyWorld) -> None:
    with world.llm() as llm:
        (answer,) = llm.generate("abc")[0].outputs
    assert len(answer.token_ids) == 16 or answer.finish_reason == "stop"


def test_one_set_of_parameters_for_each_prompt(world: ToyWorld) -> None:
    params = [SamplingParams(max_tokens=k, ignore_eos=True) for k in (1, 3)]
    with world.llm() as llm:
        assert [len(o.outputs[0].token_ids) for o in llm.generate(["a", "b"], params)] == [1, 3]
        with pytest.raises(InvalidRequest, match="sampling_params: must be one for all or one for each of 3, got 2"):
            llm.generate(["a", "b", "c"], params)


def test_n_answers_have_seeds_of_their_own(world: ToyWorld) -> None:
    params = SamplingParams(n=3, max_tokens=9, ignore_eos=True, seed=11)
    with world.llm() as llm:
        (output,) = llm.generate("abc", params)
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    for i, answer in enumerate(output.outputs):
        assert answer.token_ids == expected(ids("abc"), params, derived_seed(11, i))
    assert derived_seed(11, 0) == 11
    assert len({derived_seed(11, i) for i in range(128)}) == 128
    assert output.metrics.finish == max(answer.metrics.finish or 0 for answer in output.outputs)


def test_the_engines_seed_decides_where_a_request_has_none(world: ToyWorld) -> None:
    def tokens(seed: int) -> list[list[int]]:
        with world.llm(seed=seed) as llm:
            outputs = llm.generate(["ab", "ab"], SamplingParams(max_tokens=20, ignore_eos=True))
        return [output.outputs[0].token_ids for output in outputs]

    assert tokens(1) == tokens(1) != tokens(2)
    assert len(set(map(tuple, tokens(1)))) == 2


def test_a_stop_string_ends_text_and_tokens(world: ToyWorld) -> None:
    whole = as_text(expected(ids("abc"), GREEDY, 5))
    for start, length in ((0, 1), (3, 2), (4, 5)):
        stop = whole[start : start + length]
        begin = whole.index(stop)
        for include in (False, True):
            with world.llm() as llm:
                params = SamplingParams(
                    temperature=0, max_tokens=12, ignore_eos=True, seed=5, stop=stop, include_stop_str_in_output=include
                )
                (answer,) = llm.generate("abc", params)[0].outputs
                assert not llm._engine.jobs  # type: ignore[union-attr]
            assert answer.text == whole[: begin + (length if include else 0)]
            assert as_text(answer.token_ids) == whole[: begin + length]
            assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


def test_a_stop_string_in_the_last_token_allowed_is_still_a_stop(world: ToyWorld) -> None:
    whole = as_text(expected(ids("abc"), GREEDY, 5))
    last = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, seed=5, stop=[whole[2:4]])
    with world.llm() as llm:
        (answer,) = llm.generate("abc", last)[0].outputs
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(whole[2:4])], "stop")


def test_half_a_stop_string_at_the_end_is_text(world: ToyWorld) -> None:
    whole = as_text(expected(ids("abc"), GREEDY, 5))
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, seed=5, stop=[whole[-2:] + "never"])
    with world.llm() as llm:
        (answer,) = llm.generate("abc", params)[0].outputs
    assert (answer.text, answer.finish_reason) == (whole, "length")


def test_stop_strings_wait_for_min_tokens(world: ToyWorld) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, seed=5, min_tokens=6, stop=list(ALPHABET.replace("<", ""))
    )
    with world.llm() as llm:
        (answer,) = llm.generate("abc", params)[0].outputs
    assert (len(answer.token_ids), answer.finish_reason) == (7, "stop")
    assert answer.text == as_text(answer.token_ids)[:6]


def test_a_stop_token_is_in_the_tokens_and_not_in_the_text(world: ToyWorld) -> None:
    tokens = expected(ids("abc"), GREEDY, 5)
    stop = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, seed=5, stop_token_ids=[tokens[3]])
    with world.llm() as llm:
        (answer,) = llm.generate("abc", stop)[0].outputs
    end = expected(ids("abc"), stop, 5)
    assert (answer.token_ids, answer.text) == (end, as_text(end[:-1]))
    assert (answer.finish_reason, answer.stop_reason) == ("stop", end[-1])


def test_the_end_of_a_sequence_is_no_text_even_with_special_tokens_shown(world: ToyWorld) -> None:
    found = None
    for first in range(4, 30):  # some prompt that ends by itself
        params = SamplingParams(temperature=0, max_tokens=100, seed=5, skip_special_tokens=False)
        with world.llm() as llm:
            (answer,) = llm.generate([first], params)[0].outputs
        if answer.finish_reason == "stop":
            found = answer
    assert found is not None and found.token_ids[-1] == EOS
    assert (found.text, found.stop_reason) == (as_text(found.token_ids), None)


def test_logprobs_are_those_of_the_tokens(world: ToyWorld) -> None:
    whole = as_text(expected(ids("abc"), GREEDY, 5))
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, seed=5, logprobs=2, stop=whole[4:6])
    with world.llm() as llm:
        answer, plain = (llm.generate("abc", p)[0].outputs[0] for p in (params, GREEDY))
    assert answer.logprobs is not None and plain.logprobs is None
    assert [each.token for each in answer.logprobs] == answer.token_ids


def test_chat_writes_the_conversation_out(world: ToyWorld) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    with world.llm() as llm:
        (one,) = llm.chat(conversation, GREEDY)
        two = llm.chat([conversation, [*conversation, {"role": "assistant", "content": "yo"}]], GREEDY)
        (plain,) = llm.generate("uhiZa", GREEDY)
    assert [output.prompt for output in (one, *two)] == ["uhiZa", "uhiZa", "uhiZayoZa"]
    assert one.outputs[0].token_ids == plain.outputs[0].token_ids
    with world.llm() as llm, pytest.raises(InvalidRequest, match="messages"):
        llm.chat([], GREEDY)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", GREEDY, "prompt: must hold at least one token"),
        ([], GREEDY, "prompt: must hold at least one token"),
        ([61], GREEDY, "prompt: holds the token id 61, and the vocabulary ends at 60"),
        ([0.5], GREEDY, r"prompt: must be text or a list of token ids, got \[0.5\]"),
        (None, GREEDY, "prompt: must be text or a list of token ids, got None"),
        ([0] * CONTEXT, GREEDY, "prompt: has 256 tokens; with room for one of output"),
        ("a", SamplingParams(stop_token_ids=[61]), "stop_token_ids: holds the token id 61"),
    ],
)
def test_a_bad_request_starts_nothing(world: ToyWorld, prompt: Any, params: SamplingParams, message: str) -> None:
    with world.llm() as llm:
        with pytest.raises(InvalidRequest, match=message):
            llm.generate([prompt], params)
        with pytest.raises(InvalidRequest, match=rf"{message}.*\(request 2 of 2\)"):
            llm.generate(["abc", prompt], [GREEDY, params])
        assert world.plans == [] and not llm._has_work
        (output,) = llm.generate("abc", GREEDY)
    assert output.outputs[0].token_ids == expected(ids("abc"), GREEDY, 5)


def test_without_a_tokenizer_token_ids_are_served(world: ToyWorld) -> None:
    with world.llm(skip_tokenizer=True) as llm:
        assert llm.tokenizer is None
        (answer,) = llm.generate([4, 5], GREEDY)[0].outputs
        assert (answer.token_ids, answer.text) == (expected([4, 5], GREEDY, 5), "")
        with pytest.raises(InvalidRequest, match=r"prompt: needs a tokenizer.*pass token ids"):
            llm.generate("abc", GREEDY)
        with pytest.raises(InvalidRequest, match=r"stop: needs a tokenizer.*use stop_token_ids"):
            llm.generate([4, 5], SamplingParams(stop="x"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "lifo"}, "policy: must be one of fcfs, mlfq, skip-join-mlfq, gittins; got 'lifo'"),
        ({"policy": "srpt"}, "policy: must be one of .*; got 'srpt'; srpt has to be told how long every output is"),
        ({"swap_space": "900T"}, "swap_space: must fit in the memory available, .*, beside the KV pool of"),
        ({"swap_space": -1}, "swap_space: must be at least 0"),
        ({"data_parallel_size": 2}, "data_parallel_size: must be 1, .* got 2; fastserve serve --data-parallel-size"),
        ({"data_parallel_size": 0}, "data_parallel_size: must be at least 1, got 0"),
        ({"swap_mode": "lazy"}, "swap_mode: must be one of proactive, reactive, recompute; got 'lazy'"),
        ({"swap_bandwidth": 2**20 - 1}, "swap_bandwidth: must be at least 1M, in bytes a second, got 1048575"),
        ({"admission": "never"}, "admission: must be one of paged, reserve; got 'never'"),
        ({"slowdown_limit": 0}, "slowdown_limit: must be above 0, or none, got 0"),
        ({"dtype": "float16"}, "dtype: float16 is for CUDA devices"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: must be one of auto, float32, bfloat16, float16, int8; got 'fp8'"),
        ({"device": "tpu"}, "device: must be cpu, cuda or one such as cuda:1"),
        ({"max_model_len": 257}, "max_model_len: must be at most 256"),
        ({"max_model_len": 0}, "max_model_len: must be at least 1"),
        ({"max_num_seqs": 0}, "max_num_seqs: must be at least 1"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "max_num_batched_tokens: must be at least max_num_seqs"),
        ({"kv_cache_memory": "lots"}, "kv_cache_memory: must be a size such as 512M"),
        ({"kv_cache_memory": 1}, "kv_cache_memory: must hold at least one KV block"),
        ({"kv_cache_memory": "900T"}, "kv_cache_memory: must fit in the memory available"),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"starvation_limit": 0.0}, "starvation_limit: must be above 0"),
        ({"cost": "/no/such/profile.json"}, "cost: cannot read /no/such/profile.json"),
    ],
)
def test_bad_options_are_named(world: ToyWorld, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        world.llm(**options)


def test_unknown_options_are_refused(world: ToyWorld) -> None:
    with pytest.raises(TypeError, match="polcy"):
        world.llm(polcy="fcfs")


def test_info_tells_the_pool(world: ToyWorld) -> None:
    with world.llm(kv_cache_memory="64K", policy="fcfs") as llm:
        info = llm.info
    block = info["kv_cache_bytes"] // info["num_blocks"]
    assert info["kv_cache_bytes"] <= 64 * 1024 < info["kv_cache_bytes"] + block
    assert (info["policy"], info["max_model_len"]) == ("fcfs", CONTEXT)
    assert info["kv_cache_tokens"] == 16 * info["num_blocks"]
    with world.llm(kv_cache_memory=None, max_num_seqs=4) as llm:
        assert llm.info["kv_cache_tokens"] == 4 * CONTEXT


def test_the_cost_model_is_measured_once_and_remembered(
    world: ToyWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("FASTSERVE_CACHE", str(tmp_path))
    with world.llm(policy="fcfs", cost=None):
        assert world.plans == []  # looks at no cost
    with world.llm(policy="fcfs", cost=None, stall_limit=2):
        assert world.plans != []  # the limit on its iterations does
    for file in tmp_path.rglob("*.json"):
        file.unlink()
    with world.llm(cost=None) as llm:
        assert world.plans != []
        measured = llm.cost
    with world.llm(cost=None) as llm:
        assert world.plans == [] and llm.cost == measured
    (file,) = tmp_path.rglob("*.json")
    file.write_text("damaged")
    with world.llm(cost=None):
        assert world.plans != []
    with world.llm(cost=measured) as llm:
        assert llm.cost is measured
        llm.generate("a", GREEDY)
        with pytest.raises(EngineError, match="served no request"):
            llm.profile()
