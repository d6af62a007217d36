"""The `fastserve` command: what it prints."""

from __future__ import annotations

import inspect
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_shell import COMMANDS, Shell, enter
from toy import expected_output
from toy_llm import BLOCK_BYTES, CONTEXT, ToyWorld, as_text, ids

import fastserve.loaders
from fastserve import LLM, SamplingParams
from fastserve.cli.options import ENGINE, SAMPLING, SEED, TENANTS
from fastserve.cli.serve import SERVER
from fastserve.cost import CostModel
from fastserve.server.settings import ServerSettings

GREEDY = ["--temperature", "0", "--ignore-eos"]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    return enter(monkeypatch)


@pytest.fixture
def shell(world: ToyWorld, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def answer(prompt: list[int], seed: int, max_tokens: int) -> list[int]:
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens)
    return expected_output(prompt, params, seed, CONTEXT)


def seeds(seed: int) -> Iterator[int]:
    import random

    source = random.Random(seed)
    while True:
        yield source.getrandbits(64)


# --- help ----------------------------------------------------------------------------------------------------------


def test_help_lists_every_command(shell: Shell) -> None:
    for words in ([], ["--help"], ["-h"]):
        text = shell(*words)
        assert all(command in text for command in COMMANDS if " " not in command)
    assert all(each in shell("bench", "--help") for each in ("latency", "serve", "throughput"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(shell: Shell, command: str) -> None:
    assert f"Usage: fastserve {command}" in " ".join(shell(*command.split(), "--help").split())


@pytest.mark.parametrize(("command", "whose"), [("serve", "its tenant's"), ("simulate", "its user's")])
def test_help_promises_no_more_than_a_share_keeps(shell: Shell, command: str, whose: str) -> None:
    text = " ".join(shell(command, "--help").replace("│", " ").split())
    (limit,) = re.findall(r"--starvation-limit (.*?) --", text)
    assert re.search(rf"waiting job goes first.*among {whose} where several have jobs", limit), limit


def test_the_defaults_that_help_shows_are_the_apis() -> None:
    """Options are left out when not given, so what help says of them could be wrong."""
    engine = inspect.signature(LLM).parameters
    sampling = inspect.signature(SamplingParams).parameters
    server = inspect.signature(ServerSettings).parameters
    for options, parameters in (({**ENGINE, **TENANTS, **SEED}, engine), (SAMPLING, sampling), (SERVER, server)):
        for name, annotation in options.items():
            shown, default = annotation.__metadata__[0].show_default, parameters[name].default
            if shown and default not in (None, ()):
                assert type(default)(shown) == default, name


def test_every_engine_option_of_the_api_is_an_option() -> None:
    missing = inspect.signature(LLM).parameters.keys() - {*ENGINE, *TENANTS, *SEED}
    absent = {"model", "max_in_flight", "data_parallel_size", "rank_timeout"}
    absent |= {"skip_tokenizer", "tokenizer", "on_iteration"}
    assert missing == absent


def test_version(shell: Shell) -> None:
    assert shell("version") == shell("--version") == f"fastserve {fastserve.__version__}\n"


# --- generate ------------------------------------------------------------------------------------------------------


def test_generate_json_is_one_object(shell: Shell) -> None:
    words = ["--prompt", "abc", "--prompt-token-ids", "4, 5", "--max-tokens", "7", "--seed", "3", "--policy", "mlfq"]
    result = json.loads(shell("generate", "--model", "some/model", *words, *GREEDY, "--json"))
    assert list(result) == ["model", "policy", "results"]
    assert (result["model"], result["policy"]) == ("some/model", "mlfq")
    assert [each["prompt"] for each in result["results"]] == ["abc", [4, 5]]
    for each, prompt, seed in zip(result["results"], (ids("abc"), [4, 5]), seeds(3), strict=False):
        assert list(each) == ["prompt", "text", "token_ids", "finish_reason", "metrics"]
        assert each["token_ids"] == answer(prompt, seed, 7)
        assert (each["text"], each["finish_reason"]) == (as_text(each["token_ids"]), "length")
        assert each["metrics"]["jct"] >= each["metrics"]["ttft"] > 0 == each["metrics"]["preemptions"]


def test_several_answers_are_several_results(shell: Shell) -> None:
    words = ["--prompt", "ab", "--n", "3", "--max-tokens", "4", "--json"]
    results = json.loads(shell("generate", *words))["results"]
    assert [each["prompt"] for each in results] == ["ab"] * 3


def test_one_answer_is_printed_as_it_is(shell: Shell) -> None:
    text = shell("generate", "--prompt", "abc", "--max-tokens", "7", *GREEDY)
    assert text == as_text(answer(ids("abc"), next(seeds(0)), 7)) + "\n"


def test_prompts_come_from_flags_files_and_standard_input(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("first\n\nsecond line\n")
    output = shell("generate", "--prompts-file", str(file), "--prompt", "x", "--max-tokens", "2")
    assert re.findall(r"^=== (.*)$", output, re.MULTILINE) == ["1/3: x", "2/3: first", "3/3: second line"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("two lines\nin one prompt".replace("\n", " ") + "\n"))
    (only,) = json.loads(shell("generate", "--max-tokens", "2", "--json"))["results"]
    assert only["prompt"] == "two lines in one prompt"


def test_chat_flag_applies_the_template(shell: Shell) -> None:
    words = ["--max-tokens", "5", *GREEDY, "--json"]
    (asked,) = json.loads(shell("generate", "--chat", "--prompt", "hi", *words))["results"]
    assert asked["prompt"] == "hi"
    assert asked["token_ids"] == answer(ids("uhiZa"), next(seeds(0)), 5)


def test_sampling_options_reach_the_job(shell: Shell) -> None:
    whole = as_text(answer(ids("abc"), next(seeds(0)), 12))
    words = ["--prompt", "abc", "--max-tokens", "12", *GREEDY]
    assert shell("generate", *words, "--stop", whole[4:6], "--stop", "never") == whole[: whole.index(whole[4:6])] + "\n"
    token = answer(ids("abc"), next(seeds(0)), 12)[5]
    (result,) = json.loads(shell("generate", *words, "--stop-token-id", str(token), "--json"))["results"]
    assert (result["finish_reason"], result["token_ids"][-1]) == ("stop", token)


# --- the other commands --------------------------------------------------------------------------------------------


def test_info(shell: Shell) -> None:
    result = json.loads(shell("info", "toy", "--json"))
    assert (result["family"], result["vocabulary"], result["context"]) == ("toy", 61, CONTEXT)
    sizes = result["kv_bytes_per_token"]
    assert sizes["float32"] == 2 * sizes["bfloat16"] and sizes["int8"] < sizes["bfloat16"]
    assert (result["tokenizer"], result["chat_template"], result["eos_token_ids"]) == (True, True, [3])
    assert result["swap_blocks"] > 0 < result["kv_blocks"] <= 32 * CONTEXT // 16
    assert result["mpi"] is None or re.match(r"[A-Z].* \d+\.\d+", result["mpi"])
    table = shell("info", "toy")
    assert re.search(r"vocabulary +61", table) and re.search(r"tokenizer +yes", table)


def test_profile_writes_what_cost_reads(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    printed = shell("profile", "toy", "--quick", "--output", str(file), "--json")
    cost = CostModel.load(file)
    assert json.loads(printed) == json.loads(file.read_text())
    assert cost.decode_seconds(1) == pytest.approx(1.01, rel=0.05)  # the toy takes 1 s an iteration, 0.01 s a token
    shell("generate", "--prompt", "a", "--cost", str(file))
    shown = shell("profile", "toy", "--quick", "--swap-space", "1M")
    assert re.search("prompt tokens.*prefill.*context.*decode", shown) and "KV moves to the host at 0.00 GB/s" in shown
    assert "KV moves" not in shell("profile", "toy", "--quick", "--swap-space", "0")


def test_bench_prints_json(shell: Shell) -> None:
    lengths = ["--input-len", "8", "--output-len", "4", "--json"]
    latency = json.loads(shell("bench", "latency", "--batch-size", "1", "--batch-size", "2", *lengths))
    assert [each["batch_size"] for each in latency["results"]] == [1, 2]
    assert latency["engine"]["enable_prefix_caching"] is False, "its repetitions have the same prompts"
    throughput = json.loads(shell("bench", "throughput", "--num-prompts", "5", "--policy", "fcfs", *lengths))
    assert (throughput["output_tokens"], throughput["engine"]["policy"]) == (20, "fcfs")


def test_swapping_is_set_from_the_command_line(shell: Shell, world: ToyWorld) -> None:
    """Eight blocks for five jobs of three to five blocks: KV goes to the host and comes back."""
    lengths = ["--num-prompts", "5", "--input-len", "40", "--output-len", "30", "--json", "--policy", "mlfq"]
    memory = ["--kv-cache-memory", f"{8 * BLOCK_BYTES}", "--swap-space", f"{20 * BLOCK_BYTES}"]
    limits = ["--swap-bandwidth", "200M", "--slowdown-limit", "8", "--starvation-limit", "none"]
    engine = json.loads(shell("bench", "throughput", *lengths, *memory, *limits))["engine"]
    assert (engine["num_blocks"], engine["num_host_blocks"], engine["swap_mode"]) == (8, 20, "proactive")
    assert (engine["slowdown_limit"], engine["starvation_limit"], engine["admission"]) == (8.0, None, "paged")
    assert engine["swap_bandwidth"] == 200 * 2**20
    assert engine["link"]["offload_bytes_per_second"] == BLOCK_BYTES / 0.125  # the toy copies a block in 1/8 s
    assert min(world.runtimes[-1].copied.values()) > 0
    engine = json.loads(shell("bench", "throughput", *lengths, *memory, "--admission", "reserve"))["engine"]
    assert (engine["num_host_blocks"], engine["link"], engine["admission"]) == (0, None, "reserve")


def test_the_prefix_cache_is_on_unless_it_is_turned_off(shell: Shell) -> None:
    words = ["bench", "throughput", "--num-prompts", "1", "--input-len", "8", "--output-len", "4", "--json"]
    for flags, on in (([], True), (["--enable-prefix-caching"], True), (["--no-enable-prefix-caching"], False)):
        assert json.loads(shell(*words, *flags))["engine"]["enable_prefix_caching"] is on


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        ("--tenant-weight ann=2 --tenant-weight b=c=0.5", {"ann": 2.0, "b=c": 0.5}),
        ("--tenant-weight =3", {"": 3.0}),  # requests without a user
        (
            "--api-key k --api-key l --tenant-weight", {"key 0": 2.0, "key 1/ann": 3.0},
        ),
    ],
)  # fmt: skip
def test_weights_of_tenants_reach_the_engine(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, words: str, weights: dict[str, float]
) -> None:
    told: list[dict[str, Any]] = []

    def client(settings: ServerSettings, options: dict[str, Any], tokenizer: Any) -> Any:
        told.append(options)
        raise OSError("not today")

    monkeypatch.setattr("fastserve.cli.serve._engine_client", client)
    monkeypatch.setattr("fastserve.cli.serve._set_up_logging", lambda: None)
    named = ["key 0=2", "--tenant-weight", "key 1/ann=3"] if words.endswith("weight") else []
    shell("serve", "--port", "0", "--no-enable-prefix-caching", *words.split(), *named, code=1)
    assert told[0]["tenant_weights"] == weights and told[0]["enable_prefix_caching"] is False


def test_a_real_model_from_another_process() -> None:
    words = ["generate", "--prompt", "The capital of France is", "--max-tokens", "4", "--json", *GREEDY]
    options = ["--kv-cache-memory", "64M", "--dtype", "float32", "--kv-cache-dtype", "int8", "--policy", "fcfs"]
    done = subprocess.run(
        [sys.executable, "-m", "fastserve", *words, *options], capture_output=True, text=True, check=True
    )
    (result,) = json.loads(done.stdout)["results"]
    assert result["text"].startswith(" Paris") and len(result["token_ids"]) == 4
