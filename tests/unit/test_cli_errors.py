"""The `fastserve` command: what it says when it cannot."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_shell import COMMANDS, Shell, enter
from toy_llm import ToyWorld

from fastserve import LLM
from fastserve.cli import main
from fastserve.cli.options import OPTION_NAMES
from fastserve.cost import CostModel


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ToyWorld:
    return enter(monkeypatch)


@pytest.fixture
def shell(world: ToyWorld, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


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
