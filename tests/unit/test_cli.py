"""The `fastserve` command: what it prints, and what it says when it cannot."""

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
import toy_llm
from toy import expected_output
from toy_llm import ALPHABET, BLOCK_BYTES, CONTEXT, ToySource, ToyWorld

import fastserve.loaders
from fastserve import LLM, SamplingParams
from fastserve.cli import main
from fastserve.cli.options import ENGINE, OPTION_NAMES, SAMPLING, SEED, TENANTS
from fastserve.cli.serve import SERVER
from fastserve.cost import CostModel
from fastserve.server.settings import ServerSettings

COMMANDS = [
    "serve", "generate", "chat", "info", "convert", "profile", "simulate", "version", "bench", "bench latency",
    "bench serve", "bench throughput",
]  # fmt: skip
GREEDY = ["--temperature", "0", "--ignore-eos"]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(fastserve.loaders, "open_model", lambda model: ToySource())
    return toy_llm.enter(monkeypatch)


class Shell:
    """Runs commands in this process; an exit code other than the expected one fails the test."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str, code: int = 0) -> str:
        assert main(words) == code
        printed = self._capsys.readouterr()
        self.errors = printed.err
        return printed.out


@pytest.fixture
def shell(world: ToyWorld, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def answer(prompt: list[int], seed: int, max_tokens: int) -> list[int]:
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens)
    return expected_output(prompt, params, seed, CONTEXT)


def ids(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


def as_text(tokens: list[int]) -> str:
    return "".join(ALPHABET[token] for token in tokens if ALPHABET[token] != "<")


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


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("foo", "No such command 'foo'"),
        ("bench", "Missing command"),
        ("generate --polcy fcfs", r"No such option: --polcy.*--policy.*Try: fastserve generate --help"),
        ("generate --prompt a --max-tokens many", "--max-tokens.*valid integer"),
        ("generate --prompt a --policy lifo", "--policy: must be one of fcfs, mlfq, skip-join-mlfq, gittins; got 'li"),
        (
            "generate --prompt a --policy srpt",
            "--policy: .*; srpt has to be told how long every output is, as fastserve s",
        ),
        ("generate --prompt a --slowdown-limit often", "--slowdown-limit: must be a number or none, got 'often'"),
        ("generate --prompt a --swap-space 900T", "--swap-space: must fit in the memory available, .* got '900T'"),
        ("generate --prompt a --swap-space 1", "--swap-space: must be 0 or hold at least one KV block of"),
        ("generate --prompt a --swap-bandwidth 100K", "--swap-bandwidth: must be at least 1M, in bytes a second"),
        ("generate --prompt a --swap-mode lazy", "--swap-mode: must be one of proactive, reactive, recompute; got"),
        ("bench throughput --admission first", "--admission: must be one of paged, reserve; got 'first'"),
        ("generate --prompt a --max-tokens -1", "--max-tokens: must be an integer of at least 1, got -1"),
        ("generate --prompt a --temperature nan", "--temperature: must be a number between 0 and 100, got nan"),
        ("generate --prompt a --top-p 0", "--top-p: must be a number above 0"),
        ("generate --prompt a --n 0", "--n: must be an integer between 1 and 128, got 0"),
        ("generate --prompt a --kv-cache-memory lots", "--kv-cache-memory: must be a size such as 512M"),
        ("generate --prompt a --starvation-limit soon", "--starvation-limit: must be a number of seconds or none"),
        ("generate --prompt a --cost /no/such.json", "--cost: cannot read /no/such.json"),
        ("generate --prompt a --device gpu", "--device: must be cpu, cuda or one such as cuda:1"),
        ("generate", '--prompt: is missing; give one with --prompt "…"'),
        ("generate --prompt=", "--prompt: must hold at least one token"),
        ("generate --prompt-token-ids 1,x", "--prompt-token-ids: must be integers such as 504,3575,282; got '1,x'"),
        ("generate --prompt-token-ids 61", "--prompt-token-ids: holds the token id 61, and the vocabulary ends at 60"),
        ("generate --prompt a --prompt-token-ids 61", r"--prompt-token-ids: holds.*\(request 2 of 2\)"),
        ("generate --prompt a --threads 1025", "--threads: must be at most 1024, got 1025"),
        ("generate --prompt a --block-size 100000", "--block-size: must be at most 65536"),
        (
            "generate --prompt a --max-num-batched-tokens 1000000000",
            "--max-num-batched-tokens: must be at most 1048576",
        ),
        ("generate --prompt a --starvation-limit inf", "--starvation-limit: must be above 0 seconds, or none"),
        ("generate --prompt a --model=", "--model: must be smollm2, a .gguf file"),
        (
            "profile toy --output /dev/null/profile.json",
            "--output: cannot write /dev/null/profile.json: /dev/null is no",
        ),
        ("generate --prompt-token-ids 1 --chat", "--chat: needs prompts that are text"),
        ("generate --prompts-file /no/such/file", "--prompts-file: cannot read /no/such/file"),
        ("bench latency --output-len 0", "--output-len: must be an integer of at least 2, got 0"),
        ("bench latency --batch-size 0", "--batch-size: must be an integer of at least 1, got 0"),
        ("profile", "Missing argument 'MODEL'"),
        ("serve --tenant-weight ann", "--tenant-weight: must be NAME=WEIGHT with a number above 0, .* got 'ann'"),
        ("serve --tenant-weight ann=0", "--tenant-weight: must be NAME=WEIGHT with a number above 0, .* got 'ann=0'"),
        ("serve --tenant-weight ann=nan", "--tenant-weight: must be NAME=WEIGHT with a number above 0"),
        ("serve --api-key k --tenant-weight ann=2", "--tenant-weight: must name key 0, or a user of one as key 0/"),
        ("serve --api-key k --tenant-weight=key=2", "--tenant-weight: must name key 0, .* got 'key'"),
        ("generate --prompt a --tenant-weight ann=2", "No such option: --tenant-weight"),
        (
            "generate --prompt a --enable-prefix-caching --no-enable-prefix-caching",
            "--enable-prefix-caching: cannot be given with --no-enable-prefix-caching",
        ),
    ],
)
def test_an_error_is_one_line_and_code_2(shell: Shell, words: str, message: str) -> None:
    assert shell(*words.split(), code=2) == ""
    assert shell.errors.startswith("fastserve: ") and shell.errors.count("\n") == 1
    assert re.search(message, shell.errors), shell.errors


def test_info_of_nothing_tells_what_is_supported(shell: Shell) -> None:
    for name in ("", " "):
        assert shell("info", name, code=2) == ""
        assert re.fullmatch(r"fastserve: the name of the model is empty; use smollm2, a \.gguf.*\n", shell.errors)


@pytest.mark.parametrize("command", ["generate", "generate --prompts-file -", "chat"])
def test_closed_standard_input_is_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert shell(*command.split(), code=2) == ""
    assert re.fullmatch(r"fastserve: --prompt: cannot be read, as standard input is closed; .*\n", shell.errors)


def test_closed_standard_output_is_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)
        assert main(["version"]) == 1
    shell("version")
    assert shell.errors == "fastserve: standard output is closed; redirect it to a file or to /dev/null\n"


def test_an_answer_that_fails_is_a_line_and_code_1(shell: Shell, world: ToyWorld) -> None:
    world.no_token = lambda result: {0: "no probability left"}
    words = ["--prompt", "a", "--policy", "fcfs", "--swap-space", "0"]
    shell("generate", *words, code=1)
    assert shell.errors == "fastserve: no probability left\n"
    (result,) = json.loads(shell("generate", *words, "--json", code=1))["results"]
    assert (result["finish_reason"], result["error"]) == ("error", "no probability left")
    shell("generate", *words, "--prompt", "b", code=1)
    assert re.fullmatch(r"fastserve: \d of 2 answers failed, of prompt 1: no probability left\n", shell.errors)


def test_a_profile_is_shown_before_it_is_saved(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "profile.json")

    monkeypatch.setattr(CostModel, "save", full)
    words = ["profile", "toy", "--quick", "--output", str(tmp_path / "profile.json")]
    assert json.loads(shell(*words, "--json", code=1))["per_iteration"] > 0
    assert "prompt tokens" in shell(*words, code=1)
    assert shell.errors == "fastserve: profile.json: No space left on device\n"


def test_a_job_that_never_fits_is_refused(shell: Shell) -> None:
    words = ["--prompt", "abc", "--max-tokens", "200", "--kv-cache-memory", "4K", "--block-size", "8"]
    shell("generate", *words, code=2)
    assert re.search(r"--max-tokens: a prompt of 3 tokens and up to 200 .* need 26 KV blocks", shell.errors)


def test_a_model_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("info", "profile", "generate --prompt a --model", "chat --model", "bench latency --model"):
        assert main([*command.split(), "/no/such/model.gguf"]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("fastserve: /no/such/model.gguf: no such file") and errors.count("\n") == 1


def test_other_failures_are_one_line_and_code_1(shell: Shell, world: ToyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world.fail_at = 0
    shell("generate", "--prompt", "a", "--policy", "fcfs", "--swap-space", "0", code=1)
    assert shell.errors == "fastserve: the engine stopped: the device is gone\n"

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(LLM, "generate", broken)
    world.fail_at = None
    shell("generate", "--prompt", "a", code=1)
    assert shell.errors == "fastserve: ZeroDivisionError: a bug (FASTSERVE_DEBUG=1 shows where)\n"
    monkeypatch.setenv("FASTSERVE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["generate", "--prompt", "a"])


def test_names_in_errors_are_names_of_options(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # room for long names
    texts = [shell(*command.split(), "--help") for command in COMMANDS]
    shown = set(re.findall(r"--[a-z][a-z-]*", " ".join(texts)))
    assert set(OPTION_NAMES.values()) <= shown
    # And those of a simulation are all known: only what cannot be wrong, or is told by another name, is not.
    mine = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shell("simulate", "--help")))
    flags = {"--help", "--json", "--progress", "--no-progress", "--no-pipelining", "--program-ids", "--no-program-ids"}
    flags |= {"--no-enable-prefix-caching"}
    assert mine - set(OPTION_NAMES.values()) == flags | {"--gpu"}


# --- chat ----------------------------------------------------------------------------------------------------------


def test_chat_remembers_and_resets(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, str]]] = []
    stream_chat = LLM.stream_chat

    def spy(self: LLM, messages: Any, params: Any) -> Any:
        asked.append(list(messages))
        return stream_chat(self, messages, params)

    monkeypatch.setattr(LLM, "stream_chat", spy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nyo\n/help\n/reset\nhi\n/exit\nnever\n"))
    answers = shell("chat", "--system", "be", "--max-tokens", "4", "--ignore-eos").splitlines()
    assert [[message["role"] for message in messages] for messages in asked] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert asked[1][2]["content"] == answers[0] and len(answers) == 3
    assert "/reset" in shell.errors


def test_ctrl_c_stops_an_answer_and_not_the_conversation(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    stream_chat = LLM.stream_chat

    def interrupted(self: LLM, messages: Any, params: Any) -> Any:
        stream = stream_chat(self, messages, params)
        if len(messages) > 1:
            yield from stream
            return
        try:
            yield next(stream)
            yield next(stream)
            raise KeyboardInterrupt
        finally:
            stream.close()
            closed.append(not self._live)

    monkeypatch.setattr(LLM, "stream_chat", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nyo\n"))
    answers = shell("chat", "--max-tokens", "8", "--ignore-eos").splitlines()
    assert closed == [True]
    assert len(answers[0]) <= 2 < len(answers[1])
    assert "stopped" in shell.errors and "8 tokens" in shell.errors


def test_a_conversation_that_grew_too_long_is_not_the_end(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a" * 300 + "\nhi\n"))
    assert len(shell("chat", "--max-tokens", "4", "--ignore-eos").splitlines()) == 1
    assert "/reset starts over" in shell.errors


def test_chat_needs_a_template(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_llm, "TEMPLATE", None)
    shell("chat", code=2)
    assert shell.errors == "fastserve: --model: smollm2 has no chat template; use: fastserve generate --model smollm2\n"


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
