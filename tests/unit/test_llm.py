"""LLM: prompts of every form, stop strings, n answers, errors before work, timed arrivals."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import toy_llm
from toy import EOS, expected_output
from toy_llm import ALPHABET, CONTEXT, ToyWorld

from fastserve import EngineError, InvalidRequest, RequestOutput, SamplingParams
from fastserve.seeds import derived_seed

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, seed=5)
CONVERSATION = [{"role": "user", "content": "hi"}]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    return toy_llm.enter(monkeypatch)


def expected(prompt: list[int], params: SamplingParams, seed: int) -> list[int]:
    return expected_output(prompt, params, seed, CONTEXT)


def ids(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


def as_text(tokens: list[int]) -> str:
    return "".join(ALPHABET[token] for token in tokens if token != EOS)


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


def test_stream_yields_growing_answers(world: ToyWorld) -> None:
    with world.llm() as llm:
        seen: list[RequestOutput] = list(llm.stream(["abc", "b"], GREEDY))
    for prompt in ("abc", "b"):
        tokens = [output.outputs[0].token_ids for output in seen if output.prompt == prompt]
        assert tokens == [expected(ids(prompt), GREEDY, 5)[: k + 1] for k in range(12)]
        assert [output.finished for output in seen if output.prompt == prompt] == [False] * 11 + [True]


def test_leaving_a_stream_aborts_it(world: ToyWorld) -> None:
    with world.llm() as llm:
        stream = llm.stream("abc", GREEDY)
        next(stream)
        stream.close()
        llm.generate("b", GREEDY)
        assert not llm._has_work and not llm._live
        unread = llm.stream("abc", GREEDY)
        del unread
        assert not llm._has_work


def test_two_streams_share_the_engine(world: ToyWorld) -> None:
    with world.llm() as llm:
        first, second = llm.stream("abc", GREEDY), llm.stream("b", GREEDY)
        next(first)
        *_, last_of_second = second  # runs the first one to its end, too
        *_, last_of_first = first
    assert last_of_first.outputs[0].token_ids == expected(ids("abc"), GREEDY, 5)
    assert last_of_second.outputs[0].token_ids == expected(ids("b"), GREEDY, 5)


def test_replay_admits_jobs_when_their_time_has_come(world: ToyWorld) -> None:
    """One second an iteration (and 0.01 a token): the third job finds the engine idle."""
    requests = [(0.0, "abc", GREEDY), (2.5, [7], GREEDY), (100.0, "b", GREEDY)]
    seen: list[str] = []
    with world.llm(policy="fcfs") as llm:
        world.clock.now = 50.0
        outputs = llm.replay(requests, lambda output: seen.append(output.request_id), request_ids=["x", "y", "z"])
        assert not llm._has_work
    assert [output.request_id for output in outputs] == ["x", "y", "z"]
    assert [output.metrics.arrival for output in outputs] == [50.0, 52.5, 150.0]
    for output, (_, _, params) in zip(outputs, requests, strict=True):
        assert output.outputs[0].token_ids == expected(output.prompt_token_ids, params, 5)
    x, y, z = (output.metrics for output in outputs)
    assert x.first_scheduled == 50.0 and z.first_scheduled == 150.0
    assert y.first_scheduled is not None and 52.5 <= y.first_scheduled <= 55.0
    assert z.jct == pytest.approx(12 * 1.01)
    assert seen.count("x") == seen.count("y") == seen.count("z") == 12


def test_replay_checks_everything_first(world: ToyWorld) -> None:
    with world.llm() as llm:
        for bad in ((-1.0, "a", GREEDY), (5.0, [61], GREEDY), (float("nan"), "a", GREEDY)):
            with pytest.raises(InvalidRequest, match=r"\(request 2 of 2\)"):
                llm.replay([(0.0, "abc", GREEDY), bad])
        with pytest.raises(InvalidRequest, match="request_id"):
            llm.replay([(0.0, "abc", GREEDY), (9.0, "b", GREEDY)], request_ids=["same", "same"])
        assert world.plans == [] and not llm._has_work


def test_an_engine_that_failed_says_so_from_then_on(world: ToyWorld) -> None:
    world.fail_at = 3
    with world.llm(policy="fcfs") as llm:
        with pytest.raises(EngineError, match="the device is gone"):
            llm.generate("abc", GREEDY)
        with pytest.raises(EngineError, match="the device is gone"):
            llm.generate("abc", GREEDY)


def test_a_closed_llm_says_so(world: ToyWorld) -> None:
    llm = world.llm()
    llm.close()
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.generate("abc", GREEDY)


def test_an_error_in_a_callback_leaves_nothing_behind(world: ToyWorld) -> None:
    def on_update(output: RequestOutput) -> None:
        raise KeyboardInterrupt

    with world.llm() as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.replay([(0.0, "abc", GREEDY)], on_update)
        (output,) = llm.generate("abc", GREEDY)
        assert not llm._has_work
    assert output.outputs[0].token_ids == expected(ids("abc"), GREEDY, 5)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Interrupts arrive even where the shell had them ignored, as it does for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_the_engine_waits_costs_it_nothing(world: ToyWorld) -> None:
    with world.llm(policy="fcfs") as llm:
        world.runtimes[-1].interrupt_at = 4
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["abc", "b"], GREEDY)
        outputs = llm.generate(["abc", "b"], GREEDY)
        assert llm._engine is not None
        llm._engine.check_integrity()
        assert not llm._has_work
    for output in outputs:
        assert output.outputs[0].token_ids == expected(output.prompt_token_ids, GREEDY, 5)


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


# --- whose a request is -----------------------------------------------------------------------------------------------


def origins(llm: Any) -> list[tuple[str, str | None, str]]:
    """Of the live jobs."""
    return [(job.tenant, job.program, job.cache_salt) for job in llm._engine.jobs]


def test_tenant_program_and_salt_reach_the_job(world: ToyWorld) -> None:
    with world.llm() as llm:
        given: dict[str, Any] = {"tenant": "ann", "program_id": "agent", "cache_salt": "s"}
        streams = [llm.stream("abc", GREEDY, **given), llm.stream_chat(CONVERSATION, GREEDY, **given)]
        each = {"tenant": ["ann", "bob"], "program_id": ["agent", None], "cache_salt": ["", "s"]}
        streams.append(llm.stream(["a", "b"], GREEDY, **each))
        for stream in streams:
            next(stream)
        assert origins(llm) == [("ann", "agent", "s")] * 2 + [("ann", "agent", ""), ("bob", None, "s")]
        for stream in streams:
            stream.close()


def test_calls_that_answer_at_once_take_them_too(world: ToyWorld) -> None:
    seen: set[tuple[str, str | None, str]] = set()
    with world.llm(on_iteration=lambda record: seen.update(origins(llm))) as llm:
        more: dict[str, Any] = {"tenant": "ann", "program_id": "agent"}
        llm.generate("abc", GREEDY, cache_salt="1", **more)
        llm.chat(CONVERSATION, GREEDY, cache_salt="2", **more)
        llm.replay([(0.0, "abc", GREEDY)], cache_salt="3", **more)
    assert seen == {("ann", "agent", salt) for salt in "123"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tenant": 4}, r"tenant: must be a string, got 4"),
        ({"tenant": None}, r"tenant: must be a string, got None"),
        ({"tenant": ["ann"]}, r"tenant: must be a string, or one for each of 2, got \['ann'\]"),
        ({"tenant": ["ann", 4]}, r"tenant: must be a string, got 4 \(request 2 of 2\)"),
        ({"program_id": "p" * 257}, r"program_id: must have at most 256 characters, got 257"),
        ({"program_id": b"ab"}, r"program_id: must be a string, got 97"),
        ({"cache_salt": "\ud800"}, r"cache_salt: must be valid Unicode"),
    ],
)
def test_what_is_no_origin_is_refused(world: ToyWorld, given: dict[str, Any], message: str) -> None:
    with world.llm() as llm:
        with pytest.raises(InvalidRequest, match=message):
            llm.generate(["a", "b"], GREEDY, **given)
        assert world.plans == []


def test_the_options_of_the_cache_reach_the_scheduler(world: ToyWorld) -> None:
    with world.llm() as llm:
        assert llm._engine is not None and llm._engine.config.enable_prefix_caching
        assert llm.info["enable_prefix_caching"] is True and llm.info["tenant_weights"] == {}
    with world.llm(enable_prefix_caching=False, tenant_weights={"ann": 2}) as llm:
        assert llm._engine is not None and not llm._engine.config.enable_prefix_caching
        assert llm._engine.config.tenant_weights == llm.info["tenant_weights"] == {"ann": 2.0}
    with pytest.raises(InvalidRequest, match="tenant_weights"):
        world.llm(tenant_weights={"ann": 0})
    with pytest.raises(InvalidRequest, match="enable_prefix_caching: must be True or False"):
        world.llm(enable_prefix_caching="yes")


def test_cached_tokens_of_several_answers_are_the_first_ones(world: ToyWorld) -> None:
    with world.llm() as llm:
        (output,) = llm.generate("abc", SamplingParams(n=3, max_tokens=4, ignore_eos=True))
    for answer, found in zip(output.outputs, (2, 3, 3), strict=True):
        answer.metrics.cached_tokens, answer.metrics.finish = found, 100.0 + answer.index
    assert output.metrics.cached_tokens == output.num_cached_tokens == 2
    assert output.metrics.as_dict(4)["cached_tokens"] == 2
